"""A bucket as SGLang takes it in the body of a request: a pickle, in base64, in JSON.

Nothing is copied on the way but into the request itself. The tensors are read from their files
into one buffer, the pickle is made around the places where their bytes belong, and those are read
out of the buffer while the body is sent.
torch itself would copy each byte five times for the same text.

What SGLang accepts is from ``srt/utils/common.py`` (``SafeUnpickler``) of 0.5.20 and 0.5.23:
``torch._utils._rebuild_tensor_v2`` and ``_v3`` around a storage that
``torch.storage._load_from_bytes`` makes, and ``FlattenedTensorMetadata``.
"""

from __future__ import annotations

import io
import json
import pickle
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sglang_harness.errors import MissingExtra
from sglang_harness.weights.report import NotPrepared
from sglang_harness.weights.routes.buckets import Bucket, Slot

if TYPE_CHECKING:
    import torch

#: Bytes that are encoded at a time: a multiple of three, so that pieces of base64 join.
PIECE = 3 << 18

_BINBYTES8 = b"\x8e"
_METADATA = b"sglang.srt.weight_sync.tensor_bucket\nFlattenedTensorMetadata\n"


def buffer(nbytes: int) -> torch.Tensor:
    """Room for one bucket: uint8, on the CPU.

    Raises:
        MissingExtra: torch, or what comes with it, is not installed.
        NotPrepared: there is not enough memory.
    """
    try:
        import pybase64  # noqa: F401 -- checked now, not in the middle of a push
        import torch
    except ImportError:
        raise MissingExtra("Pushing weights", "torch") from None
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise NotPrepared(
            f"No memory for a bucket of {nbytes} bytes: {' '.join(str(error).split())}",
            advice="Push with smaller buckets (bucket_bytes); a tensor is never split.",
        ) from error


def place(room: torch.Tensor, slot: Slot) -> torch.Tensor:
    """Where a tensor lies in the buffer of its bucket, as a view."""
    import torch

    return room[slot.start : slot.end].view(getattr(torch, slot.dtype)).view(slot.shape)


class _Storage:
    """Stands for a storage while the pickle around it is made."""

    def __init__(self, mark: bytes) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        from torch.storage import _load_from_bytes

        return _load_from_bytes, (self.mark,)


class _Tensor:
    """Stands for a tensor: how it is put together from its storage."""

    def __init__(self, storage: _Storage, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._storage, self._dtype, self._shape = storage, dtype, shape

    def __reduce__(self) -> tuple[Any, ...]:
        from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

        steps = [1]
        for length in self._shape[:0:-1]:
            steps.append(steps[-1] * length)
        strides = tuple(reversed(steps)) if self._shape else ()
        if _has_typed_storage(self._dtype):
            return _rebuild_tensor_v2, (self._storage, 0, self._shape, strides, False, _hooks())
        return (
            _rebuild_tensor_v3,
            (self._storage, 0, self._shape, strides, False, _hooks(), self._dtype, {}),
        )


class FlattenedTensorMetadata:
    """Where a tensor lies in a flattened bucket. Its pickle names SGLang's class of that name,
    which need not be installed here."""

    def __init__(self, slot: Slot) -> None:
        import torch

        self.name = slot.name
        self.shape = torch.Size(slot.shape)
        self.dtype = getattr(torch, slot.dtype)
        self.start_idx = slot.start
        self.end_idx = slot.end
        self.numel = slot.nbytes


def _hooks() -> Any:
    from collections import OrderedDict

    return OrderedDict()


def _has_typed_storage(dtype: torch.dtype) -> bool:
    """Whether torch has a storage class for a dtype; float8 and unsigned ones have none."""
    from torch.storage import _dtype_to_storage_type_map

    return dtype in _dtype_to_storage_type_map()


def _saved(storage: Any, nbytes: int) -> bytes:
    """What ``torch.save`` writes before the bytes of a storage (its format before torch 1.6,
    which is what a pickled storage holds)."""
    import torch

    class Sink(io.RawIOBase):
        head = bytearray()
        left_out = 0

        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            # Eight bytes of length, then the data: they come straight from torch's memory.
            if isinstance(data, memoryview) and len(view) != 8:
                self.left_out += len(view)
            else:
                self.head += view
            return len(view)

    sink = Sink()
    sink.head = bytearray()
    torch.save(storage, sink, _use_new_zipfile_serialization=False)  # type: ignore[arg-type]
    if sink.left_out == nbytes:
        return bytes(sink.head)
    # Data of eight bytes looks like a length; another torch may hand its data over as bytes.
    whole = io.BytesIO()
    torch.save(storage, whole, _use_new_zipfile_serialization=False)
    return whole.getvalue()[:-nbytes]


def pieces(room: torch.Tensor, bucket: Bucket, *, flattened: bool) -> list[bytes | memoryview]:
    """The pickle of a bucket that lies in ``room``, in pieces that share its memory.

    Args:
        flattened: as SGLang's ``flattened_bucket``: one tensor of bytes and where each tensor
            lies in it; else a list of names and tensors.
    """
    import torch

    memory: memoryview = room.numpy().data
    marks: dict[bytes, tuple[int, int, torch.dtype]] = {}

    def storage(start: int, end: int, dtype: torch.dtype) -> _Storage:
        # Long enough that no name or number of a checkpoint is mistaken for it.
        mark = b"sglang-harness-bytes-of-" + f"{len(marks):08d}".encode()
        marks[mark] = (start, end, dtype)
        return _Storage(mark)

    content: Any
    if flattened:
        whole = storage(0, bucket.extent, torch.uint8)
        content = {
            "flattened_tensor": _Tensor(whole, torch.uint8, (bucket.extent,)),
            "metadata": [FlattenedTensorMetadata(slot) for slot in bucket.slots],
        }
    else:
        content = []
        for slot in bucket.slots:
            dtype = getattr(torch, slot.dtype)
            own = storage(slot.start, slot.end, dtype)
            content.append((slot.name, _Tensor(own, dtype, slot.shape)))
    # Protocol 3: no frames, whose lengths would be wrong once the bytes are put in.
    around = pickle.dumps(content, protocol=3).replace(
        f"{__name__}\nFlattenedTensorMetadata\n".encode(), _METADATA
    )
    made: list[bytes | memoryview] = []
    for mark, (start, end, dtype) in marks.items():
        before, found, around = around.partition(b"C" + bytes([len(mark)]) + mark)
        assert found, "every storage has its place in the pickle"
        part = torch.frombuffer(memory[start:end], dtype=torch.uint8)
        of = torch.storage.TypedStorage(
            wrap_storage=part.untyped_storage(),
            # An untyped storage is what torch itself would write, and cannot load again with
            # ``weights_only`` (2.13); bytes do as well.
            dtype=dtype if _has_typed_storage(dtype) else torch.uint8,
            _internal=True,
        )
        head = _saved(of, end - start)
        length = (len(head) + end - start).to_bytes(8, "little")
        made += [before + _BINBYTES8 + length + head, memory[start:end]]
    return [*made, around]


def in_base64(parts: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """The base64 of the parts one after another, :data:`PIECE` bytes at a time."""
    import pybase64

    left = b""
    for part in parts:
        view = memoryview(part)
        at = 0
        if left:
            at = min(len(view), -len(left) % 3)
            left += bytes(view[:at])
            if len(left) % 3:
                continue
            yield pybase64.b64encode(left)
            left = b""
        whole = at + (len(view) - at) // 3 * 3
        for start in range(at, whole, PIECE):
            yield pybase64.b64encode(view[start : min(start + PIECE, whole)])
        left = bytes(view[whole:])
    if left:
        yield pybase64.b64encode(left)


class TensorBody:
    """The body of ``/update_weights_from_tensor`` as pieces of JSON, its length known before.

    Args:
        parts: one pickle.
        ranks: how often it is sent: one entry for each tensor-parallel rank.
        fields: the rest of the body.

    Attributes:
        handed_over_at: ``time.monotonic()`` when the last piece had been taken; ``None``
            before. What comes after is the server's time.
    """

    def __init__(
        self, parts: Sequence[bytes | memoryview], *, ranks: int, fields: dict[str, Any]
    ) -> None:
        self._parts = parts
        self._ranks = ranks
        rest = json.dumps(fields)[1:]
        self._head = b'{"serialized_named_tensors":["'
        self._tail = b'"]' + (b", " + rest.encode() if fields else b"}")
        self.payload = sum(len(memoryview(part)) for part in parts)
        self.handed_over_at: float | None = None

    def __len__(self) -> int:
        encoded = -(-self.payload // 3) * 4
        between = (self._ranks - 1) * len(b'","')
        return len(self._head) + self._ranks * encoded + between + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        for rank in range(self._ranks):
            if rank:
                yield b'","'
            yield from in_base64(self._parts)
        yield self._tail
        self.handed_over_at = time.monotonic()
