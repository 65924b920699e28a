"""Tiny models of every architecture, the adapters for them, and the oracle of both."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_harness._base.permissions import check_readable
from sglang_harness.checkpoint import check_folder, locate
from sglang_harness.checkpoint.made import lora, tiny
from sglang_harness.errors import ModelError
from sglang_harness.oracle import Oracle

NAMES = [name for name in tiny.NAMES if name != "tiny"]
PROMPTS = ("The capital of France is", "def fibonacci(n):")


def quietly(_: str) -> None:
    return None


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own, and one thread: more would only wait for one another."""
    folder = tmp_path_factory.mktemp("cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_HARNESS_CACHE", str(folder))
        yield folder
    torch.set_num_threads(threads)


def made(name: str) -> Path:
    folder = locate(name, quietly)
    assert folder is not None
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def greedy(model: object, ids: list[int], count: int) -> torch.Tensor:
    """Log-probabilities of every token at ``count`` places after ``ids``."""
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[0]  # type: ignore[operator]
            ids = [*ids, int(logits[-1].argmax())]
    return torch.log_softmax(logits[-count:].float(), dim=-1)


@pytest.mark.parametrize("name", NAMES)
def test_each_architecture_is_a_whole_checkpoint_of_its_own(name: str):
    folder = made(name)
    assert made(f"{name}:0") == folder
    assert folder != made("tiny")
    check_folder(folder)
    check_readable(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [tiny.ARCHITECTURES[name.removeprefix("tiny-")]]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    # Nothing was made up that the file lacks, and nothing in the file was passed over.
    assert type(model).__name__ == config["architectures"][0]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Wörter  and\nnumbers 12"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < config["vocab_size"]


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_gives_other_values_in_every_tensor(name: str):
    one, other = weights(made(name)), weights(made(f"{name}:1"))
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {
        n: (t.shape, t.dtype) for n, t in other.items()
    }
    # Biases and norms too: a server that left them out must be found out.
    assert [n for n in one if torch.equal(one[n], other[n])] == []
    assert all(t.dtype == torch.float32 for t in one.values())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_answers_are_clear_and_are_not_one_word_again_and_again(name: str):
    folder = made(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    gaps: list[float] = []
    for prompt in PROMPTS:
        logprobs = greedy(model, tokenizer.encode(prompt), 16)
        best = logprobs.topk(2).values
        gaps += (best[:, 0] - best[:, 1]).tolist()
        assert len(set(logprobs.argmax(dim=-1).tolist())) > 8
    # In nats; a server's float32 is off by a few millionths.
    assert sorted(gaps)[len(gaps) // 2] > 0.1
    assert sum(gap < 1e-3 for gap in gaps) <= 1


@pytest.mark.parametrize("name", ["tiny-qwen3-moe", "tiny-mixtral"])
def test_no_tokens_experts_are_chosen_by_a_near_tie(name: str):
    """The outputs of a router are logits: the second and third must not be as good as one another
    where both count."""
    folder = made(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen: list[torch.Tensor] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        seen.append(hidden @ module.weight.T)  # type: ignore[operator,union-attr]

    gates = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    assert len(gates) == 2
    for gate in gates:
        gate.register_forward_hook(look)
    for prompt in PROMPTS:
        greedy(model, tokenizer.encode(prompt), 8)
    logits = torch.cat(seen)
    assert logits.shape[1] == 4
    best = logits.sort(dim=-1, descending=True).values
    gap, weight = best[:, 1] - best[:, 2], torch.softmax(best[:, :2], dim=-1)[:, 1]
    assert float((gap / weight).min()) > 1e-3
    # And the choice is one: every expert is somebody's best.
    assert set(logits.argmax(dim=-1).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "name", ["tiny-", "tiny-gpt2", "tiny-qwen2:", "tiny-qwen2:x", "tiny-llama"]
)
def test_an_architecture_that_there_is_not_is_refused_and_those_that_there_are_are_named(name: str):
    with pytest.raises(ModelError, match="tiny-qwen3-moe"):
        locate(name, quietly)


# --- adapters -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> Path:
    return made("tiny")


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora.made(base, tmp_path_factory.mktemp("adapters") / "one", 1)


def test_an_adapter_is_the_same_for_the_same_seed_and_another_for_another(
    base: Path, folder: Path, tmp_path: Path
):
    file = "adapter_model.safetensors"
    again, other = lora.made(base, tmp_path / "a", 1), lora.made(base, tmp_path / "b", 2)
    assert (again / file).read_bytes() == (folder / file).read_bytes()
    assert (other / file).read_bytes() != (folder / file).read_bytes()
    check_readable(folder)


def test_an_adapter_has_two_full_sides_for_each_projection_of_each_layer(folder: Path):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(lora.TARGETS) * 2
    assert all(t.dtype == torch.float32 and float(t.std()) > 0 for t in tensors.values())
    for name, tensor in tensors.items():
        assert lora.RANK in tensor.shape, name


def test_the_oracle_of_an_adapter_adds_what_the_adapter_says_by_hand(base: Path, folder: Path):
    ids, output = [5, 6, 7, 8], [9, 10, 11]
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    scale = config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for name in [n for n in tensors if ".lora_A." in n]:
            change = scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            plain = name.removeprefix("base_model.model.").replace(".lora_A", "")
            parameters[plain].add_(change)
        logits = model(torch.tensor([[*ids, *output]])).logits[0, len(ids) - 1 : -1]
    by_hand = torch.log_softmax(logits, dim=-1)[range(3), output].tolist()
    scored = Oracle(base, adapter=folder).score(ids, output)
    assert scored.logprobs == pytest.approx(by_hand, abs=1e-5)
    # Far enough from the base that nobody mistakes one for the other.
    plain_scores = Oracle(base).score(ids, output).logprobs
    assert max(abs(a - b) for a, b in zip(scored.logprobs, plain_scores, strict=True)) > 0.1


def test_an_adapter_travels_with_its_values_and_nothing_else(folder: Path):
    config, payloads = lora.in_request(folder, ranks=2)
    assert config["peft_type"] == "LORA"
    assert len(payloads) == 2
    tensors = load_file(folder / "adapter_model.safetensors")
    for payload in payloads:
        sent = pickle.loads(base64.b64decode(payload))
        assert sent.keys() == tensors.keys()
        assert all(torch.equal(sent[name], tensors[name]) for name in tensors)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert len(base64.b64decode(payloads[0])) < 1.5 * size


def test_what_is_no_adapter_is_refused_in_one_line(base: Path, tmp_path: Path):
    for attempt in (
        lambda: lora.in_request(tmp_path),
        lambda: lora.made(tmp_path, tmp_path / "made", 0),
        lambda: Oracle(base, adapter=tmp_path),
    ):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
