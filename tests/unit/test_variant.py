"""The second checkpoint that checks push: once on disk, or refused before anything is written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_harness import oracle as oracles
from sglang_harness._base import headroom
from sglang_harness._base.temporary import RECORD
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.made.perturb import strength_for
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import write_torch
from sglang_harness.errors import NotEnoughRoom
from sglang_harness.runtime.path_map import FolderReach
from sglang_harness.suite.check import Context
from sglang_harness.suite.checks.weights import pushes
from sglang_harness.suite.checks.weights.disk import Variant, variant


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny.write(folder, 11)
    return folder


@pytest.fixture
def context(model: Path, tmp_path: Path) -> Iterator[Context]:
    """Of a server that sees a folder of this machine."""
    reach = FolderReach(model)
    client = SimpleNamespace(server_info=lambda: {"dtype": "float32"})
    server: Any = SimpleNamespace(
        model=model, spec=SimpleNamespace(model=str(model)), reach=reach, client=client
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    oracles.forget()
    yield Context(server, 5, lambda **_: pytest.fail("no server of its own is asked for"), scratch)
    oracles.forget()
    reach.close()


def test_it_is_made_once_and_takes_its_disk_once(context: Context, model: Path):
    """It was written to the scratch folder, and copied once more for the server."""
    made = variant(context)
    assert variant(context) is made
    reach: Any = context.server.reach
    seen_by_the_server = reach.folder / PurePosixPath(made.inside).name / "model.safetensors"
    assert seen_by_the_server.samefile(made.folder / "model.safetensors")
    assert made.bytes == (model / "model.safetensors").stat().st_size
    new, old = open_checkpoint(made.folder), open_checkpoint(model)
    assert new.tensors == old.tensors
    assert not any(torch.equal(a, b) for (_, a), (_, b) in zip(new.read(), old.read(), strict=True))


def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "memory", lambda: headroom.Memory(1000, "this machine"))


def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "disk", lambda folder: headroom.DiskRoom(folder, 1000, False))


@pytest.mark.parametrize(
    ("lacking", "said"),
    [(_no_memory, "The reference model of"), (_no_disk, "The second checkpoint of")],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    lacking: Callable[[pytest.MonkeyPatch], None],
    said: str,
):
    lacking(monkeypatch)
    with pytest.raises(NotEnoughRoom, match=said):
        variant(context)
    assert list(context.scratch.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_stays(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    """Once by another process; the next check can try again."""

    def full(_: Path) -> PurePosixPath:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(context.server.reach, "share", full)
        with pytest.raises(NotEnoughRoom, match="The disk was full"):
            variant(context)
    assert list(context.scratch.iterdir()) == []
    assert isinstance(variant(context), Variant)


def test_what_was_shared_goes_where_its_reference_model_cannot_be_loaded(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    _ = context.oracle

    def refused(_: Path) -> None:
        raise NotEnoughRoom("no memory any more")

    monkeypatch.setattr(oracles, "for_folder", refused)
    with pytest.raises(NotEnoughRoom):
        variant(context)
    assert list(context.scratch.iterdir()) == []
    reach: Any = context.server.reach
    assert [p.name for p in reach.folder.iterdir()] == [RECORD]


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_model_too_large_to_be_trained_is_found_whatever_its_files_are(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, layout: str
):
    """A model of 140 GB in .bin files counted as 0 bytes, and was small enough."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    if layout == "bin":
        state = dict(open_checkpoint(model).read())
        write_torch(folder / "pytorch_model.bin", state)
        (folder / "model.safetensors").unlink()
    server = SimpleNamespace(model=folder)
    size = open_checkpoint(model).nbytes
    monkeypatch.setattr(pushes, "TRAINABLE_BYTES", size)
    assert pushes.SMALL_MODEL.lacking(server) is None  # type: ignore[arg-type]
    monkeypatch.setattr(pushes, "TRAINABLE_BYTES", size - 1)
    reason = pushes.SMALL_MODEL.lacking(server)  # type: ignore[arg-type]
    assert reason is not None
    assert "takes too long" in reason


@pytest.mark.parametrize(
    ("dtype", "strength"),
    [
        ("float32", 0.05),
        ("torch.float32", 0.05),
        ("bfloat16", 0.2),
        ("float16", 0.2),
        ("auto", 0.2),
    ],
)
def test_noise_is_stronger_where_a_bound_is_wider(dtype: str, strength: float):
    """Else old and new weights cannot be told apart within the bound of half precision."""
    assert strength_for(dtype) == strength
