"""The checksums that a server must state once a checkpoint has arrived, computed here."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglang_harness._base import headroom
from sglang_harness.errors import MissingExtra, ModelError
from sglang_harness.weights.proof.fused_layout import (
    MISSING,
    FusionRecipe,
    Layout,
    layout,
    unknown,
)
from sglang_harness.weights.proof.tensor_hash import checksum_of, threads_here
from sglang_harness.weights.source.fitted import Source

#: Bytes of tensors that each thread adds to what is held at a time. One parameter may take more,
#: and is then computed alone.
HELD_BY_A_THREAD = 128 << 20


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


def expected_checksums(
    source: Source, served: ServedLayout, *, threads: int | None = None
) -> ExpectedChecksums:
    """Reads the checkpoint once, parameter by parameter, and computes what the server must
    state. Only where ``served.unknown`` is ``None``.

    Args:
        threads: how many parameters are read, put together and hashed at a time at most;
            :func:`.tensor_hash.threads_here` where not given. Together they hold the tensors of the
            largest parameter, or :data:`HELD_BY_A_THREAD` for each of them where that is more, but
            no more than a quarter of the memory that is left.

    Raises:
        MissingExtra: torch is not installed.
        BrokenCheckpoint: it cannot be read.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtra("Computing checksums of weights", "torch") from None

    recipes = served.layout(source).recipes
    dtype = getattr(torch, served.dtype)
    threads = threads or threads_here()

    def compute(recipe: FusionRecipe) -> list[str]:
        parts = [
            tensor.to(dtype) if tensor.is_floating_point() else tensor
            for _, tensor in source.read(recipe.parts)
        ]
        return [
            checksum_of(recipe.fuse(parts, rank).pieces, served.device, threads=threads)
            for rank in range(served.ranks)
        ]

    whole = {name: recipe for name, recipe in recipes.items() if MISSING not in recipe.parts}
    room = min(threads * HELD_BY_A_THREAD, headroom.memory().available // 4)
    started: dict[str, Future[list[str]]] = {}
    held: dict[Future[list[str]], int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="checksums") as pool:
        try:
            for parameter, recipe in whole.items():
                needs = _room_for(recipe, source, served)
                while held and (len(held) >= threads or sum(held.values()) + needs > room):
                    _forget_done(held)
                started[parameter] = pool.submit(compute, recipe)
                held[started[parameter]] = needs
            while held:
                _forget_done(held)
        except BaseException:
            # Also an interruption of this thread: what has begun ends within a parameter.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    sums = {parameter: future.result() for parameter, future in started.items()}
    return ExpectedChecksums(
        tuple({name: each[rank] for name, each in sums.items()} for rank in range(served.ranks)),
        frozenset(recipes.keys() - whole.keys()),
    )


def _room_for(recipe: FusionRecipe, source: Source, served: ServedLayout) -> int:
    """Bytes: what is read, and again where it is converted or a rank has columns of it."""
    infos = [source.tensors[part] for part in recipe.parts]
    read = sum(info.nbytes for info in infos)
    as_read = served.ranks == 1 and all(
        str(info.dtype).removeprefix("torch.") == served.dtype for info in infos
    )
    return read if as_read else 2 * read


def _forget_done(held: dict[Future[list[str]], int]) -> None:
    """Waits until one is done. Raises what it raised."""
    for future in wait(held, return_when=FIRST_COMPLETED).done:
        del held[future]
        future.result()


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
