"""Which checksums a server must state: its layout and its hash, computed here."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from sglang_harness.weights.proof.checksums import ServedLayout, expected_checksums
from sglang_harness.weights.proof.fused_layout import MISSING, layout, unknown

torch = pytest.importorskip("torch")

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "float32",
}
L = "model.layers.0."


class Held:
    """A checkpoint in memory."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def read(self, names):
        return ((name, self.tensors[name]) for name in names)


def drawn(*shape: int) -> Any:
    drawn.count = getattr(drawn, "count", 0) + 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(drawn.count))


def llama() -> dict[str, Any]:
    return {
        "model.embed_tokens.weight": drawn(100, 8),
        L + "self_attn.q_proj.weight": drawn(16, 8),
        L + "self_attn.k_proj.weight": drawn(8, 8),
        L + "self_attn.v_proj.weight": drawn(8, 8),
        L + "self_attn.o_proj.weight": drawn(8, 16),
        L + "mlp.gate_proj.weight": drawn(12, 8),
        L + "mlp.up_proj.weight": drawn(12, 8),
        L + "mlp.down_proj.weight": drawn(8, 12),
        L + "input_layernorm.weight": drawn(8),
        "model.norm.weight": drawn(8),
        "lm_head.weight": drawn(100, 8),
    }


def made(tensors: dict[str, Any], ranks: int, config: dict[str, Any] = CONFIG) -> list[Any]:
    """Every rank's parameters."""
    how = layout(config, tensors, ranks)
    return [
        {n: r.make([tensors[p] for p in r.parts], rank) for n, r in how.recipes.items()}
        for rank in range(ranks)
    ]


def test_one_rank_holds_the_parts_one_after_another():
    t = llama()
    (got,) = made(t, 1)
    q, k, v = (t[L + f"self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(got[L + "self_attn.qkv_proj.weight"], torch.cat([q, k, v]))
    gate, up = (t[L + f"mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(got[L + "mlp.gate_up_proj.weight"], torch.cat([gate, up]))
    assert torch.equal(got[L + "mlp.down_proj.weight"], t[L + "mlp.down_proj.weight"])
    assert torch.equal(got["model.norm.weight"], t["model.norm.weight"])
    assert set(got) == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
        *(L + n for n in (
            "self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight",
            "mlp.down_proj.weight", "input_layernorm.weight",
        )),
    }  # fmt: skip


def test_a_vocabulary_is_filled_up_with_zeros():
    t = llama()
    (got,) = made(t, 1)
    words = got["model.embed_tokens.weight"]
    assert words.shape == (128, 8)
    assert torch.equal(words[:100], t["model.embed_tokens.weight"])
    assert not words[100:].any()
    first, second = (rank["lm_head.weight"] for rank in made(t, 2))
    assert torch.equal(torch.cat([first, second])[:100], t["lm_head.weight"])
    assert first.shape == second.shape == (64, 8)


def test_two_ranks_share_heads_columns_and_rows():
    t = llama()
    for rank, got in enumerate(made(t, 2)):
        q, k, v = (t[L + f"self_attn.{x}_proj.weight"] for x in "qkv")
        own = [q[8 * rank :][:8], k[4 * rank :][:4], v[4 * rank :][:4]]
        assert torch.equal(got[L + "self_attn.qkv_proj.weight"], torch.cat(own))
        o = t[L + "self_attn.o_proj.weight"]
        assert torch.equal(got[L + "self_attn.o_proj.weight"], o[:, 8 * rank :][:, :8])
        gate, up = (t[L + f"mlp.{x}_proj.weight"] for x in ("gate", "up"))
        own = [gate[6 * rank :][:6], up[6 * rank :][:6]]
        assert torch.equal(got[L + "mlp.gate_up_proj.weight"], torch.cat(own))


def test_more_ranks_than_heads_of_keys_hold_the_same_ones():
    t = llama()
    ranks = made(t, 4)
    k = t[L + "self_attn.k_proj.weight"]
    keys = [rank[L + "self_attn.qkv_proj.weight"][4:8] for rank in ranks]
    assert torch.equal(keys[0], k[:4])
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(keys[3], k[4:])


@pytest.mark.parametrize(
    ("kind", "block", "names"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_are_stacked(kind: str, block: str, names: tuple[str, str, str]):
    gate, up, down = names
    before = f"{L}{block}"
    t: dict[str, Any] = {f"{before}.gate.weight": drawn(3, 8)}
    for expert in range(3):
        t[f"{before}.experts.{expert}.{down}.weight"] = drawn(8, 6)
        t[f"{before}.experts.{expert}.{up}.weight"] = drawn(6, 8)
        t[f"{before}.experts.{expert}.{gate}.weight"] = drawn(6, 8)
    first, second = made(t, 2, {**CONFIG, "model_type": kind})
    assert set(first) == {f"{before}.{n}" for n in (
        "gate.weight", "experts.w13_weight", "experts.w2_weight",
    )}  # fmt: skip
    assert first[f"{before}.experts.w13_weight"].shape == (3, 6, 8)
    one = t[f"{before}.experts.1.{up}.weight"]
    assert torch.equal(second[f"{before}.experts.w13_weight"][1, 3:], one[3:])
    assert torch.equal(
        first[f"{before}.experts.w2_weight"][2], t[f"{before}.experts.2.{down}.weight"][:, :3]
    )


def test_tied_and_computed_tensors_are_of_no_parameter():
    t = {**llama(), L + "self_attn.rotary_emb.inv_freq": drawn(4)}
    how = layout({**CONFIG, "tie_word_embeddings": True}, t, 1)
    assert how.ignored == ("lm_head.weight", L + "self_attn.rotary_emb.inv_freq")
    assert "lm_head.weight" not in how.recipes


def test_a_part_of_a_parameter_is_known_to_be_one():
    names = [L + "self_attn.q_proj.weight", L + "mlp.up_proj.weight", "model.norm.weight"]
    how = layout(CONFIG, names, 1)
    assert MISSING in how.recipes[L + "self_attn.qkv_proj.weight"].parts
    expected = expected_checksums(
        Held({n: drawn(4, 4) for n in names}), ServedLayout(CONFIG, {"dtype": "float32"}, "cpu")
    )
    assert expected.partly == {L + "self_attn.qkv_proj.weight", L + "mlp.gate_up_proj.weight"}
    assert set(expected.ranks[0]) == {"model.norm.weight"}


@pytest.mark.parametrize(
    ("config", "about", "words"),
    [
        ({"model_type": "gpt2"}, {}, "'gpt2'"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, {}, "quantised"),
        ({"model_type": "llama"}, {"quantization": "fp8"}, "quantised"),
        ({"model_type": "qwen3_moe"}, {"ep_size": 2}, "ep_size 2"),
        ({"model_type": "llama"}, {"pp_size": 2}, "pp_size 2"),
        ({"model_type": "llama"}, {"enable_dp_attention": True}, "attention"),
    ],
)
def test_what_is_not_known_is_said(config, about, words):
    assert words in (unknown(config, about) or "")


def test_what_is_known():
    assert unknown({"model_type": "llama"}, {"tp_size": 2, "ep_size": 1}) is None


@pytest.mark.parametrize(
    ("asked", "own", "dtype"),
    [
        ("float32", "bfloat16", "float32"),
        ("half", "bfloat16", "float16"),
        ("auto", "torch.bfloat16", "bfloat16"),
        ("auto", "float32", "float16"),
    ],
)
def test_the_dtype_that_a_server_holds(asked, own, dtype):
    assert ServedLayout({"torch_dtype": own}, {"dtype": asked}, "cpu").dtype == dtype


def test_checksums_are_of_the_servers_dtype():
    weight = drawn(8)
    served = ServedLayout({**CONFIG, "dtype": "float32"}, {"dtype": "bfloat16"}, "cpu")
    (rank,) = expected_checksums(Held({"model.norm.weight": weight}), served).ranks
    data = weight.bfloat16().view(torch.uint8).numpy().tobytes()
    assert rank == {"model.norm.weight": hashlib.sha256(data).hexdigest()[:16]}
