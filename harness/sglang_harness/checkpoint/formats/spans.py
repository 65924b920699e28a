"""Where a tensor's bytes are in files, and how they get into memory: with one copy.

Bytes are read into the tensor that is handed out. Mapping the file would cost no copy either,
but every page that was touched would count as this process's memory until the kernel takes it
back; a sender's memory has to stay near its largest tensor, however it is measured.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sglang_harness.errors import BrokenCheckpoint, MissingExtra

if TYPE_CHECKING:
    import torch

#: Bytes of one element, by dtype: those that torch stores and a server can take.
SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

#: Linux reads at most this many bytes a call (``MAX_RW_COUNT``, read(2)).
_ONE_CALL = 0x7FFFF000

#: Files kept open at a time; a checkpoint of a large job has more than a process may open.
_OPEN_FILES = 32


@dataclass(frozen=True)
class Span:
    """A tensor, or a rectangular part of one, in one file.

    Attributes:
        offset: of the first element, in bytes from the start of the file.
        shape: of this part.
        stride: in elements; ``None`` for row-major.
        start: of this part within the tensor; ``None`` where it is the whole.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    start: tuple[int, ...] | None = None

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last."""
        if 0 in self.shape:
            return 0
        if self.stride is None:
            return math.prod(self.shape) * SIZES[self.dtype]
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * SIZES[self.dtype]


def row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements are ordered as in a contiguous tensor. Dimensions of one may have any
    stride."""
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


class Files:
    """The files of a checkpoint while it is read, few of them open at a time.

    Args:
        stamps: what :func:`stamp` said of each file when the checkpoint was opened. A file that
            a trainer replaces meanwhile is detected, not read half old and half new.
    """

    def __init__(self, stamps: dict[Path, tuple[int, ...]]) -> None:
        self._stamps = stamps
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def descriptor(self, file: Path) -> int:
        """Raises BrokenCheckpoint: the file is gone, or another one than it was."""
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        try:
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BrokenCheckpoint(
                f"{file} cannot be read any more: {error.strerror}.", advice="Open it again."
            ) from None
        self._open[file] = opened
        if stamp(opened) != self._stamps[file]:
            raise BrokenCheckpoint(
                f"{file} was written to after it was opened.",
                advice="Read a checkpoint when its trainer has finished it.",
            )
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return opened

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` with the file's bytes from ``offset`` on."""
        descriptor = self.descriptor(file)
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(descriptor, [buffer[done : done + _ONE_CALL]], offset + done)
            except OSError as error:
                raise BrokenCheckpoint(f"{file} cannot be read: {error.strerror}.") from None
            if not got:
                raise BrokenCheckpoint(
                    f"{file} ends at byte {offset + done}, before its tensor does.",
                    advice="Copy or write it again.",
                )
            done += got


def stamp(file: Path | int) -> tuple[int, ...]:
    """What tells one content of a file from the next: inode, size, time of change."""
    seen = os.stat(file)  # noqa: PTH116 -- of a descriptor too
    return (seen.st_ino, seen.st_size, seen.st_mtime_ns)


def tensor_type(dtype: str) -> Any:
    """torch's own dtype of that name.

    Raises:
        MissingExtra: torch is not installed.
        BrokenCheckpoint: this torch is too old to know it.
    """
    try:
        import numpy  # noqa: F401 -- lends a tensor's memory to the kernel's read
        import torch
    except ImportError:
        raise MissingExtra("Reading tensors", "torch") from None
    if found := getattr(torch, dtype, None):
        return found
    raise BrokenCheckpoint(
        f"torch {torch.__version__} does not have {dtype}.", advice="Install a newer torch."
    )


#: From this many bytes on memory comes in huge pages (2 MiB on x86-64) where the kernel has
#: them. Touching fresh memory in pages of 4 KiB costs more than reading the bytes: 0.7 GB/s
#: against 2.3 GB/s out of the page cache were measured.
_HUGE = 4 << 20


def empty(shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Memory for a tensor, not filled. Raises as :func:`tensor_type` does."""
    kind = tensor_type(dtype)
    import torch

    elements = math.prod(shape)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if elements * SIZES[dtype] < _HUGE or advice is None:
        return torch.empty(shape, dtype=kind)
    memory = mmap.mmap(-1, elements * SIZES[dtype], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(advice)
    # The tensor owns the memory, which is freed with it.
    return torch.frombuffer(memory, dtype=kind).reshape(shape)


def read_span(span: Span, files: Files, dtype: str | None = None) -> torch.Tensor:
    """The span as a contiguous tensor that shares its memory with nothing.

    Args:
        dtype: what to convert it to, a piece at a time; its own where not given.
    """
    dtype = dtype or span.dtype
    if span.stride is not None:
        # A view that its owner saved as such: a transposed matrix, a column slice.
        flat = empty((span.extent // SIZES[span.dtype],), span.dtype)
        files.read(span.file, span.offset, bytes_of(flat))
        made = empty(span.shape, dtype)
        made.copy_(flat.as_strided(span.shape, span.stride))
        return made
    made = empty(span.shape, dtype)
    _fill(made.reshape(-1), span, files)
    return made


def read_into(whole: torch.Tensor, span: Span, files: Files) -> None:
    """Fills the span's part of ``whole``; without a copy where that part is in one piece."""
    part = whole
    starts = (0,) * len(span.shape) if span.start is None else span.start
    for dimension, (start, length) in enumerate(zip(starts, span.shape, strict=True)):
        part = part.narrow(dimension, start, length)
    if span.stride is None and part.is_contiguous():
        _fill(part.reshape(-1), span, files)
    else:
        part.copy_(read_span(span, files))


#: Elements that are converted to another dtype at a time. Few enough to take little memory; with
#: fewer, threads would wait for each other longer than they work (measured on a busy machine).
_PIECE = 1 << 22


def _fill(flat: torch.Tensor, span: Span, files: Files) -> None:
    if not flat.numel():
        return
    if str(flat.dtype) == f"torch.{span.dtype}":
        files.read(span.file, span.offset, bytes_of(flat))
        return
    piece = empty((min(_PIECE, flat.numel()),), span.dtype)
    for first in range(0, flat.numel(), _PIECE):
        length = min(_PIECE, flat.numel() - first)
        files.read(span.file, span.offset + first * SIZES[span.dtype], bytes_of(piece[:length]))
        flat[first : first + length] = piece[:length]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to read or to fill."""
    import torch

    lent: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(lent)
