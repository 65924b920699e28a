"""The checksums that a server must state once a checkpoint has arrived, computed here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglang_harness.weights.fused_layout import MISSING, Layout, layout, unknown
from sglang_harness.weights.staging import Source
from sglang_harness.weights.tensor_hash import checksum


@dataclass(frozen=True)
class Expected:
    """What a push should make of each rank's parameters.

    Attributes:
        ranks: by the server's name of a parameter, its checksum.
        partly: parameters that the checkpoint holds only a part of.
    """

    ranks: tuple[dict[str, str], ...]
    partly: frozenset[str]


@dataclass(frozen=True)
class Served:
    """What is known of how a server holds its weights.

    Attributes:
        config: the model's ``config.json``.
        about: the server's ``/server_info``.
        unknown: why checksums cannot be computed for it; ``None``: they can.
    """

    config: Mapping[str, Any]
    about: Mapping[str, Any]
    device: Literal["cpu", "gpu"]

    @classmethod
    def of(
        cls, model: Path | None, about: Mapping[str, Any], device: Literal["cpu", "gpu"]
    ) -> Served:
        config: Mapping[str, Any] = {}
        if model is not None:
            config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return cls(config, about, device)

    @property
    def unknown(self) -> str | None:
        if not self.config:
            return "the model's config.json is not on this machine"
        return unknown(self.config, self.about)

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks."""
        return int(self.about.get("tp_size") or 1)

    @property
    def dtype(self) -> str:
        """What the parameters are held in, as torch names it without ``torch.``.

        ``auto`` is the checkpoint's own, and float16 for a float32 one (SGLang 0.5.23,
        ``srt/configs/model_config.py``; bfloat16 for Gemma).
        """
        asked = str(self.about.get("dtype") or "auto").removeprefix("torch.")
        short = {"half": "float16", "float": "float32"}
        if asked != "auto":
            return short.get(asked, asked)
        own = str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")
        own = own.removeprefix("torch.")
        return "float16" if own == "float32" else own

    def layout(self, source: Source) -> Layout:
        return layout(self.config, source.tensors, self.ranks)


def expected_checksums(source: Source, served: Served) -> Expected:
    """Reads the checkpoint once, one parameter at a time, and computes what the server must
    state. Only where ``served.unknown`` is ``None``."""
    import torch

    how = served.layout(source)
    dtype = getattr(torch, served.dtype)
    ranks: tuple[dict[str, str], ...] = tuple({} for _ in range(served.ranks))
    partly = set()
    for parameter, recipe in how.recipes.items():
        if MISSING in recipe.parts:
            partly.add(parameter)
            continue
        parts = [
            tensor.to(dtype) if tensor.is_floating_point() else tensor
            for _, tensor in source.read(recipe.parts)
        ]
        for rank, sums in enumerate(ranks):
            sums[parameter] = checksum(recipe.make(parts, rank), served.device)
        del parts
    return Expected(ranks, frozenset(partly))
