"""What was cut short, damaged or made to mislead is refused, and nothing else happens."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from every_tensor import contiguous, state
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import (
    write_distributed,
    write_torch,
)
from sglang_harness.errors import BrokenCheckpoint, ModelError


@functools.cache
def whole_file(name: str) -> bytes:
    """A file of each format. No fixture: hypothesis would print all of them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        if name == "a.safetensors":
            save_file(contiguous(), file)
        else:
            write_torch(file, state())
        return file.read_bytes()


@pytest.mark.parametrize("name", ["a.safetensors", "zip.pt"])
@pytest.mark.parametrize("left", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused_when_it_is_opened(
    tmp_path: Path, name: str, left: float
):
    content = whole_file(name)
    (tmp_path / name).write_bytes(content[: int(len(content) * left)])
    with pytest.raises(BrokenCheckpoint) as caught:
        open_checkpoint(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_distributed_file_that_was_cut_short_is_refused_when_it_is_opened(tmp_path: Path):
    folder = write_distributed(tmp_path / "dcp", contiguous())
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(BrokenCheckpoint, match="cut short"):
        open_checkpoint(folder)
    metadata = folder / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-20])
    with pytest.raises(BrokenCheckpoint, match="broken"):
        open_checkpoint(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(["a.safetensors", "zip.pt"]),
    place=st.floats(0, 1, exclude_max=True),
    replacement=st.binary(min_size=1, max_size=8),
)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    place: float,
    replacement: bytes,
):
    content = bytearray(whole_file(name))
    at = int(place * len(content))
    content[at : at + len(replacement)] = replacement
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(content)
    try:
        opened = open_checkpoint(file)
        got = list(opened.read())
    except ModelError as error:
        message = str(error)
        event("refused")
    else:
        message = ""
        assert len(got) == len(opened.tensors)
    assert "\n" not in message


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32"}},
        {"a": None},
        [],
        None,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any):
    told = json.dumps(header).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(told).to_bytes(8, "little") + told + bytes(8))
    with pytest.raises(BrokenCheckpoint):
        open_checkpoint(file)


def test_a_view_that_is_larger_than_what_is_stored_is_no_reason_to_take_memory(tmp_path: Path):
    file = write_torch(tmp_path / "a.pt", {"a.b": torch.ones(1).expand(1 << 40)})
    with pytest.raises(ModelError, match="expanded view") as caught:
        open_checkpoint(file)
    assert "contiguous()" in caught.value.advice


def test_tensors_without_values_are_refused(tmp_path: Path):
    file = write_torch(tmp_path / "a.pt", {"a.b": torch.empty(2, device="meta")})
    with pytest.raises(ModelError, match="without its values"):
        open_checkpoint(file)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(BrokenCheckpoint, match="lacks b"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ModelError, match="lacks"):
        open_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(BrokenCheckpoint, match="index"):
        open_checkpoint(tmp_path)
