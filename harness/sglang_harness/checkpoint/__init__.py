"""Torch checkpoints: which one a spec names, where it is, how new ones are made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from sglang_harness.checkpoint.made import random_llama, tiny
from sglang_harness.errors import ModelError

__all__ = ["check_folder", "locate"]


def locate(model: str, say: Callable[[str], None]) -> Path | None:
    """The folder of the checkpoint that ``model`` names; ``None`` for a name on the hub.

    ``smollm2``, ``tiny[-ARCHITECTURE][:SEED]`` and ``random-SIZE[:SEED]`` are made in the cache
    the first time.

    Raises:
        ModelError: a path that does not exist or does not hold a checkpoint.
        MissingExtra: the model has to be made, and torch is not installed.
    """
    if model == "smollm2":
        from sglang_harness.checkpoint.made import smollm2

        return smollm2.folder(say)
    if meant := tiny.named(model):
        architecture, seed = meant
        return tiny.folder(seed, architecture)
    if large := random_llama.named(model):
        return random_llama.folder(*large, say)
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, an unknown user's home
        reason = str(error).rstrip(".")[:200]
        raise ModelError(
            f"The model path {model[:80]} cannot be used: {reason}.",
            advice="Give an existing folder, a hub name, 'smollm2' or 'tiny'.",
        ) from None
    if is_folder:
        check_folder(path)
        return path.resolve()
    if is_file:
        raise ModelError(
            f"The model {model} is a file, expected a folder.",
            advice="Give the folder that holds its config.json.",
        )
    if model.startswith(("/", "./", "../", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelError(
            f"The model {model} does not exist.",
            advice="Give a folder with config.json and weights, a hub name (owner/name), "
            f"'smollm2', or one of {', '.join(tiny.NAMES + random_llama.NAMES)}.",
        )
    return None


def check_folder(path: Path) -> None:
    """Rejects a folder that SGLang could not load, before a server is started on it.

    Raises:
        ModelError: ``config.json``, weights or tokenizer are missing or broken.
    """
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(f"{path} has no config.json.", advice="Give a model folder.")
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config} cannot be read: {error}.") from None
    if not isinstance(described, dict) or not described.get("architectures"):
        raise ModelError(f"{config} does not name an architecture.", advice="Give a model folder.")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ModelError(
            f"{path} has no weights (*.safetensors or *.bin).",
            advice="Give the folder that the weights are in.",
        )
    _check_shards(path)
    if not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise ModelError(
            f"{path} has no tokenizer.", advice="Save the tokenizer in the same folder."
        )


def _check_shards(path: Path) -> None:
    """Finds an incomplete download here, not in a server half a minute later."""
    for index in path.glob("*.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{index} cannot be read as an index of shards.") from None
        if missing := sorted(name for name in named if not (path / str(name)).is_file()):
            raise ModelError(
                f"{path} lacks {missing[0]}, which its index names "
                f"({len(missing)} of {len(named)} files are missing).",
                advice="Finish the download.",
            )
