"""What is written can be read, by this reader and by others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from every_tensor import assert_holds, contiguous, raw
from safetensors.torch import load_file

from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import (
    held,
    write_model,
    write_safetensors,
)
from sglang_harness.errors import ModelError


def test_what_is_written_tensor_by_tensor_the_library_reads(tmp_path: Path):
    whole = contiguous()
    write_safetensors(tmp_path / "a.safetensors", *held(whole))
    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(whole)
    for name, tensor in read.items():
        assert tensor.dtype == whole[name].dtype
        assert raw(tensor) == raw(whole[name])


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
    with pytest.raises(ModelError, match="announced"):
        write_safetensors(tmp_path / "a.safetensors", infos, other)
