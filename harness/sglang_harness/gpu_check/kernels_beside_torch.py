"""SGLang's own kernels beside plain torch: a program for the Python that has SGLang.

    python kernels_beside_torch.py [--device cuda] [--share K/N | NUMBER ...]
    python kernels_beside_torch.py --memory-saver

It imports the standard library, torch and SGLang only. The first form compares the kernels with
these numbers, or every Nth from the Kth, or all, one after another. It prints JSON objects, a line
each: ``plan``, the names of those that it will compare by their numbers, and a row for each when it
is done. A kernel that leaves CUDA unusable ends the program with the exit code 77 after its line:
the others have to run in a new process.

These are the kernels that a Llama, Qwen2, Qwen3, Qwen3-MoE or Mixtral is served with by SGLang
0.5.15 to 0.5.23 with attention by triton, in the shapes of the models that the harness makes. Where
each is in a release was looked up in the wheels of 0.5.15 and 0.5.18 to 0.5.23: 0.5.15 keeps those
that are compiled while it serves in ``sglang.jit_kernel``, later ones in ``sglang.kernels.ops``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

#: The exit code after a kernel that left CUDA unusable.
UNUSABLE = 77

#: Bytes that the memory saver is asked to pause and resume.
PAUSED = 2 << 30

#: How a kernel came to be. ``built``: in a library of the release (sgl_kernel). ``nvcc``: compiled
#: by the release when it is first called. ``triton``: the same, by triton.
Made = Literal["built", "nvcc", "triton"]

Outcome = Literal["ok", "wrong", "failed", "missing", "not run"]

#: What a kernel gave, and what plain torch gives.
Pairs = list[tuple["torch.Tensor", "torch.Tensor"]]


@dataclass(frozen=True)
class Kernel:
    """One kernel in one shape and dtype.

    Attributes:
        where: ``module:function``, the first that there is.
        run: calls it with fresh input, and says what it gave and what was to be expected.
        allowed: distance to what was expected, in parts of the largest expected value.
    """

    name: str
    where: tuple[str, ...]
    run: Callable[[Callable[..., Any]], Pairs]
    allowed: float


@dataclass
class Row:
    """How one kernel did.

    Attributes:
        where: the function that was found.
        off: its distance to torch's result, in parts of the largest value of that.
        first_seconds: of the first call; it includes the compilation, where there is one.
        seconds: of the second.
        why: of every outcome but ``ok``.
    """

    kernel: str
    outcome: Outcome
    where: str = ""
    made: Made | None = None
    off: float | None = None
    allowed: float = 0.0
    first_seconds: float | None = None
    seconds: float | None = None
    why: str = ""


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in parts of the largest expected value; NaN where one is NaN, and
    infinite where the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    largest = float(expected.double().abs().max())
    return float((got.double() - expected.double()).abs().max()) / (largest or 1.0)


def find(where: tuple[str, ...]) -> tuple[str, Callable[..., Any]] | str:
    """The first function that there is, with its place; or why there is none."""
    reasons = []
    for place in where:
        module, _, name = place.partition(":")
        try:
            found: Any = getattr(importlib.import_module(module), name)
        except Exception as error:  # a module may raise anything when it is imported
            reasons.append(f"{place}: {type(error).__name__}: {shortened(str(error))}")
            continue
        return place, found
    return "; ".join(reasons)


def shortened(text: str) -> str:
    """On one line, the beginning and the end: a compiler's errors are at the end."""
    text = " ".join(text.split())
    return text if len(text) <= 700 else f"{text[:200]} ... {text[-500:]}"


def how_made(place: str) -> Made:
    if place.startswith("sgl_kernel:"):
        return "built"
    return "triton" if "_attention:" in place else "nvcc"


def lacks_to_compile() -> list[str]:
    """What is missing of what a release compiles with, as tvm-ffi (0.1.11) looks for it."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    nvcc = any(home and os.access(Path(home, "bin", "nvcc"), os.X_OK) for home in homes)
    programs = {"c++": os.environ.get("CXX", "c++"), "ninja": "ninja"}
    lacking = [] if nvcc or shutil.which("nvcc") else ["nvcc"]
    return lacking + [name for name, program in programs.items() if not shutil.which(program)]


def beside_torch(kernel: Kernel, synchronize: Callable[[], None]) -> Row:
    """Runs a kernel twice, and compares what it gave the second time as well."""
    row = Row(kernel.name, "failed", allowed=kernel.allowed)
    found = find(kernel.where)
    if isinstance(found, str):
        row.outcome, row.why = "missing", found
        return row
    row.where, function = found
    row.made = how_made(row.where)
    try:
        offs = []
        for field in ("first_seconds", "seconds"):
            began = time.monotonic()
            pairs = kernel.run(function)
            synchronize()
            setattr(row, field, round(time.monotonic() - began, 4))
            offs += [distance(got, expected) for got, expected in pairs]
    except Exception as error:  # whatever it raises is what is asked for
        row.why = f"{type(error).__name__}: {shortened(str(error))}"
        if row.made == "nvcc" and (lacking := lacks_to_compile()):
            row.outcome = "not run"
            row.why = f"no {', no '.join(lacking)} to compile it with ({row.why})"
        return row
    # A NaN is the largest.
    row.off = max(offs, key=lambda off: (off != off, off))
    row.outcome = "ok" if row.off <= kernel.allowed else "wrong"
    if row.outcome == "wrong":
        row.why = f"off by {row.off:.2e} of the largest value, allowed {kernel.allowed:g}"
    return row


# --- the kernels ----------------------------------------------------------------------------------


def kernels(device: str) -> list[Kernel]:
    """All of them, always in the same order. Output begins as NaN, so that what a kernel does not
    write is wrong."""
    return [
        *norms(device),
        *activations(device),
        *rotary(device),
        *caches(device),
        *positions(device),
        *experts(device),
        *attention(device),
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in float32."""
    wide = values.float()
    scale = wide.pow(2).mean(-1, keepdim=True).add(eps).rsqrt()
    return wide * scale * weight.float()


def norms(device: str) -> Iterator[Kernel]:
    import torch

    eps = 1e-5

    def plain(width: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Pairs]:
        def run(rmsnorm: Callable[..., Any]) -> Pairs:
            x = torch.randn(37, width, device=device, dtype=dtype)
            weight = torch.rand(width, device=device, dtype=dtype) + 0.5
            return [(rmsnorm(x, weight, eps), norm(x, weight, eps))]

        return run

    def added(width: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Pairs]:
        def run(fused_add_rmsnorm: Callable[..., Any]) -> Pairs:
            x, residual = torch.randn(2, 37, width, device=device, dtype=dtype).unbind()
            weight = torch.rand(width, device=device, dtype=dtype) + 0.5
            total = x.float() + residual.float()
            got, carried = x.clone(), residual.clone()
            fused_add_rmsnorm(got, carried, weight, eps)
            return [(got, norm(total, weight, eps)), (carried, total)]

        return run

    def of_heads(size: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Pairs]:
        def run(fused_inplace_qknorm: Callable[..., Any]) -> Pairs:
            q = torch.randn(9, 4, size, device=device, dtype=dtype)
            k = torch.randn(9, 2, size, device=device, dtype=dtype)
            of_q, of_k = (torch.rand(2, size, device=device, dtype=dtype) + 0.5).unbind()
            expected = norm(q, of_q, eps), norm(k, of_k, eps)
            fused_inplace_qknorm(q, k, of_q, of_k, eps, head_dim=size)
            return [(q, expected[0]), (k, expected[1])]

        return run

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for width in (128, 2048):
            label = f"{width} {_short(dtype)}"
            # sgl_kernel's library has no rmsnorm for float32 (sglang-kernel 0.4.4).
            if dtype != torch.float32:
                yield Kernel(f"rmsnorm {label}", ("sgl_kernel:rmsnorm",), plain(width, dtype), 1e-2)
            where = ("sgl_kernel:fused_add_rmsnorm",)
            yield Kernel(f"fused_add_rmsnorm {label}", where, added(width, dtype), 1e-2)
    for size, dtype in ((64, torch.float16), (128, torch.bfloat16)):
        yield Kernel(
            f"fused_inplace_qknorm {size} {_short(dtype)}",
            (
                "sglang.kernels.ops.layernorm.norm:fused_inplace_qknorm",
                "sglang.jit_kernel.norm:fused_inplace_qknorm",
            ),
            of_heads(size, dtype),
            1e-2,
        )


def activations(device: str) -> Iterator[Kernel]:
    import torch

    def run_with(width: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Pairs]:
        def run(silu_and_mul: Callable[..., Any]) -> Pairs:
            x = torch.randn(37, 2 * width, device=device, dtype=dtype)
            got = torch.full((37, width), torch.nan, device=device, dtype=dtype)
            silu_and_mul(x, got)
            gate, up = x.float().chunk(2, -1)
            return [(got, torch.nn.functional.silu(gate) * up)]

        return run

    # The released kernel computes in fast maths on this generation (SGLang 0.5.15).
    for width, dtype in ((384, torch.float16), (8192, torch.bfloat16)):
        yield Kernel(
            f"silu_and_mul {width} {_short(dtype)}",
            (
                "sglang.kernels.ops.activation.activation:silu_and_mul",
                "sglang.jit_kernel.activation:silu_and_mul",
            ),
            run_with(width, dtype),
            1e-2,
        )


def rotary(device: str) -> Iterator[Kernel]:
    import torch

    def run_with(size: int, dtype: torch.dtype, fused: bool) -> Callable[..., Pairs]:
        def run(rope: Callable[..., Any]) -> Pairs:
            at = torch.randint(0, 1000, (9,), device=device)
            rates = 1e4 ** (-torch.arange(0, size, 2, device=device) / size)
            angle = torch.arange(1024, device=device)[:, None] * rates
            table = torch.cat([angle.cos(), angle.sin()], -1).float()
            q = torch.randn(9, 4, size, device=device, dtype=dtype)
            k = torch.randn(9, 2, size, device=device, dtype=dtype)
            if not fused:
                table = table.to(dtype)  # as SGLang keeps it for this kernel
            cos, sin = table.float()[at][:, None].chunk(2, -1)

            def turned(values: torch.Tensor) -> torch.Tensor:
                a, b = values.float().chunk(2, -1)
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            expected = turned(q), turned(k)
            if fused:
                rope(q, k, table, at, is_neox=True)
            else:
                rope(at, q.view(9, -1), k.view(9, -1), size, table, True)
            return [(q, expected[0]), (k, expected[1])]

        return run

    modules = ("sglang.kernels.ops.attention.rope", "sglang.jit_kernel.rope")
    for size, dtype in ((64, torch.float16), (128, torch.bfloat16)):
        where = tuple(f"{module}:apply_rope_with_cos_sin_cache_inplace" for module in modules)
        yield Kernel(f"rope {size} {_short(dtype)}", where, run_with(size, dtype, True), 1e-2)
    # Heads of the tiny models are too small for the other.
    where = tuple(f"{module}:rotary_embedding" for module in modules)
    yield Kernel("rotary_embedding 32 float16", where, run_with(32, torch.float16, False), 1e-2)


def caches(device: str) -> Iterator[Kernel]:
    import torch

    def run_with(width: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Pairs]:
        def run(store_cache: Callable[..., Any]) -> Pairs:
            k, v = torch.randn(2, 5, width, device=device, dtype=dtype).unbind()
            keys, values = torch.zeros(2, 64, width, device=device, dtype=dtype).unbind()
            # Not place 0: 0.5.23 keeps it for the padding of CUDA graphs, and writes nothing there.
            places = torch.tensor([3, 9, 1, 60, 7], device=device)
            expected = keys.clone(), values.clone()
            expected[0][places], expected[1][places] = k, v
            store_cache(k, v, keys, values, places)
            return [(keys, expected[0]), (values, expected[1])]

        return run

    for width, dtype in ((64, torch.float16), (128, torch.float16), (512, torch.bfloat16)):
        yield Kernel(
            f"store_cache {width} {_short(dtype)}",
            (
                "sglang.kernels.ops.kvcache.kvcache:store_cache",
                "sglang.jit_kernel.kvcache:store_cache",
            ),
            run_with(width, dtype),
            0.0,
        )


def positions(device: str) -> Iterator[Kernel]:
    import torch

    def run_with(dtype: torch.dtype) -> Callable[[Callable[..., Any]], Pairs]:
        def run(clamp_position: Callable[..., Any]) -> Pairs:
            lengths = torch.arange(1000, device=device, dtype=dtype)
            return [(clamp_position(lengths), (lengths - 1).clamp(min=0))]

        return run

    for dtype in (torch.int64, torch.int32):
        yield Kernel(
            f"clamp_position {_short(dtype)}",
            (
                "sglang.kernels.ops.attention.clamp_position:clamp_position_cuda",
                "sglang.jit_kernel.clamp_position:clamp_position_cuda",
            ),
            run_with(dtype),
            0.0,
        )


def experts(device: str) -> Iterator[Kernel]:
    import torch

    def run_with(count: int) -> Callable[[Callable[..., Any]], Pairs]:
        def run(topk_softmax: Callable[..., Any]) -> Pairs:
            logits = torch.randn(50, count, device=device)
            weights = torch.full((50, 2), torch.nan, device=device)
            ids = torch.zeros(50, 2, device=device, dtype=torch.int32)
            topk_softmax(weights, ids, logits)
            expected = logits.softmax(-1).topk(2)
            # By expert: two that are equal may come in either order.
            got = torch.zeros_like(logits).scatter_(1, ids.long(), weights)
            wanted = torch.zeros_like(logits).scatter_(1, expected.indices, expected.values)
            return [(got, wanted)]

        return run

    for count in (4, 8):
        where = ("sglang.kernels.ops.moe:topk_softmax", "sgl_kernel:topk_softmax")
        yield Kernel(f"topk_softmax 2 of {count}", where, run_with(count), 1e-4)


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, offset: int
) -> torch.Tensor:
    """Causal attention in float32 of queries whose first is at the place ``offset``.

    Args: tokens x heads x size each; several heads of queries share one of keys and values.
    """
    import torch

    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (each.float().repeat_interleave(group, 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), wide_k) * scale
    later = torch.arange(k.shape[0], device=q.device)[None] > (
        torch.arange(q.shape[0], device=q.device)[:, None] + offset
    )
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), wide_v)


def attention(device: str) -> Iterator[Kernel]:
    import torch

    heads, shared = 8, 2

    def starts(lengths: list[int]) -> torch.Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return ends.to(device=device, dtype=torch.int32)

    def pool(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = torch.randn(2, 256, shared, size, device=device, dtype=dtype).unbind()
        return keys, values

    def one_token(size: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Pairs]:
        def run(decode_attention_fwd: Callable[..., Any]) -> Pairs:
            lengths, splits, scale = [1, 17, 70], 8, size**-0.5
            keys, values = pool(size, dtype)
            places = torch.randperm(256, device=device)[: sum(lengths)]
            q = torch.randn(len(lengths), heads, size, device=device, dtype=dtype)
            got = torch.full_like(q, torch.nan)
            parts = (len(lengths), heads, splits)
            decode_attention_fwd(
                q,
                keys,
                values,
                got,
                starts(lengths),
                places,
                torch.empty(*parts, size, device=device, dtype=torch.float32),
                torch.empty(*parts, device=device, dtype=torch.float32),
                torch.full((len(lengths),), 4, device=device, dtype=torch.int32),
                splits,
                scale,
                1.0,
                1.0,
            )
            expected = [
                attended(q[n : n + 1], keys[at], values[at], scale, len(at) - 1)
                for n, at in enumerate(places.split(lengths))
            ]
            return [(got, torch.cat(expected))]

        return run

    def more_tokens(size: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Pairs]:
        def run(extend_attention_fwd: Callable[..., Any]) -> Pairs:
            cached, added, scale = [0, 16, 33], [5, 40, 1], size**-0.5
            keys, values = pool(size, dtype)
            places = torch.randperm(256, device=device)[: sum(cached)]
            q = torch.randn(sum(added), heads, size, device=device, dtype=dtype)
            k, v = torch.randn(2, sum(added), shared, size, device=device, dtype=dtype).unbind()
            got = torch.full_like(q, torch.nan)
            extend_attention_fwd(
                q,
                k.contiguous(),
                v.contiguous(),
                got,
                keys,
                values,
                starts(added),
                starts(cached),
                places,
                None,
                True,
                None,
                max(added),
                1.0,
                1.0,
                scale,
            )
            expected = [
                attended(
                    of_q, torch.cat([keys[at], of_k]), torch.cat([values[at], of_v]), scale, len(at)
                )
                for of_q, of_k, of_v, at in zip(
                    q.split(added),
                    k.split(added),
                    v.split(added),
                    places.split(cached),
                    strict=True,
                )
            ]
            return [(got, torch.cat(expected))]

        return run

    for size, dtype in ((32, torch.float16), (128, torch.bfloat16)):
        for name, run in (("decode", one_token), ("extend", more_tokens)):
            yield Kernel(
                f"{name}_attention {size} {_short(dtype)}",
                tuple(
                    f"{package}.{name}_attention:{name}_attention_fwd"
                    for package in (
                        "sglang.kernels.ops.attention",
                        "sglang.srt.layers.attention.triton_ops",
                    )
                ),
                run(size, dtype),
                2e-2,
            )


# --- the memory saver -----------------------------------------------------------------------------


def memory_saver() -> int:
    """Allocates, pauses and resumes ``PAUSED`` bytes, one step at a time: after each it prints a
    line with what the CUDA driver says is in use, and waits for a line."""
    import torch
    from torch_memory_saver import torch_memory_saver as saver

    torch.zeros(1, device="cuda")
    held: list[torch.Tensor] = []

    def allocate() -> None:
        with saver.region(tag="held"):
            held.append(torch.ones(PAUSED // 4, device="cuda"))

    steps: list[tuple[str, Callable[[], Any]]] = [
        ("empty", lambda: None),
        ("allocated", allocate),
        ("paused", lambda: saver.pause(tag="held")),
        ("resumed", lambda: saver.resume(tag="held")),
    ]
    for name, step in steps:
        began = time.monotonic()
        address = held[0].data_ptr() if held else None
        step()
        torch.cuda.synchronize()
        seconds = time.monotonic() - began
        free, total = torch.cuda.mem_get_info()
        same = address is None or held[0].data_ptr() == address
        told = {"step": name, "used": total - free, "seconds": seconds, "same_address": same}
        print(json.dumps(told), flush=True)
        if not sys.stdin.readline():
            return 1
    # What came back can be written and read.
    held[0].fill_(3.0)
    return 0 if bool((held[0] == 3.0).all()) else 1


def main() -> int:
    """Compares; returns the exit code."""
    words = argparse.ArgumentParser()
    words.add_argument("--device", default="cuda")
    words.add_argument("--memory-saver", action="store_true")
    words.add_argument("--share", default="0/1")
    words.add_argument("numbers", nargs="*", type=int)
    asked = words.parse_args()
    if asked.memory_saver:
        # In which order libraries of CUDA are unloaded is not what is asked.
        os._exit(memory_saver())
    import torch

    everything = kernels(asked.device)
    first, count = map(int, asked.share.split("/"))
    numbers = asked.numbers or list(range(first, len(everything), count))
    plan = {number: everything[number].name for number in numbers}
    print(json.dumps({"plan": plan}), flush=True)

    def synchronize() -> None:
        if asked.device == "cuda":
            torch.cuda.synchronize()

    for number in numbers:
        torch.manual_seed(number)
        row = beside_torch(everything[number], synchronize)
        print(json.dumps({"number": number, **asdict(row)}), flush=True)
        if row.outcome == "failed":
            try:
                synchronize()
            except Exception:  # as of an illegal address: nothing works after it
                return UNUSABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
