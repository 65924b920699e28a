"""How local paths look to a server: what is copied for it is private, and can be removed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path, PurePosixPath

import pytest
from docker.errors import APIError
from fake_docker import FakeDocker, refusal

from sglang_harness._base.temporary import RECORD
from sglang_harness.errors import EngineError
from sglang_harness.runtime import Reach, engine
from sglang_harness.runtime.attach import SharedFolder
from sglang_harness.runtime.path_map import EXCHANGE, FolderReach, SameMachine, VolumeReach


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    (folder / "model.safetensors").chmod(0o600)
    folder.chmod(0o700)
    return folder


@pytest.fixture
def exchange() -> Iterator[FolderReach]:
    reach = FolderReach(None)
    yield reach
    reach.close()


def contents(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.name != RECORD)


# --- copies go when they are no longer needed -----------------------------------------------------


def test_three_pushes_to_an_exchange_folder_leave_no_copies(exchange: FolderReach, weights: Path):
    for _ in range(3):
        inside = exchange.share(weights)
        assert (exchange.folder / inside.name / "model.safetensors").is_file()
        exchange.unshare(inside)
    assert contents(exchange.folder) == []


def test_three_pushes_through_a_shared_folder_leave_no_copies(tmp_path: Path, weights: Path):
    local = tmp_path / "shared"
    local.mkdir()
    shared = SharedFolder(local, PurePosixPath("/mnt"))
    for _ in range(3):
        inside = shared.share(weights)
        assert (local / inside.relative_to("/mnt") / "model.safetensors").is_file()
        shared.unshare(inside)
    assert contents(local) == []


def test_three_pushes_to_a_volume_leave_no_copies(weights: Path):
    docker = FakeDocker()
    volume = VolumeReach(docker, "image", {"label": "1"})  # type: ignore[arg-type]
    for _ in range(3):
        volume.unshare(volume.share(weights))
    removed = [ran["command"] for ran in docker.containers.ran]
    assert len(removed) == 3
    assert all(PurePosixPath(path).parent == EXCHANGE for (path,) in removed)
    assert docker.containers.ran[0]["labels"] == {"label": "1"}


@pytest.mark.parametrize("where", ["same machine", "exchange", "shared folder"])
def test_what_was_not_copied_is_not_removed(
    where: str, exchange: FolderReach, weights: Path, tmp_path: Path
):
    reaches: dict[str, Callable[[], Reach]] = {
        "same machine": SameMachine,
        "exchange": lambda: exchange,
        "shared folder": lambda: SharedFolder(tmp_path, PurePosixPath("/mnt")),
    }
    reach = reaches[where]()
    here = weights
    if where == "exchange":
        here = exchange.folder / "staged"
        shutil.copytree(weights, here)
    inside = reach.share(here)
    reach.unshare(inside)
    reach.unshare(PurePosixPath("/never/shared"))
    assert (here / "model.safetensors").is_file()


def test_a_copy_is_removed_once_and_a_second_time_does_nothing(
    exchange: FolderReach, weights: Path
):
    first, second = exchange.share(weights), exchange.share(weights)
    exchange.unshare(first)
    exchange.unshare(first)
    assert contents(exchange.folder) == [
        exchange.folder / second.name,
        exchange.folder / second.name / "model.safetensors",
    ]


def test_a_copy_in_a_volume_that_could_not_be_removed_is_told_and_may_be_tried_again(
    weights: Path,
):
    docker = FakeDocker()
    volume = VolumeReach(docker, "image", {})  # type: ignore[arg-type]
    inside = volume.share(weights)
    docker.refuses["containers.run"] = refusal(500, "no space")
    with pytest.raises(EngineError, match=r"could not be removed.*no space"):
        volume.unshare(inside)
    docker.refuses.clear()
    volume.unshare(inside)
    assert len(docker.containers.ran) == 1


def test_weights_that_others_may_read_take_their_disk_once(exchange: FolderReach, weights: Path):
    """A second checkpoint was written to the scratch folder, and copied for the server."""
    file = weights / "model.safetensors"
    file.chmod(0o644)
    inside = exchange.share(weights)
    shared = exchange.folder / inside.name / file.name
    assert shared.samefile(file)
    exchange.unshare(inside)
    assert file.is_file()


def test_weights_that_others_may_not_read_are_copied_and_stay_as_private_as_they_were(
    exchange: FolderReach, weights: Path
):
    file = weights / "model.safetensors"
    file.chmod(0o600)
    shared = exchange.folder / exchange.share(weights).name / file.name
    assert not shared.samefile(file)
    assert shared.stat().st_mode & 0o777 == 0o644
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_copy_that_fails_half_way_stays_nowhere(
    exchange: FolderReach, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    def disk_is_full(_: Path, target: Path) -> None:
        target.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sglang_harness.runtime.path_map.link_or_copy", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        exchange.share(weights)
    assert contents(exchange.folder) == []


# --- copies are for the server alone --------------------------------------------------------------


def test_other_users_cannot_list_what_is_exchanged_and_the_server_can_read_it(
    exchange: FolderReach, weights: Path, tmp_path: Path
):
    local = tmp_path / "shared"
    local.mkdir()
    inside = SharedFolder(local, PurePosixPath("/mnt")).share(weights)
    copies = {
        exchange.folder: exchange.folder / exchange.share(weights).name,
        (local / inside.relative_to("/mnt")).parent: local / inside.relative_to("/mnt"),
    }
    for parent, copy in copies.items():
        assert parent.stat().st_mode & 0o777 == 0o711
        # Entered by name only: what has to be guessed is the copy's or its parent's random part.
        assert len(f"{parent.name}{copy.name}".rsplit("-", 1)[-1]) >= 32
        assert copy.stat().st_mode & 0o777 == 0o755
        assert (copy / "model.safetensors").stat().st_mode & 0o777 == 0o644


# --- volumes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["volumes.create", "containers.create"])
def test_a_volume_that_cannot_be_filled_is_removed_again(call: str):
    docker = FakeDocker()
    docker.refuses[call] = refusal(500, "no such image")
    with pytest.raises(EngineError, match="no such image"):
        VolumeReach(docker, "image", {})  # type: ignore[arg-type]
    assert docker.names() == []


def test_a_helper_that_cannot_be_removed_keeps_no_volume(weights: Path):
    docker = FakeDocker()
    volume = VolumeReach(docker, "image", {})  # type: ignore[arg-type]
    docker.refuses["container.remove"] = refusal(500, "driver failed")
    left = volume.close()
    assert [line.split(":")[0] for line in left] == [
        f"helper container of the volume {volume.name}"
    ]
    assert "driver failed" in left[0]
    assert f"volume {volume.name}" not in docker.names()


@pytest.mark.parametrize(
    ("status", "reason", "fails"),
    [
        (404, "No such container", False),
        (409, "removal of container 1a2b is already in progress", False),
        (409, "volume is in use", True),
        (500, "driver failed", True),
    ],
)
def test_what_is_going_already_is_no_failure(status: int, reason: str, fails: bool):
    docker = FakeDocker()
    container = docker.containers.create("image", name="server")
    docker.refuses["container.remove"] = refusal(status, reason)
    with pytest.raises(APIError, match=reason) if fails else nullcontext():
        engine.discard(container.remove)


def test_the_exchange_folder_is_gone_after_its_end(exchange: FolderReach, weights: Path):
    exchange.share(weights)
    assert exchange.close() == []
    assert not exchange.folder.exists()


def test_an_exchange_folder_that_cannot_be_removed_is_told(
    exchange: FolderReach, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert exchange.close() == [f"{exchange.folder}: it is still there"]
