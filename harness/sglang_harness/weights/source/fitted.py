"""A checkpoint under the names and in the dtypes of the served model, with values that can be
served."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sglang_harness.checkpoint.fitting import Fit, fit, raise_if_not_finite
from sglang_harness.checkpoint.reading import Checkpoint, TensorInfo, open_checkpoint

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """A checkpoint that can be read tensor by tensor."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def content(self) -> Hashable:
        """Equal for the same tensors out of the same files; other once one was written to."""

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]: ...

    def read_into(self, rooms: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Tensors by name into memory that is there already."""


@dataclass(frozen=True)
class Fitted:
    """A checkpoint as a server has to be sent it.

    Attributes:
        fit: how it fits the served model; ``None``: that model is not on this machine, and the
            checkpoint is taken as it is.
    """

    checkpoint: Checkpoint
    fit: Fit | None
    tensors: Mapping[str, TensorInfo]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def content(self) -> Hashable:
        """That of the checkpoint where nothing of it is changed."""
        changed = self.fit is not None and (
            self.fit.renamed or self.tensors != self.checkpoint.tensors
        )
        return self._reads.content if changed else self.checkpoint.content

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        return self._reads.read(names)

    def read_into(self, rooms: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._reads.read_into(rooms)

    @property
    def _reads(self) -> Fit | Checkpoint:
        return self.checkpoint if self.fit is None else self.fit

    def raise_if_unusable(self) -> None:
        """Refuses values that no model can be served with. Reads every tensor once.

        Raises:
            CheckpointMismatch: NaN or infinite values, also those that only the model's dtype
                makes infinite; or copies of tied weights that differ.
            MissingExtra: torch is not installed.
        """
        if self.fit is None:
            raise_if_not_finite(self.path, self.read())
        else:
            self.fit.raise_if_not_finite()


class ValueCheck:
    """:meth:`Fitted.raise_if_unusable`, once for each checkpoint: one that passed and was not
    written to since is not read again."""

    #: The weights that a server was started with, those that are pushed, and those before.
    KEPT = 3

    def __init__(self) -> None:
        self._passed: deque[Hashable] = deque(maxlen=self.KEPT)

    def check(self, source: Fitted) -> None:
        """Raises what :meth:`Fitted.raise_if_unusable` raises."""
        content = source.content
        if content in self._passed:
            return
        source.raise_if_unusable()
        self._passed.append(content)


def open_for(model: Path | None, path: Path, allow: tuple[str, ...]) -> Fitted:
    """The checkpoint at ``path``, as a server of ``model`` has to be sent it. Reads no tensor.

    Args:
        model: the served model's folder; ``None``: not here, and the checkpoint is taken as it is.
        allow: patterns of names that may be missing or extra.

    Raises:
        ModelError: it cannot be read.
        CheckpointMismatch: it is of another model.
    """
    opened = open_checkpoint(path)
    if model is None:
        return Fitted(opened, None, opened.tensors)
    fitted = fit(opened, model)
    fitted.raise_if_unfit(allow=allow)
    tensors = {
        name: TensorInfo(
            name,
            fitted.converted.get(name, (None, opened.tensors[own].dtype))[1],
            opened.tensors[own].shape,
        )
        for name, own in fitted.sources.items()
    }
    return Fitted(opened, fitted, tensors)
