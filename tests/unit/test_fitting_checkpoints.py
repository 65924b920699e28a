"""A checkpoint is held against the model before anything is sent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GemmaConfig, GemmaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sglang_harness.checkpoint.fitting import _renamed, fit
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import write_torch
from sglang_harness.errors import CheckpointMismatch, ModelError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.write(folder, 0)
    return folder


@pytest.fixture
def weights(model: Path) -> State:
    return load_file(model / "model.safetensors")


@pytest.fixture
def held_against(model: Path, tmp_path: Path) -> Callable:
    def held(content: object, folder: Path = model, **more: str):
        return fit(open_checkpoint(write_torch(tmp_path / "a.pt", content)), folder, **more)

    return held


def test_the_models_own_weights_fit_and_come_as_they_are(model: Path, weights: State):
    fitted = fit(open_checkpoint(model), model)
    fitted.raise_if_unfit()
    fitted.raise_if_not_finite()
    assert (fitted.missing, fitted.extra, fitted.misshaped) == ((), (), ())
    assert (dict(fitted.renamed), fitted.notes, dict(fitted.converted)) == ({}, (), {})
    got = dict(fitted.read())
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name]) for name in weights)
    assert fitted.nbytes == sum(t.nbytes for t in weights.values())
    assert [n for n, _ in fitted.read(["lm_head.weight"])] == ["lm_head.weight"]


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"model.{name}",
        lambda name: f"state_dict.{name}",
        lambda name: f"actor.model.{name}",
        lambda name: f"actor.{name.removeprefix('model.')}",
        lambda name: f"module.model._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
    ],
)
def test_names_and_dtypes_are_brought_to_what_the_model_expects(
    held_against: Callable, weights: State, rename: Callable[[str], str]
):
    fitted = held_against({"model": {rename(n): t.bfloat16() for n, t in weights.items()}})
    fitted.raise_if_unfit()
    got = dict(fitted.read())
    assert got.keys() == weights.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].bfloat16().float()), name
    rooms = {name: torch.ones_like(tensor) for name, tensor in got.items()}
    fitted.read_into(rooms.items())
    assert all(torch.equal(rooms[name], tensor) for name, tensor in got.items())
    assert any("from bfloat16 to float32" in note for note in fitted.notes)
    assert any("names changed" in note for note in fitted.notes) == bool(fitted.renamed)


def test_a_server_that_was_told_another_dtype_gets_it(held_against: Callable, weights: State):
    fitted = held_against(weights, dtype="bfloat16")
    assert {t.dtype for _, t in fitted.read()} == {torch.bfloat16}
    assert fitted.nbytes == sum(t.nbytes for t in weights.values()) // 2
    with pytest.raises(ModelError, match="int8"):
        held_against(weights, dtype="int8")


def refusal(fitted, **more) -> CheckpointMismatch:
    with pytest.raises(CheckpointMismatch) as caught:
        fitted.raise_if_unfit(**more)
    assert caught.value.advice
    return caught.value


def test_what_is_missing_extra_and_misshaped_is_told_with_both_sides(
    held_against: Callable, weights: State
):
    del weights["model.norm.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(2)
    weights["model.layers.0.input_layernorm.weight"] = torch.ones(64)
    weights["model.layers.1.input_layernorm.weight"] = torch.ones(128, dtype=torch.int64)
    fitted = held_against(weights)
    assert [t.name for t in fitted.missing] == ["model.norm.weight"]
    assert [t.name for t in fitted.extra] == ["model.layers.2.mlp.up_proj.weight"]
    assert {(m.name, m.expected, m.got) for m in fitted.misshaped} == {
        ("model.layers.0.input_layernorm.weight", "(128,) float32", "(64,) float32"),
        ("model.layers.1.input_layernorm.weight", "(128,) float32", "(128,) int64"),
    }
    error = refusal(fitted)
    assert len(error.names) == 4
    for told in ("1 missing", "1 extra", "2 of another shape or dtype", "(64,) float32"):
        assert told in str(error)
    # What does not fit is not among what would be sent.
    assert not set(error.names) & {name for name, _ in fitted.read()}
    # The rest can be allowed by name; a wrong shape cannot.
    assert len(refusal(fitted, allow=["model.norm.*", "model.layers.2.*"]).names) == 2


def test_missing_and_extra_can_be_allowed(held_against: Callable, weights: State):
    del weights["model.norm.weight"]
    weights["mtp.layer.weight"] = torch.ones(2)
    fitted = held_against(weights)
    assert len(refusal(fitted).names) == 2
    assert len(refusal(fitted, allow=["mtp.*"]).names) == 1
    fitted.raise_if_unfit(allow=["mtp.*", "model.norm.weight"])


def test_another_architecture_is_refused_with_the_first_five_names(
    model: Path, tmp_path: Path, held_against: Callable
):
    with torch.random.fork_rng():
        other = GemmaForCausalLM(
            GemmaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                vocab_size=100,
            )
        )
    error = refusal(held_against(other.state_dict()))
    assert len(error.names) > 5
    assert str(error).count("expected (") + str(error).count(" (extra, ") == 5
    assert all(name in str(error) for name in error.names[:5])
    assert f"and {len(error.names) - 5} more" in str(error)
    assert str(tmp_path / "a.pt") in str(error)


def test_a_deeper_model_is_not_cut_to_size(held_against: Callable, weights: State):
    deeper = dict(weights)
    for name, tensor in weights.items():
        deeper[name.replace("layers.1.", "layers.2.")] = tensor
    error = refusal(held_against(deeper))
    assert all(".layers.2." in name for name in error.names)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge"),
        ("model.layers.0._fsdp_wrapped_module._flat_param", "full state"),
        ("model.layers.0.mlp.experts.gate_up_proj", "save_pretrained"),
    ],
)
def test_what_is_extra_is_refused_with_its_own_cure(
    held_against: Callable, weights: State, name: str, cure: str
):
    weights[name] = torch.ones(2)
    assert cure in refusal(held_against(weights)).advice


def test_a_value_head_is_said_and_not_sent(held_against: Callable, weights: State):
    weights["v_head.summary.weight"] = torch.ones(2)
    fitted = held_against(weights)
    fitted.raise_if_unfit()
    assert any("v_head.summary.weight" in note for note in fitted.notes)
    assert "v_head.summary.weight" not in dict(fitted.read())


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_one_value_that_is_not_finite_is_found(
    held_against: Callable, weights: State, value: float, place: int
):
    weights["lm_head.weight"].view(-1)[place] = value
    fitted = held_against(weights)
    fitted.raise_if_unfit()
    (found,) = fitted.check_finite()
    nan = int(value != value)
    assert (found.name, found.nans, found.infinities) == ("lm_head.weight", nan, 1 - nan)
    assert found.values == weights["lm_head.weight"].numel()
    with pytest.raises(CheckpointMismatch, match=r"lm_head\.weight") as caught:
        fitted.raise_if_not_finite()
    assert caught.value.names == ("lm_head.weight",)


def test_what_only_the_models_dtype_cannot_hold_is_found(held_against: Callable, weights: State):
    weights["lm_head.weight"][0, 0] = 1e6
    held_against(weights).raise_if_not_finite()
    (found,) = held_against(weights, dtype="float16").check_finite()
    assert (found.name, found.infinities) == ("lm_head.weight", 1)


# --- tied weights -------------------------------------------------------------------------------


@pytest.fixture
def tied(model: Path, tmp_path: Path) -> Path:
    """The tiny model with one matrix for both ends, as transformers writes it."""
    folder = tmp_path / "tied"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    (folder / "model.safetensors").unlink()
    write_torch(folder / "pytorch_model.bin", state)
    return folder


@pytest.mark.parametrize("only_config", [False, True])
def test_tied_weights_may_come_once_or_twice(
    held_against: Callable, weights: State, tied: Path, only_config: bool
):
    if only_config:
        (tied / "pytorch_model.bin").unlink()
    once = {name: t for name, t in weights.items() if name != "lm_head.weight"}
    held_against(once, tied).raise_if_unfit()
    twice = once | {"lm_head.weight": once["model.embed_tokens.weight"]}
    fitted = held_against(twice, tied)
    fitted.raise_if_unfit()
    fitted.raise_if_not_finite()
    assert dict(fitted.read()).keys() == once.keys()
    assert any("ties it to" in note for note in fitted.notes)
    # A trainer that kept the other name.
    other = {n: t for n, t in twice.items() if n != "model.embed_tokens.weight"}
    fitted = held_against(other, tied)
    fitted.raise_if_unfit()
    got = dict(fitted.read())["model.embed_tokens.weight"]
    assert torch.equal(got, once["model.embed_tokens.weight"])


def test_a_copy_that_is_none_is_refused(held_against: Callable, weights: State, tied: Path):
    fitted = held_against(weights, tied)
    assert fitted.check_tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(CheckpointMismatch, match="ties them"):
        fitted.raise_if_not_finite()


def test_an_untied_model_misses_its_output(held_against: Callable, weights: State):
    del weights["lm_head.weight"]
    assert refusal(held_against(weights)).names == ("lm_head.weight",)


# --- what is expected ---------------------------------------------------------------------------


def test_a_folder_without_weights_is_asked_by_its_configuration(
    model: Path, tmp_path: Path, weights: State, held_against: Callable
):
    (tmp_path / "bare").mkdir()
    shutil.copy(model / "config.json", tmp_path / "bare")
    fitted = held_against(weights, tmp_path / "bare")
    fitted.raise_if_unfit()
    assert dict(fitted.expected.tensors) == dict(open_checkpoint(model).tensors)
    assert "config.json" in fitted.expected.source


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=100,
    )
    with torch.random.fork_rng():
        return Qwen3MoeForCausalLM(config)


def test_a_mixtures_experts_are_expected_as_they_are_on_disk(
    mixture: Qwen3MoeForCausalLM, tmp_path: Path
):
    mixture.save_pretrained(tmp_path / "saved")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "saved" / "config.json", tmp_path / "bare")
    for folder in ("saved", "bare"):
        fitted = fit(open_checkpoint(tmp_path / "saved"), tmp_path / folder)
        fitted.raise_if_unfit()
        assert "model.layers.0.mlp.experts.3.gate_proj.weight" in fitted.sources
    if "model.layers.0.mlp.experts.gate_up_proj" in mixture.state_dict():  # transformers 5
        file = write_torch(tmp_path / "memory.pt", mixture.state_dict())
        error = refusal(fit(open_checkpoint(file), tmp_path / "saved"))
        assert "save_pretrained" in error.advice


@pytest.mark.parametrize(
    "config", [None, "{", "[]", '{"model_type": "no such"}', '{"architectures": ["X"]}']
)
def test_a_folder_that_expects_nothing_is_refused(
    tmp_path: Path, weights: State, held_against: Callable, config: str | None
):
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json|does not describe a model"):
        held_against(weights, folder)


PART = st.sampled_from(["model", "layers", "0", "1", "mlp", "norm", "weight", "bias"])
NAME = st.lists(PART, min_size=1, max_size=5).map(".".join)


@settings(max_examples=300, deadline=None)
@given(
    have=st.lists(NAME, unique=True, max_size=12), wanted=st.lists(NAME, unique=True, max_size=12)
)
def test_renaming_never_gives_one_name_twice_nor_takes_a_known_one_away(
    have: list[str], wanted: list[str]
):
    names = _renamed(have, dict.fromkeys(wanted))
    assert set(names) <= set(have)
    assert set(names.values()) <= set(wanted)
    assert len(set(names.values())) == len(names)
    for name in set(have) & set(wanted):
        assert names[name] == name
