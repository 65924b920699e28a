"""A model computed from its files layer by layer, beside the same model held in memory."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_harness.checkpoint.footprint import FLOAT32, Size
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.streaming import NotStreamable, streamed
from sglang_harness.errors import BrokenCheckpoint

IDS = [[45, 74, 81, 81, 84, 104, 17, 200]]


def in_dtype(folder: Path, dtype: str, target: Path, **how: Any) -> Path:
    """The model in another dtype, which its values are rounded to."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(target, **how)
    return target


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor(IDS)).logits
        return found


def held(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", sorted(tiny.ARCHITECTURES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_architecture_and_dtype_computes_the_same_to_the_bit(
    tmp_path: Path, architecture: str, dtype: str
):
    """In float32, whatever the weights are saved in; tied weights and stacked experts too."""
    tiny.write(tmp_path / "float32", 3, architecture)
    folder = tmp_path / dtype
    if dtype != "float32":
        in_dtype(tmp_path / "float32", dtype, folder)
    read = streamed(folder)
    for _ in range(2):  # the second time in memory that was used before
        answer = logits(read)
        assert answer.dtype is torch.float32
        assert torch.equal(answer, logits(held(folder)))


def test_shards_are_read_as_one_model(tmp_path: Path):
    tiny.write(tmp_path / "one", 4)
    folder = in_dtype(tmp_path / "one", "bfloat16", tmp_path / "several", max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(logits(streamed(folder)), logits(held(folder)))


def test_no_weight_is_in_memory_before_and_after_and_little_of_them_between(tmp_path: Path):
    tiny.write(tmp_path / "model", 5, "qwen3-moe")
    read = streamed(tmp_path / "model")
    assert all(parameter.is_meta for parameter in read.parameters())
    most: list[int] = []

    def look(*_: Any) -> None:
        most.append(sum(p.numel() for p in read.parameters() if not p.is_meta))

    for module in read.modules():
        module.register_forward_hook(look)
    logits(read)
    assert all(parameter.is_meta for parameter in read.parameters())
    size = Size.of_folder(tmp_path / "model")
    assert 0 < max(most) <= size.part < size.parameters


def test_memory_comes_back_with_the_model_and_not_at_some_later_time(tmp_path: Path):
    tiny.write(tmp_path / "model", 6)
    read = streamed(tmp_path / "model")
    logits(read)
    inner = weakref.ref(read.model.layers[0])
    gc.disable()
    try:
        del read
        assert inner() is None
    finally:
        gc.enable()


def test_a_checkpoint_that_was_written_to_meanwhile_is_an_error_and_no_other_model(
    tmp_path: Path,
):
    tiny.write(tmp_path / "model", 7)
    tiny.write(tmp_path / "other", 8)
    read = streamed(tmp_path / "model")
    before = logits(read)
    shutil.copyfile(
        tmp_path / "other" / "model.safetensors", tmp_path / "model" / "model.safetensors"
    )
    with pytest.raises(BrokenCheckpoint, match="written to"):
        logits(read)
    # And nothing of the pass that failed stays.
    assert all(parameter.is_meta for parameter in read.parameters())
    assert before.shape == logits(streamed(tmp_path / "model")).shape


def test_quantised_weights_and_unknown_names_have_to_be_held(tmp_path: Path):
    tiny.write(tmp_path / "model", 9)
    config = tmp_path / "model" / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps({**plain, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(NotStreamable, match="quantised"):
        streamed(tmp_path / "model")
    config.write_text(json.dumps({**plain, "intermediate_size": 12}))
    with pytest.raises(NotStreamable, match="another form"):
        streamed(tmp_path / "model")


def test_the_memory_that_is_announced_is_that_of_the_largest_layer_and_the_embeddings(
    tmp_path: Path,
):
    tiny.write(tmp_path / "model", 10)
    model = held(tmp_path / "model")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    embeddings = model.lm_head.weight.numel()
    norm = model.model.norm.weight.numel()
    part = Size.of_folder(tmp_path / "model").part
    assert layer + embeddings <= part <= layer + embeddings + norm
    assert FLOAT32 * part < sum(p.numel() for p in model.parameters()) * FLOAT32
