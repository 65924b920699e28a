"""A folder that transformers can load: pushed weights with the served model's configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_harness.weights.source.staging import Source, as_it_lies, write_safetensors

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def model_folder(source: Source, model: Path, target: Path) -> Path:
    """Makes ``target``: configuration and tokenizer of ``model``, weights of ``source``.

    Weights that lie as safetensors already are linked, not copied; others are written,
    streamed.
    """
    target.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, target / file.name)
    folder = as_it_lies(source)
    if folder is None:
        write_safetensors(source, target / "model.safetensors")
        return target
    for file in folder.iterdir():
        if file.name.endswith((".safetensors", ".safetensors.index.json")):
            (target / file.name).symlink_to(file.resolve())
    return target
