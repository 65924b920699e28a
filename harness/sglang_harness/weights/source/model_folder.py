"""A folder that transformers can load: pushed weights with the served model's configuration."""

from __future__ import annotations

from pathlib import Path

from sglang_harness.checkpoint.writing import copy_all_but_weights, write_safetensors
from sglang_harness.weights.source.fitted import Source
from sglang_harness.weights.source.staging import as_it_lies


def model_folder(source: Source, model: Path, target: Path) -> Path:
    """Makes ``target``: configuration and tokenizer of ``model``, weights of ``source``.

    Weights that are safetensors already, under the same names and in the same dtypes, are
    linked, not copied; others are written, streamed.

    Raises:
        ModelError: safetensors has no such dtype.
        OSError: it cannot be written, as on a full disk.
    """
    target.mkdir(parents=True)
    copy_all_but_weights(model, target)
    lies = as_it_lies(source)
    if lies is None:
        write_safetensors(target / "model.safetensors", source.tensors.values(), source.read)
        return target
    for file in (*lies.weights, *lies.indices):
        (target / file.name).symlink_to(file.resolve())
    return target
