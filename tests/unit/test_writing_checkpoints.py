"""What is written can be read, by this reader and by others."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from every_tensor import assert_holds, contiguous, raw
from safetensors.torch import load_file

from sglang_harness._base import headroom
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import (
    copy_all_but_weights,
    held,
    write_model,
    write_safetensors,
)
from sglang_harness.errors import ModelError, NotEnoughRoom


def test_what_is_written_tensor_by_tensor_the_library_reads(tmp_path: Path):
    whole = contiguous()
    write_safetensors(tmp_path / "a.safetensors", *held(whole))
    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(whole)
    for name, tensor in read.items():
        assert tensor.dtype == whole[name].dtype
        assert raw(tensor) == raw(whole[name])


def test_an_open_checkpoint_is_written_anew_whatever_describes_its_tensors(tmp_path: Path):
    """What a push describes is not a ``TensorInfo``, and is written all the same."""
    whole = contiguous()
    write_safetensors(tmp_path / "a.safetensors", *held(whole))
    opened = open_checkpoint(tmp_path / "a.safetensors")
    described = [
        SimpleNamespace(name=i.name, dtype=i.dtype, shape=list(i.shape), nbytes=i.nbytes)
        for i in opened.tensors.values()
    ]
    write_safetensors(tmp_path / "b.safetensors", described, opened.read)
    assert_holds(open_checkpoint(tmp_path / "b.safetensors"), whole)


def test_everything_but_weights_goes_with_a_model(tmp_path: Path):
    model, made = tmp_path / "model", tmp_path / "made"
    for folder in (model / "inner", made):
        folder.mkdir(parents=True)
    weights = ("a.safetensors", "a.bin", "a.pt", "a.pth", "a.gguf", "a.index.json", ".metadata")
    for name in (*weights, "config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    copy_all_but_weights(model, made)
    assert {file.name for file in made.iterdir()} == {"config.json", "tokenizer.json"}


def test_a_model_is_written_in_shards_with_an_index(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"old weights")
    whole = contiguous()
    made = write_model(model, tmp_path / "made", *held(whole), shard_bytes=1000)
    shards = sorted(made.glob("*.safetensors"))
    assert len(shards) > 1
    assert {f.name for f in made.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        *(shard.name for shard in shards),
    }
    assert_holds(open_checkpoint(made), whole)
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    with pytest.raises(FileExistsError):
        write_model(model, made, *held(whole))


def test_a_source_that_gives_something_else_than_it_said_is_not_written_down(tmp_path: Path):
    infos, _ = held({"a": torch.ones(2)})
    _, other = held({"a": torch.ones(3)})
    with pytest.raises(ModelError, match="expected the tensor"):
        write_safetensors(tmp_path / "a.safetensors", infos, other)


def test_a_file_that_the_disk_has_no_space_for_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(headroom, "disk", lambda folder: headroom.DiskRoom(folder, 100, False))
    with pytest.raises(NotEnoughRoom, match=r"Writing .*a\.safetensors needs"):
        write_safetensors(tmp_path / "a.safetensors", *held({"a": torch.ones(200)}))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path):
    """Half a checkpoint stayed, and stood in the way of the next try."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    infos, whole = held({"a": torch.ones(2)})

    def full(_: object) -> Iterator[tuple[str, torch.Tensor]]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NotEnoughRoom, match="The disk was full") as refused:
        write_model(model, tmp_path / "made", infos, full)
    assert "TMPDIR" in refused.value.advice
    assert not (tmp_path / "made").exists()
    write_model(model, tmp_path / "made", infos, whole)
