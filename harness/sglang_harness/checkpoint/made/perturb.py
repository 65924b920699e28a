"""Another checkpoint of the same architecture, made from one by a seeded perturbation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_harness.checkpoint.formats.spans import empty
from sglang_harness.checkpoint.reading import Checkpoint, open_checkpoint
from sglang_harness.checkpoint.writing import write_model
from sglang_harness.errors import MissingExtra, ModelError

if TYPE_CHECKING:
    import torch

#: Noise as a part of each tensor's own standard deviation: enough that every answer changes
#: far beyond any tolerance, too little to make a model babble.
STRENGTH = 0.05

#: The same for a server that computes in half precision, or may do: with 5 % a model in bfloat16
#: moved by 0.68 nats, and a stale prefix of it was not 0.3 off the new weights.
COARSE_STRENGTH = 0.2


def strength_for(dtype: str) -> float:
    """The strength for a server that computes in ``dtype``, as SGLang names it."""
    return STRENGTH if dtype.removeprefix("torch.") == "float32" else COARSE_STRENGTH


def perturbed(source: Path, target: Path, seed: int, *, strength: float = STRENGTH) -> Path:
    """Writes ``source`` with seeded noise on every floating-point tensor to the new ``target``.

    Any layout in, safetensors out (in the same shards where it was safetensors), one tensor at
    a time, in each tensor's own dtype. Configuration and tokenizer are copied.

    Raises:
        MissingExtra: torch is not installed.
        ModelError: the folder does not hold a readable checkpoint.
        FileExistsError: the target is there already.
    """
    checkpoint = _opened(source)
    return _written(source, target, checkpoint, set(checkpoint.tensors), seed, strength)


def one_perturbed(
    source: Path, target: Path, name: str, seed: int, *, strength: float = STRENGTH
) -> Path:
    """As :func:`perturbed`, with noise on the tensor ``name`` alone; the others stay to the bit.

    Raises:
        ModelError: there is no floating-point tensor of that name; besides what
            :func:`perturbed` raises.
    """
    checkpoint = _opened(source)
    info = checkpoint.tensors.get(name)
    if info is None or "float" not in info.dtype:
        raise ModelError(
            f"{source} does not have a {name} to change"
            + (f": it is {info.dtype}." if info else "."),
            advice=f"It has {', '.join(list(checkpoint.tensors)[:3])} and others.",
        )
    return _written(source, target, checkpoint, {name}, seed, strength)


def _opened(source: Path) -> Checkpoint:
    try:
        import numpy  # noqa: F401
        import torch  # noqa: F401
    except ImportError:
        raise MissingExtra("Making another checkpoint", "torch") from None
    return open_checkpoint(source)


def _written(
    source: Path, target: Path, checkpoint: Checkpoint, which: set[str], seed: int, strength: float
) -> Path:
    def tensors(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint.read(names):
            if name in which and tensor.is_floating_point():
                yield name, _noisy(tensor, name, seed, strength)
            else:
                yield name, tensor

    files = checkpoint.files if checkpoint.layout.startswith("safetensors") else None
    return write_model(source, target, checkpoint.tensors.values(), tensors, files=files)


def _noisy(tensor: torch.Tensor, name: str, seed: int, strength: float) -> torch.Tensor:
    import torch

    # Of the name, so that neither the order of files nor the other tensors matter.
    drawn = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn[:7], "big"))
    noise = empty(tensor.shape, "float32").normal_(generator=generator)
    # A constant tensor (a fresh norm weight) has no spread of its own.
    spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
    # In place: fresh memory costs more than the sum.
    return noise.mul_(strength * (spread or 1.0)).add_(tensor.float()).to(tensor.dtype)
