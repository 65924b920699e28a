"""Files of ``torch.save``: zip archives (torch 1.6 and later) with a pickle that describes tensors,
and their storages as plain bytes. The format: torch/serialization.py of torch 2.13 (``_save``).
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sglang_harness.checkpoint.formats.pickles import LONGEST, StoredTensor, read_pickle
from sglang_harness.checkpoint.formats.spans import SIZES, Span, row_major
from sglang_harness.errors import BrokenCheckpoint, ModelError

#: What a file of torch before 1.6 begins with (``MAGIC_NUMBER``).
_MAGIC = 0x1950A86A20F9469CFC6C

#: A local header of a zip entry before its name (APPNOTE.TXT 4.3.7); lengths of name and extra
#: are its last four bytes.
_LOCAL_HEADER = 30


#: What zipfile raises for files that are not zip archives, or are damaged.
_DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,  # NotImplementedError and encrypted entries among it
    ValueError,  # also for names that are not text
    struct.error,
)


#: Bytes that an archive's directory may take: of 1.5 million tensors, with names of 40 letters.
#: zipfile makes some 700 bytes of each entry, which may have 46.
_LARGEST_DIRECTORY = 128 << 20


@dataclass(frozen=True)
class TorchFile:
    """What a file of ``torch.save`` holds.

    Attributes:
        content: the saved object; its tensors are descriptions.
        storages: where the bytes of each key lie: offset in the file, and length.
    """

    path: Path
    content: Any
    storages: Mapping[str, tuple[int, int]]

    def span(self, name: str, tensor: StoredTensor) -> Span:
        """Where the tensor's bytes are.

        Raises:
            BrokenCheckpoint: outside of the storage that it says it views.
            ModelError: larger than what is stored of it.
        """
        storage, size = tensor.storage, SIZES[tensor.dtype]
        if storage.key not in self.storages:
            raise BrokenCheckpoint(f"{self.path} lacks the storage of {name}.")
        where, length = self.storages[storage.key]
        contiguous = row_major(tensor.shape, tensor.stride)
        span = Span(
            self.path,
            where + (storage.first + tensor.offset) * size,
            tensor.dtype,
            tensor.shape,
            None if contiguous else tensor.stride,
        )
        if span.extent and (storage.first + tensor.offset) * size + span.extent > min(
            length, (storage.first + storage.elements) * size
        ):
            raise BrokenCheckpoint(
                f"{self.path} holds less of {name} than its shape needs.",
                advice="Copy or write it again.",
            )
        if not contiguous and span.extent:
            elements = 1
            for one in tensor.shape:
                elements *= one
            if elements * size > span.extent:
                raise ModelError(
                    f"{name} in {self.path} is an expanded view: {elements} elements out of "
                    f"{span.extent // size} stored ones.",
                    advice="Save it with .contiguous().",
                )
        return span


def read_torch_file(path: Path) -> TorchFile:
    """What is in the file, without its tensors' bytes.

    Raises:
        UnsafeCheckpoint, ShardedCheckpoint, BrokenCheckpoint: see :mod:`.pickles`.
        ModelError: anything but tensors, such as a TorchScript program; or written by torch before
            1.6.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start.startswith(b"PK"):
            return read_zip(file, path)
        raise _not_an_archive(file, path)


def read_zip(file: BinaryIO, path: Path, first: int = 0, length: int | None = None) -> TorchFile:
    """The archive that is the file, or the ``length`` bytes of it from ``first`` on."""
    if length is None:
        length = file.seek(0, io.SEEK_END) - first
    view = _View(_Slice(file, first, length))
    try:
        with zipfile.ZipFile(view) as archive:
            view.most = LONGEST
            return _read_archive(archive, view, path, first)
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BrokenCheckpoint(
            f"{path} is a torch file that was cut short or damaged ({reason}).",
            advice="Copy or write it again.",
        ) from None


def _read_archive(archive: zipfile.ZipFile, view: _View, path: Path, first: int) -> TorchFile:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise ModelError(
            f"{path} is a zip archive, but not one of torch.save.", advice="Give a state dict."
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise ModelError(
            f"{path} is a TorchScript program, not a checkpoint.",
            advice="Save the tensors alone: torch.save(model.state_dict(), path).",
        )
    order = f"{root}byteorder"
    parts = (f"{root}data/", pickles[0], order)
    needed = {name: entry for name, entry in entries.items() if name.startswith(parts)}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in needed.values()):
        raise ModelError(
            f"{path} was packed again with compression, which torch does not do.",
            advice="Write it with torch.save.",
        )
    # What is stored as it is takes what it says, which an entry may misstate.
    end = view.seek(0, io.SEEK_END)
    places = {name: (_data_offset(view, it), it.file_size) for name, it in needed.items()}
    for name, (at, size) in places.items():
        if at + size > end or size != needed[name].compress_size:
            raise zipfile.BadZipFile(f"{size} bytes of {name} are not there")
    # Not read where it is long: torch writes 'little' or 'big'.
    if order in needed and (
        needed[order].file_size != len(b"little") or archive.read(order) != b"little"
    ):
        raise ModelError(f"{path} was written on a big-endian machine; which is not supported.")
    content = read_pickle(io.BytesIO(archive.read(pickles[0])), path)
    storages = {
        name.removeprefix(f"{root}data/"): (first + at, size)
        for name, (at, size) in places.items()
        if name.startswith(f"{root}data/")
    }
    return TorchFile(path, content, storages)


def _data_offset(view: _View, entry: zipfile.ZipInfo) -> int:
    # torch aligns the bytes by padding the local header alone, so the directory does not tell.
    view.seek(entry.header_offset)
    header = view.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", header[-4:])
    return entry.header_offset + _LOCAL_HEADER + int(name) + int(extra)


def _not_an_archive(file: BinaryIO, path: Path) -> ModelError:
    """Why a file without a zip archive is not read. Raises UnsafeCheckpoint, BrokenCheckpoint: its
    pickle would run code, or is cut short."""
    if read_pickle(file, path) == _MAGIC:
        return ModelError(
            f"{path} was written in the format of torch before 1.6 (2020), which is not read.",
            advice="Write it again: torch.save(torch.load(path, weights_only=True), path).",
        )
    return ModelError(
        f"{path} is a pickle, but not one of torch.save.",
        advice="Give a state dict saved by torch.save, or safetensors.",
    )


class _Slice(io.RawIOBase):
    """A part of a file, seen as a file."""

    def __init__(self, file: BinaryIO, first: int, length: int) -> None:
        self._file, self._first, self._length, self._at = file, first, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._first + self._at)
        wanted = max(0, min(len(buffer), self._length - self._at))
        got = self._file.read(wanted)
        buffer[: len(got)] = got
        self._at += len(got)
        return len(got)


class _View(io.BufferedReader):
    """A file that is read in bounded pieces, whatever it claims to contain.

    Attributes:
        most: bytes that one read may ask for.
    """

    most = _LARGEST_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise zipfile.BadZipFile(f"{size} bytes beside the tensors, {self.most} at most")
        return super().read(size)
