"""Random Llamas in bfloat16 of the size that GPUs are used for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_harness._base.permissions import check_readable
from sglang_harness.checkpoint import check_folder, locate
from sglang_harness.checkpoint.footprint import Size
from sglang_harness.checkpoint.made import random_llama
from sglang_harness.errors import ModelError
from sglang_harness.oracle import Oracle


def quietly(_: str) -> None:
    return None


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_HARNESS_CACHE", str(folder))
        yield folder


def made(name: str) -> Path:
    folder = locate(name, quietly)
    assert folder is not None
    return folder


def test_a_name_is_a_size_and_a_seed():
    assert random_llama.named("random-1.2b") == ("1.2b", 0)
    assert random_llama.named("random-3b:7") == ("3b", 7)
    for other in ("random", "random-", "random-2b", "random-3b:x", "random-3b:", "tiny", "a/b"):
        assert random_llama.named(other) is None


def test_a_size_that_there_is_not_is_refused_and_those_that_there_are_are_named():
    with pytest.raises(ModelError, match=r"random-1\.2b"):
        locate("random-2b", quietly)


@pytest.mark.parametrize(("size", "billions"), [("1.2b", 1.2), ("3b", 2.8)])
def test_the_sizes_are_those_that_the_names_say(size: str, billions: float):
    infos = random_llama.described(random_llama.SHAPES[size], 400)
    assert sum(math.prod(info.shape) for info in infos) / 1e9 == pytest.approx(billions, rel=0.03)


def test_it_is_a_whole_checkpoint_in_bfloat16_that_every_user_can_read():
    folder = made("random-small")
    assert made("random-small:0") == folder
    check_folder(folder)
    check_readable(folder)
    config = json.loads((folder / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == config["architectures"][0] == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert max(tokenizer.encode("Wörter  and\nnumbers 12")) < config["vocab_size"]
    assert Size.of_folder(folder).bytes_per_weight == 2


def test_a_seed_gives_the_same_values_again_and_another_seed_others_in_every_tensor(tmp_path: Path):
    one = load_file(made("random-small") / "model.safetensors")
    random_llama.write(tmp_path / "again", random_llama.SHAPES["small"], 0)
    again = load_file(tmp_path / "again" / "model.safetensors")
    other = load_file(made("random-small:1") / "model.safetensors")
    assert one.keys() == again.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], again[name])] == []
    assert [name for name in one if torch.equal(one[name], other[name])] == []


def test_answers_are_clear_and_are_not_one_word_again_and_again():
    """Else a server in half precision would be judged by near-ties."""
    oracle = Oracle(made("random-small"))
    ids = oracle.encode("The capital of France is")
    for _ in range(16):
        scored = oracle.next_token_probabilities(ids)
        ids.append(scored.index(max(scored)))
    scores = oracle.score(ids[:-16], ids[-16:])
    assert scores.logprobs == scores.best_logprobs
    assert len(set(ids[-16:])) > 8
    assert sorted(scores.logprobs)[8] > math.log(1e-1)
