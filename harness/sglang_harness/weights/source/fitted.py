"""A checkpoint under the names and in the dtypes of the served model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_harness.checkpoint.fitting import Fit, fit
from sglang_harness.checkpoint.reading import TensorInfo, open_checkpoint
from sglang_harness.weights.source.staging import Source


@dataclass(frozen=True)
class Fitted:
    """A checkpoint under the names and in the dtypes of the served model."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    _fit: Fit

    def read(self, names: Any = None) -> Iterator[tuple[str, Any]]:
        return self._fit.read(names)

    def read_into(self, rooms: Iterable[tuple[str, Any]]) -> None:
        self._fit.read_into(rooms)

    @property
    def content(self) -> Hashable:
        return self._fit.content


def open_for(model: Path | None, path: Path, allow: tuple[str, ...]) -> Source:
    """The checkpoint at ``path``, as a server of ``model`` has to be sent it.

    Args:
        model: the served model's folder; ``None``: not here, and the checkpoint is taken as it is.
        allow: patterns of names that may be missing or extra.

    Raises:
        ModelError: it cannot be read.
        CheckpointMismatch: it is of another model.
    """
    opened = open_checkpoint(path)
    if model is None:
        return opened
    fitted = fit(opened, model)
    fitted.raise_if_unfit(allow=allow)
    if not fitted.renamed and not fitted.converted and set(fitted.sources) == set(opened.tensors):
        return opened  # fmt: skip
    tensors = {
        name: TensorInfo(
            name,
            fitted.converted.get(name, (None, opened.tensors[own].dtype))[1],
            opened.tensors[own].shape,
        )
        for name, own in fitted.sources.items()
    }
    return Fitted(opened.path, tensors, fitted)
