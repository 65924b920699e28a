"""How a checkpoint is cut into buckets: pure arithmetic over names and sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from sglang_harness.checkpoint.reading import TensorInfo
from sglang_harness.errors import ModelError

#: Every tensor in a bucket begins at a multiple of this: a view of bytes as another dtype
#: must begin at a multiple of its element size, and 16 is the largest (complex128).
ALIGNMENT = 16


@dataclass(frozen=True)
class Slot:
    """One tensor's place in a bucket; ``start`` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together.

    Attributes:
        number: from 0.
    """

    number: int
    slots: tuple[Slot, ...]

    @property
    def extent(self) -> int:
        """Bytes of buffer that it takes, gaps included."""
        return self.slots[-1].end

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(slot.nbytes for slot in self.slots)

    @property
    def names(self) -> list[str]:
        return [slot.name for slot in self.slots]


def plan(tensors: Iterable[TensorInfo], bucket_bytes: int) -> list[Bucket]:
    """Fills buckets of at most ``bucket_bytes`` in the order given. A tensor that is larger
    gets a bucket of its own.

    Raises:
        ModelError: there is no tensor, or one without elements: SGLang's buckets cannot hold
            it, and no checksum would show that it arrived.
    """
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    for each in tensors:
        if not each.nbytes:
            raise ModelError(
                f"{each.name} has no elements (shape {tuple(each.shape)}): it cannot be pushed.",
                advice="Leave it out of the checkpoint.",
            )
        start = -(-slots[-1].end // ALIGNMENT) * ALIGNMENT if slots else 0
        if slots and start + each.nbytes > bucket_bytes:
            buckets.append(Bucket(len(buckets), tuple(slots)))
            slots, start = [], 0
        slots.append(Slot(each.name, each.dtype, tuple(each.shape), start, each.nbytes))
    if slots:
        buckets.append(Bucket(len(buckets), tuple(slots)))
    if not buckets:
        raise ModelError("There is no tensor to push.")
    return buckets
