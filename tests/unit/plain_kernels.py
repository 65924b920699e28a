"""SGLang's kernels as plain torch computes them, each in another way than the reference that it is
compared with: importing this module puts them where SGLang has them."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x.double(), (x.shape[-1],), weight.double(), eps).to(x.dtype)


def fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    total = x.double() + residual.double()
    x.copy_(functional.rms_norm(total, (x.shape[-1],), weight.double(), eps))
    residual.copy_(total)


def fused_inplace_qknorm(
    q: torch.Tensor,
    k: torch.Tensor,
    of_q: torch.Tensor,
    of_k: torch.Tensor,
    eps: float,
    *,
    head_dim: int,
) -> None:
    assert q.shape[-1] == head_dim
    q.copy_(rmsnorm(q, of_q, eps))
    k.copy_(rmsnorm(k, of_k, eps))


def silu_and_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    gate, up = x.double().chunk(2, -1)
    out.copy_(gate / (1 + (-gate).exp()) * up)


def rope(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, at: torch.Tensor, *, is_neox: bool
) -> None:
    assert is_neox
    half = q.shape[-1] // 2
    turn = torch.complex(table[at, :half].float(), table[at, half:].float())[:, None]
    for values in (q, k):
        wide = values.float()
        turned = torch.complex(wide[..., :half], wide[..., half:]) * turn
        values.copy_(torch.cat([turned.real, turned.imag], -1))


def rotary_embedding(
    at: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    size: int,
    table: torch.Tensor,
    is_neox: bool,
) -> None:
    rope(q.view(9, -1, size), k.view(9, -1, size), table, at, is_neox=is_neox)


def store_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
) -> None:
    keys.index_copy_(0, places, k)
    values.index_copy_(0, places, v)


def clamp_position_cuda(lengths: torch.Tensor) -> torch.Tensor:
    return torch.where(lengths > 0, lengths - 1, 0)


def topk_softmax(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> None:
    best = logits.sort(-1, descending=True)
    weights.copy_(logits.softmax(-1).gather(1, best.indices[:, : weights.shape[1]]))
    ids.copy_(best.indices[:, : weights.shape[1]])


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: Any
) -> torch.Tensor:
    wide = (each.double().transpose(0, 1)[None] for each in (q, k, v))
    given = functional.scaled_dot_product_attention(
        *wide, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return given[0].transpose(0, 1)


def decode_attention_fwd(
    q: Any,
    keys: Any,
    values: Any,
    out: Any,
    starts: Any,
    places: Any,
    logits: Any,
    lse: Any,
    splits: Any,
    most: int,
    scale: float,
    *scales: float,
) -> None:
    assert logits.shape[2] == most >= int(splits.max())
    assert scales == (1.0, 1.0)
    for row, (first, last) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        at = places[first:last]
        out[row] = _attention(q[row : row + 1], keys[at], values[at], scale, None)[0]


def extend_attention_fwd(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    keys: Any,
    values: Any,
    added: Any,
    cached: Any,
    places: Any,
    mask: Any,
    is_causal: bool,
    mask_starts: Any,
    longest: int,
    k_scale: float,
    v_scale: float,
    scale: float,
) -> None:
    assert is_causal
    assert mask is mask_starts is None
    for row in range(len(added) - 1):
        new = slice(int(added[row]), int(added[row + 1]))
        at = places[int(cached[row]) : int(cached[row + 1])]
        length = new.stop - new.start
        assert length <= longest
        seen = torch.ones(length, len(at) + length, dtype=torch.bool).tril(len(at))
        whole_k, whole_v = torch.cat([keys[at], k[new]]), torch.cat([values[at], v[new]])
        out[new] = _attention(q[new], whole_k, whole_v, scale, seen)


def crash(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


#: As SGLang 0.5.23 has them.
PLACES: dict[str, dict[str, Callable[..., Any]]] = {
    "sgl_kernel": {"rmsnorm": rmsnorm, "fused_add_rmsnorm": fused_add_rmsnorm},
    "sglang.kernels.ops.layernorm.norm": {"fused_inplace_qknorm": fused_inplace_qknorm},
    "sglang.kernels.ops.activation.activation": {"silu_and_mul": silu_and_mul},
    "sglang.kernels.ops.attention.rope": {
        "apply_rope_with_cos_sin_cache_inplace": rope,
        "rotary_embedding": rotary_embedding,
    },
    "sglang.kernels.ops.kvcache.kvcache": {"store_cache": store_cache},
    "sglang.kernels.ops.attention.clamp_position": {"clamp_position_cuda": clamp_position_cuda},
    "sglang.kernels.ops.moe": {"topk_softmax": topk_softmax},
    "sglang.kernels.ops.attention.decode_attention": {"decode_attention_fwd": decode_attention_fwd},
    "sglang.kernels.ops.attention.extend_attention": {"extend_attention_fwd": extend_attention_fwd},
}


def install() -> None:
    for name, functions in PLACES.items():
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            package = ".".join(parts[:count])
            module = sys.modules.setdefault(package, types.ModuleType(package))
            module.__path__ = []
        for function, does in functions.items():
            setattr(sys.modules[name], function, does)
