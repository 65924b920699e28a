"""What a sweep removes and what it leaves, by who owns it and never by its age."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_server import BOUND

from sglang_harness import cli
from sglang_harness._base import paths, temporary
from sglang_harness._base.owner import Owner
from sglang_harness.errors import EngineError, HarnessError
from sglang_harness.runtime import engine
from sglang_harness.runtime.engine import Leftover
from sglang_harness.runtime.path_map import FolderReach
from sglang_harness.upkeep import kept_servers
from sglang_harness.upkeep.sweep import Swept, sweep

MAKES_ONE = """
import os, sys
from sglang_harness._base.temporary import keep, temporary_folder

folder = temporary_folder("exchange")
(folder / "weights").mkdir()
(folder / "weights" / "model.safetensors").write_bytes(b"x")
if len(sys.argv) > 1:
    keep(folder, sys.argv[1])
print(folder, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""

Run = subprocess.Popen[str]


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders and records of this test's own, and no engine."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")


@pytest.fixture
def another_run() -> Callable[..., tuple[Run, Path]]:
    """A process with a folder of its own; a line on its input kills it."""

    def start(*words: str) -> tuple[Run, Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", MAKES_ONE, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    return start


def killed(process: Run) -> None:
    process.communicate("\n", timeout=BOUND)


def age(folder: Path) -> None:
    long_ago = time.time() - 100 * 24 * 3600
    os.utime(folder, (long_ago, long_ago))


def on_disk(*, everything: bool = False) -> Swept:
    """A sweep; that no engine answers is told and stops nothing."""
    swept = sweep(everything=everything)
    assert "No Docker engine answers" in swept.failed.pop(0)
    return swept


def test_the_folder_of_a_run_that_lives_stays_however_old_it_is(another_run) -> None:
    process, folder = another_run()
    age(folder)
    assert on_disk() == Swept()
    assert (folder / "weights" / "model.safetensors").exists()
    killed(process)


def test_the_folder_of_a_dead_run_goes_however_young_it_is(another_run) -> None:
    process, folder = another_run()
    killed(process)
    assert on_disk() == Swept(removed=[str(folder)])
    assert not folder.exists()


def test_this_processes_own_folder_stays_and_everything_takes_it() -> None:
    reach = FolderReach(None)
    age(reach.folder)
    assert on_disk() == Swept()
    assert on_disk(everything=True).removed == [str(reach.folder)]
    assert not reach.folder.exists()


def test_what_cannot_be_removed_is_told_and_keeps_its_record_for_the_next_sweep(
    another_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, folder = another_run()
    killed(process)

    def refuses(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuses)
        swept = on_disk()
    assert swept.removed == []
    (told,) = swept.failed
    assert told.startswith(f"{folder}: ")
    assert "Permission denied" in told
    assert on_disk() == Swept(removed=[str(folder)])


def test_a_folder_that_its_owner_removes_meanwhile_is_no_failure(
    another_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, folder = another_run()
    killed(process)
    real = temporary._state

    def removed_meanwhile(path: Path, about: os.stat_result) -> str:
        state = real(path, about)
        shutil.rmtree(path)
        return state

    monkeypatch.setattr(temporary, "_state", removed_meanwhile)
    assert on_disk() == Swept()
    assert temporary.remove(folder) == []


def test_a_folder_without_a_record_is_left_and_told_unless_it_is_empty_and_old() -> None:
    tmp = Path(tempfile.gettempdir())
    of_an_older_version = tmp / "sglang-harness-exchange-abcdefgh"
    half_made, being_made = (
        tmp / "sglang-harness-weights-aaaaaaaa",
        tmp / ("sglang-harness-weights-bbbbbbbb"),
    )
    for folder in (of_an_older_version, half_made, being_made):
        folder.mkdir()
    (of_an_older_version / "model.safetensors").touch()
    age(of_an_older_version)
    age(half_made)
    swept = on_disk()
    assert swept.removed == [str(half_made)]
    assert [line.split(":")[0] for line in swept.left] == [
        str(of_an_older_version),
        str(being_made),
    ]
    assert on_disk(everything=True).removed == [str(of_an_older_version), str(being_made)]


@pytest.mark.parametrize("name", ["sglang-harness-main-20261127", "sglang-harness-exchange-of-me"])
def test_a_persons_own_folder_with_such_a_name_is_not_touched(name: str) -> None:
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir()
    age(folder)
    assert on_disk(everything=True) == Swept()
    assert folder.exists()


def test_a_link_with_such_a_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (Path(tempfile.gettempdir()) / "sglang-harness-exchange-abcdefgh").symlink_to(tmp_path / "mine")
    assert on_disk(everything=True) == Swept()
    assert (tmp_path / "mine").exists()


def test_a_kept_servers_folder_outlives_its_process_for_as_long_as_the_record_is_there(
    another_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, folder = another_run("run-1")
    record = kept_servers.Held(
        name="sglang-harness-1", run_id="run-1", address="http://h", api_key="k", folder=str(folder)
    )
    record.file.parent.mkdir(parents=True)
    record.file.write_text(record.model_dump_json())
    killed(process)
    assert on_disk() == Swept()
    # Another user, or a test with a state folder of its own, has no record of it.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert on_disk() == Swept()
    record.file.unlink(missing_ok=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    record.file.unlink()
    assert on_disk() == Swept(removed=[str(folder)])


def test_another_users_folders_are_theirs(another_run, monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = another_run()
    killed(process)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert on_disk() == Swept()


# --- what carries the label of something kept ----------------------------------------------------


def gone() -> Owner:
    now = Owner.this_process()
    return Owner(now.host, now.pid, now.started - 3600)


def test_a_container_whose_run_was_killed_before_it_was_recorded_as_kept_is_abandoned() -> None:
    marks = engine.labels("run-1", held=True)
    held = Path(marks[engine.LABEL_HELD])
    assert not Leftover("container", "c", "run-1", Owner.this_process(), held).is_abandoned()
    killed_early = Leftover("container", "c", "run-1", gone(), held)
    assert killed_early.is_abandoned()
    (paths.state() / "held").mkdir(parents=True)
    (paths.state() / "held" / "c.json").write_text('{"name": "c", "run_id": "run-1"}')
    assert not killed_early.is_abandoned()
    assert Leftover("container", "c", "run-2", gone(), held).is_abandoned()


def test_a_kept_container_whose_records_cannot_be_looked_up_is_left() -> None:
    assert not Leftover("container", "c", "run-1", gone(), Path("1")).is_abandoned()


def test_a_container_on_the_hosts_network_has_its_name_and_other_processes() -> None:
    me = Owner.this_process()
    assert me.host.startswith(f"{socket.gethostname()}@")
    elsewhere = Owner(f"{socket.gethostname()}@1", me.pid, me.started - 3600)
    assert not elsewhere.is_gone()


def test_a_server_of_another_engine_is_not_forgotten_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = kept_servers.Held(
        name="c", run_id="r", address="http://h", api_key="k", folder=None, engine="tcp://there"
    )
    record.file.parent.mkdir(parents=True)
    record.file.write_text(record.model_dump_json())
    with pytest.raises(EngineError, match=r"c runs on the Docker engine at tcp://there"):
        kept_servers.release(record)
    assert not record.is_of_this_engine()
    monkeypatch.setenv("DOCKER_HOST", "tcp://there")
    assert record.is_of_this_engine()


def a_server(name: str, folder: Path) -> Any:
    """What :func:`kept_servers.hold` reads of a server."""
    running = SimpleNamespace(
        shared_folder=folder, run_id=f"run-of-{name}", api_key="k", watch=SimpleNamespace()
    )
    return SimpleNamespace(
        running=running, about=lambda: {"container": name}, address="http://127.0.0.1:5", model=None
    )


def test_a_kept_server_is_on_record_with_its_engine() -> None:
    folder = FolderReach(None).folder
    server = a_server("c", folder)
    held = kept_servers.hold(server)
    assert kept_servers.held_servers() == [held]
    assert held.file.stat().st_mode & 0o077 == 0
    assert server.running.watch.expected
    assert (folder / temporary.RECORD).read_text().splitlines()[1] == (f"run-of-c {paths.state()}")


def test_an_interruption_before_a_server_is_kept_leaves_no_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(temporary, "keep", interrupted)
    server = a_server("c", FolderReach(None).folder)
    with pytest.raises(KeyboardInterrupt):
        kept_servers.hold(server)
    assert kept_servers.held_servers() == []
    assert not hasattr(server.running.watch, "expected"), "whoever started it still has to stop it"


def test_down_stops_what_it_can_and_tells_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [a_server(name, FolderReach(None).folder) for name in ("a", "b")]
    kept = [kept_servers.hold(server) for server in servers]
    asked: list[str] = []

    def release(held: kept_servers.Held) -> list[str]:
        asked.append(held.name)
        if held.name == "a":
            raise EngineError("No answer.")
        return []

    monkeypatch.setattr(kept_servers, "release", release)
    with pytest.raises(HarnessError, match=r"Not everything could be stopped: a: No answer\."):
        cli.down(None)
    assert asked == [each.name for each in kept]


def test_every_temporary_folder_of_the_package_has_a_record_of_its_owner() -> None:
    """What is made under the user's own folders (``dir=``) is that folder's."""
    source = Path(temporary.__file__).parents[1]
    made = {
        file.relative_to(source).as_posix()
        for file in source.rglob("*.py")
        for call in re.findall(r"(?:mkdtemp|mkstemp|TemporaryDirectory)\(.*", file.read_text())
        if "dir=" not in call
    }
    assert made == {"_base/temporary.py"}
