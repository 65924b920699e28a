"""The checksums that a server must state once a checkpoint has arrived, computed here."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglang_harness.errors import MissingExtra, ModelError
from sglang_harness.weights.proof.fused_layout import MISSING, Layout, layout, unknown
from sglang_harness.weights.proof.tensor_hash import checksum
from sglang_harness.weights.source.fitted import Source


@dataclass(frozen=True)
class ExpectedChecksums:
    """What a push should make of each rank's parameters.

    Attributes:
        ranks: by the server's name of a parameter, its checksum.
        partly: parameters that the checkpoint holds only a part of.
    """

    ranks: tuple[dict[str, str], ...]
    partly: frozenset[str]


@dataclass(frozen=True)
class ServedLayout:
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
    ) -> ServedLayout:
        """Raises :class:`ModelError` where the model's ``config.json`` cannot be read."""
        config: Mapping[str, Any] = {}
        if model is not None:
            try:
                config = json.loads((model / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ModelError(f"{model / 'config.json'} cannot be read: {error}.") from None
        return cls(config, about, device)

    @property
    def unknown(self) -> str | None:
        if not self.config:
            return "the model's config.json is not on this machine"
        if reason := unknown(self.config, self.about):
            return reason
        if "num_attention_heads" not in self.config:
            return "the model's config.json names no num_attention_heads"
        return None

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

    @property
    def holding(self) -> Hashable:
        """Equal where the same tensors become the same parameters."""
        config = json.dumps(self.config, sort_keys=True)
        return (config, self.ranks, self.dtype, self.device)

    def layout(self, source: Source) -> Layout:
        return layout(self.config, source.tensors, self.ranks)


def expected_checksums(source: Source, served: ServedLayout) -> ExpectedChecksums:
    """Reads the checkpoint once, one parameter at a time, and computes what the server must
    state. Only where ``served.unknown`` is ``None``.

    Raises:
        MissingExtra: torch is not installed.
        BrokenCheckpoint: it cannot be read.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtra("Computing checksums of weights", "torch") from None

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
    return ExpectedChecksums(ranks, frozenset(partly))


class Computed:
    """What :func:`expected_checksums` computed, kept for the same files and the same server: a
    push there and back, again and again, reads and hashes each checkpoint once.

    Only what is computed here is kept, from files that were not written to since; what the server
    states is asked of it each time.
    """

    #: The weights a server was started with, those that are pushed, and those before.
    KEPT = 3

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, ExpectedChecksums] = OrderedDict()

    def expected(self, source: Source, served: ServedLayout) -> ExpectedChecksums:
        """Raises what reading the checkpoint raises."""
        what = (source.content, served.holding)
        if what not in self._kept:
            self._kept[what] = expected_checksums(source, served)
        self._kept.move_to_end(what)
        while len(self._kept) > self.KEPT:
            self._kept.popitem(last=False)
        return self._kept[what]
