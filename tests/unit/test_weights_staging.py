"""A checkpoint on its way to where a server or a peer reads it, and no copy of it afterwards."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from sglang_harness._base.temporary import RECORD
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.errors import CheckpointMismatch, ModelError
from sglang_harness.runtime.path_map import FolderReach, SameMachine
from sglang_harness.weights.report import NotPrepared
from sglang_harness.weights.source import staging
from sglang_harness.weights.source.fitted import Fitted, ValueCheck, open_for
from sglang_harness.weights.source.model_folder import model_folder
from sglang_harness.weights.source.staging import Staged, as_it_lies, stage, torch_files

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHTS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5).bfloat16(),
    "c": torch.tensor([1.5, 2.5], dtype=torch.float64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    safetensors.save_file({k: WEIGHTS[k] for k in "ab"}, path / ONE)
    safetensors.save_file({"c": WEIGHTS["c"]}, path / TWO)
    return path


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made: empty again after each test."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def opened(path: Path, model: Path | None = None) -> Fitted:
    return open_for(model, path, ())


class Running:
    """What of a server says how files get there."""

    def __init__(self, reach: Any) -> None:
        self.reach = reach
        self.shared_folder = reach.folder if isinstance(reach, FolderReach) else None


def put(source: Fitted, reach: Any, *, reader: Any) -> Staged:
    return stage(source, Running(reach), reader=reader)  # type: ignore[arg-type]


class Copies:
    """A reach that copies everything, as that of a volume."""

    def __init__(self) -> None:
        self.there: dict[PurePosixPath, dict[str, Any]] = {}

    def share(self, path: Path) -> PurePosixPath:
        inside = PurePosixPath("/volume") / str(len(self.there))
        self.there[inside] = dict(open_checkpoint(path).read())
        return inside

    def unshare(self, inside: PurePosixPath) -> None:
        self.there.pop(inside, None)


def test_safetensors_are_read_as_they_lie_only_under_the_same_names(folder: Path, tmp_path: Path):
    assert as_it_lies(opened(folder)) is not None
    assert as_it_lies(opened(folder / TWO)) is None, "one file is no folder"
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    safetensors.save_file({f"module.{n}": t for n, t in WEIGHTS.items()}, renamed / "m.safetensors")
    assert set(opened(renamed).tensors) == set(WEIGHTS)
    assert as_it_lies(opened(renamed)) is None


def test_files_beside_the_checkpoint_are_not_staged(folder: Path, tmp_path: Path):
    """As ``consolidated.safetensors`` lies beside the shards of a Mistral model."""
    safetensors.save_file({"other": WEIGHTS["a"]}, folder / "consolidated.safetensors")
    index = {"weight_map": {"a": ONE, "b": ONE, "c": TWO}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    made = put(opened(folder), FolderReach(None), reader="server")
    assert made._written is not None
    names = {ONE, TWO, "model.safetensors.index.json"}
    assert {file.name for file in made._written.iterdir()} == names


@pytest.fixture
def half(tmp_path: Path) -> tuple[Path, Path]:
    """A bfloat16 model, and a float16 checkpoint for it: as many bytes, of another meaning."""
    model = tmp_path / "model"
    tiny.write(model, 0)
    state = {n: t.bfloat16() for n, t in safetensors.load_file(model / "model.safetensors").items()}
    safetensors.save_file(state, model / "model.safetensors")
    path = tmp_path / "half"
    path.mkdir()
    safetensors.save_file({n: t.half() for n, t in state.items()}, path / "model.safetensors")
    return model, path


def test_a_peer_never_gets_the_bytes_of_another_dtype(half: tuple[Path, Path]):
    """It would send float16 under the label bfloat16: the sizes are the same."""
    model, path = half
    source, reach = opened(path, model), Copies()
    assert as_it_lies(source) is None
    put(source, reach, reader="peer")
    (made,) = reach.there.values()
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}


def test_a_server_converts_so_its_folder_is_shared_as_it_is(half: tuple[Path, Path]):
    model, path = half
    made = put(opened(path, model), SameMachine(), reader="server")
    assert made.inside == PurePosixPath(path)
    made.remove()
    assert (path / "model.safetensors").exists()


def test_a_reference_model_has_the_dtypes_that_the_server_has(
    half: tuple[Path, Path], tmp_path: Path
):
    model, path = half
    made = model_folder(opened(path, model), model, tmp_path / "made")
    dtypes = {info.dtype for info in open_checkpoint(made).tensors.values()}
    assert dtypes == {"bfloat16"}
    assert (made / "config.json").is_file()


def test_staged_weights_cost_no_second_copy_and_can_be_read_by_others(folder: Path):
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / TWO).chmod(0o600)
    reach = FolderReach(None)
    made = put(opened(folder), reach, reader="server")
    written = made._written
    assert written is not None
    assert str(made.inside) == f"/exchange/{written.name}"
    assert written.stat().st_mode & 0o777 == 0o755
    assert (written / ONE).samefile(folder / ONE)
    assert not (written / TWO).samefile(folder / TWO)
    assert {f.stat().st_mode & 0o777 for f in written.iterdir()} == {0o644}
    assert (folder / TWO).stat().st_mode & 0o777 == 0o600
    made.remove()
    assert [p.name for p in reach.folder.iterdir()] == [RECORD]
    assert {f.name for f in folder.iterdir()} == {ONE, TWO}
    made.remove()
    reach.close()


@pytest.mark.parametrize("reader", ["server", "peer"])
@pytest.mark.parametrize("written", [False, True], ids=["as it lies", "written anew"])
def test_a_copy_is_removed_wherever_it_was_made(
    folder: Path, tmp_path: Path, reader: Any, written: bool, temporary: Path
):
    if written:
        torch.save({"model": WEIGHTS}, folder := tmp_path / "trainer.pt")
    reach = Copies()
    made = put(opened(folder), reach, reader=reader)
    assert list(temporary.iterdir()) == [], "the copy that was copied is gone already"
    (got,) = reach.there.values()
    assert all(torch.equal(got[n], t) for n, t in WEIGHTS.items())
    made.remove()
    assert reach.there == {}
    same = put(opened(folder), SameMachine(), reader=reader)
    assert Path(same.inside).exists()
    same.remove()
    assert folder.exists()
    assert list(temporary.iterdir()) == []


def test_what_lies_in_the_shared_folder_is_read_from_there(folder: Path):
    reach = FolderReach(None, folder=folder.parent)
    made = put(opened(folder), reach, reader="server")
    assert str(made.inside) == f"/exchange/{folder.name}"
    made.remove()
    assert {f.name for f in folder.iterdir()} == {ONE, TWO}


def test_torch_files_are_for_servers_only(tmp_path: Path):
    path = tmp_path / "bin"
    path.mkdir()
    torch.save(WEIGHTS, path / "pytorch_model.bin")
    assert torch_files(opened(path)) is not None
    assert put(opened(path), SameMachine(), reader="server").inside == PurePosixPath(path)
    assert put(opened(path), SameMachine(), reader="peer").inside != PurePosixPath(path)
    torch.save({"model": WEIGHTS}, path / "pytorch_model.bin")
    assert torch_files(opened(path)) is None, "nobody but this project looks below 'model'"


@pytest.mark.parametrize("reach", [SameMachine(), None], ids=["same machine", "exchange folder"])
def test_a_full_disk_is_a_typed_error_and_leaves_nothing(
    reach: Any, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(file: Path, *_: object) -> None:
        file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "write_safetensors", full)
    torch.save(WEIGHTS, tmp_path / "trainer.pt")
    reach = reach or FolderReach(None, folder=temporary)
    with pytest.raises(NotPrepared, match="No space left on device"):
        put(opened(tmp_path / "trainer.pt"), reach, reader="server")
    assert list(temporary.iterdir()) == []


def test_a_dtype_that_safetensors_lacks_is_a_typed_error_and_leaves_nothing(
    tmp_path: Path, temporary: Path
):
    torch.save({"a": torch.ones(3, dtype=torch.complex128)}, tmp_path / "trainer.pt")
    with pytest.raises(ModelError, match="complex128"):
        put(opened(tmp_path / "trainer.pt"), SameMachine(), reader="server")
    assert list(temporary.iterdir()) == []


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_are_checked_without_a_model_too(tmp_path: Path, value: float):
    torch.save({"good": torch.ones(3), "bad": torch.tensor([1.0, value])}, tmp_path / "a.pt")
    with pytest.raises(CheckpointMismatch, match="bad") as raised:
        opened(tmp_path / "a.pt").raise_if_unusable()
    assert raised.value.names == ("bad",)


def test_what_passed_is_not_read_again_until_it_was_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[Path] = []
    whole = Fitted.raise_if_unusable
    monkeypatch.setattr(
        Fitted, "raise_if_unusable", lambda self: (read.append(self.path), whole(self))[1]
    )
    check = ValueCheck()
    for _ in range(3):
        check.check(opened(folder))
    assert read == [folder]
    safetensors.save_file({"c": torch.tensor([float("nan")])}, folder / TWO)
    for _ in range(2):
        with pytest.raises(CheckpointMismatch):
            check.check(opened(folder))
    assert len(read) == 3


def test_a_checkpoint_that_is_sent_as_it_is_has_one_content_with_and_without_a_model(
    half: tuple[Path, Path],
):
    """So that checksums computed for the one serve for the other."""
    model, other = half
    assert opened(model, model).content == open_checkpoint(model).content
    assert opened(other, model).content != open_checkpoint(other).content, "it is converted"
