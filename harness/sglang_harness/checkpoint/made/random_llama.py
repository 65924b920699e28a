"""Random Llamas in bfloat16 of the size that GPUs are used for, by seed, made without a model hub.

The tiny models (``tiny.py``) are too small for what depends on size: the GB/s of a push, the memory
that a release gives back, rounding that adds up over layers. These have the width and depth of
published models of 1 to 3 B parameters, and the tokenizer of the tiny ones, so that a prompt has
the same ids for both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_harness._base import paths
from sglang_harness.checkpoint.footprint import gigabytes
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.made.cached import once
from sglang_harness.checkpoint.reading import TensorInfo
from sglang_harness.checkpoint.writing import write_model
from sglang_harness.errors import MissingExtra

if TYPE_CHECKING:
    import torch

#: Incremented when the recipe changes, so that an old folder is not used for a new one.
RECIPE = 1


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama, by the names of its ``config.json``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


#: By what a model's name has after ``random-``. ``small`` is for rehearsals on a CPU: everything
#: has its shape but the size.
SHAPES = {
    "small": Shape(256, 512, 4, 4, 2, 64),
    "1.2b": Shape(2048, 8192, 20, 16, 4, 128),
    "3b": Shape(3072, 8192, 28, 24, 8, 128),
}

NAMES = tuple(f"random-{size}" for size in SHAPES)
"""``random-small``, ``random-1.2b``, ...: each may have ``:SEED`` behind it."""

#: Standard deviation of the logits: the largest of some hundred are 10 to 15, about as in trained
#: models. Bounds for half precision depend on that.
_LOGITS = 4.5

#: Threads that make tensors: torch draws random numbers in one.
_THREADS = min(8, os.cpu_count() or 1)


def named(model: str) -> tuple[str, int] | None:
    """Size and seed of ``random-SIZE[:SEED]``; ``None``: the name of another model."""
    found = re.fullmatch(r"random-([a-z0-9.]+)(?::(\d{1,9}))?", model)
    if found is None or found[1] not in SHAPES:
        return None
    return found[1], int(found[2] or 0)


def folder(size: str, seed: int, say: Callable[[str], None]) -> Path:
    """The checkpoint for ``seed`` (Hugging Face layout, bfloat16), made in the cache where missing.

    Raises:
        MissingExtra: torch or transformers is not installed.
        NotEnoughRoom: the disk has too little space; 2.4 GB for ``1.2b``, 5.6 GB for ``3b``.
        KeyError: ``size`` is not one of ``SHAPES``.
    """
    shape = SHAPES[size]
    path = paths.cache() / "models" / f"random-{size}-{RECIPE}-seed{seed}"

    def make(made: Path) -> None:
        say(f"model: writing random-{size}:{seed} in bfloat16")
        write(made, shape, seed)
        written = sum(file.stat().st_size for file in made.glob("*.safetensors"))
        say(f"model: wrote {gigabytes(written)}")

    return once(path, make)


def write(path: Path, shape: Shape, seed: int) -> None:
    """Writes the checkpoint of ``seed`` to ``path``, readable for every user.

    Every tensor has a generator of its own, seeded by its name: the values do not depend on the
    number of threads. (Of another version of torch they may: it promises no sequence.)

    Raises:
        FileExistsError: ``path`` is there already.
        MissingExtra, NotEnoughRoom: see :func:`folder`.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtra("Making a random model", "torch") from None
    like = tiny.folder(0)
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    # transformers has renamed the field; SGLang reads both names.
    config.pop("torch_dtype", None)
    config |= {**vars(shape), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    infos = described(shape, int(config["vocab_size"]))
    spread = {info.name: _spread(info) for info in infos}
    shapes = {info.name: info.shape for info in infos}

    def tensor(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_seed(seed, name))
        mean, deviation = spread[name]
        values = torch.empty(shapes[name])
        values.normal_(mean, deviation, generator=generator)
        return values.to(torch.bfloat16)

    def source(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        with ThreadPoolExecutor(_THREADS) as pool:
            ahead: deque[tuple[str, Future[torch.Tensor]]] = deque()
            for name in names:
                ahead.append((name, pool.submit(tensor, name)))
                if len(ahead) > _THREADS:
                    done, result = ahead.popleft()
                    yield done, result.result()
            for done, result in ahead:
                yield done, result.result()

    write_model(like, path, infos, source)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def described(shape: Shape, vocabulary: int) -> list[TensorInfo]:
    """The tensors of such a Llama, as Hugging Face names them."""
    h, m = shape.hidden_size, shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    layer = {
        "self_attn.q_proj": (queries, h),
        "self_attn.k_proj": (keys, h),
        "self_attn.v_proj": (keys, h),
        "self_attn.o_proj": (h, queries),
        "mlp.gate_proj": (m, h),
        "mlp.up_proj": (m, h),
        "mlp.down_proj": (h, m),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
    }
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocabulary, h),
        "model.norm": (h,),
        "lm_head": (vocabulary, h),
    }
    for number in range(shape.num_hidden_layers):
        names |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
    return [TensorInfo(f"{name}.weight", "bfloat16", size) for name, size in names.items()]


def _spread(info: TensorInfo) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values: every unit stays about 1 through a layer,
    and norms differ from the 1 that a server would have which left them out."""
    if len(info.shape) == 1:
        return 1.0, 0.1
    if info.name.startswith("model.embed_tokens"):
        return 0.0, 1.0
    if info.name.startswith("lm_head"):
        # The last norm has made each hidden unit about 1.
        return 0.0, float(_LOGITS * info.shape[-1] ** -0.5)
    return 0.0, float(info.shape[-1] ** -0.5)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
