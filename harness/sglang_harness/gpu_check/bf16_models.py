"""The larger models that parts serve and push: random Llamas in bfloat16, made when they are first
asked for, in the run's own folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_harness.checkpoint.made import random_llama
from sglang_harness.checkpoint.made.cached import once

if TYPE_CHECKING:
    from sglang_harness.gpu_check.context import Context

#: Bytes of disk that one takes with the usual number of layers on a GPU.
DISK_BYTES = 2_500_000_000


def bf16_model(context: Context, seed: int) -> Path:
    """The checkpoint of ``seed``: 1.2 B parameters with the usual number of layers on a GPU, 2 M in
    a rehearsal on the CPU. Other parts of the same run get the same folder.

    Raises:
        MissingExtra, NotEnoughRoom: as :func:`random_llama.folder`.
    """
    layers = context.settings.model_layers
    shape = random_llama.SHAPES["1.2b" if context.on_gpu else "small"]
    path = context.settings.models / f"random-{shape.hidden_size}x{layers}-seed{seed}"

    def make(made: Path) -> None:
        context.say(f"writing a random Llama in bfloat16, {layers} layers, seed {seed}")
        random_llama.write(made, replace(shape, num_hidden_layers=layers), seed)

    return once(path, make)
