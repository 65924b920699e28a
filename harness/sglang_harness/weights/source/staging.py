"""Brings a checkpoint to where a server or a peer can read it, as safetensors."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from sglang_harness._base.permissions import make_readable
from sglang_harness.checkpoint.reading import TensorInfo

if TYPE_CHECKING:
    import torch

    from sglang_harness.runtime import Running

#: Names of dtypes in a safetensors header.
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}


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


def as_it_lies(source: Source) -> Path | None:
    """The folder of the checkpoint, if its safetensors hold the tensors under these very names;
    ``None`` where they have to be written anew."""
    folder = source.path
    if not folder.is_dir():
        return None
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            found |= json.loads(opened.read(length)).keys() - {"__metadata__"}
    return folder if found and found == set(source.tensors) else None


def torch_files(source: Source) -> Path | None:
    """The folder of the checkpoint, if its ``*.bin`` files hold the tensors under these very
    names, as SGLang reads them too."""
    saved = getattr(source, "saved_as", None)
    layout = str(getattr(source, "layout", ""))
    if saved is None or not source.path.is_dir() or not layout.startswith("torch"):
        return None
    same = all(name == own for name, own in saved.items())
    # Weights below a key of their own are nothing that a server looks for.
    notes = getattr(source, "notes", ())
    whole = not any("weights under" in note for note in notes)
    return source.path if same and whole and any(source.path.glob("*.bin")) else None


def write_safetensors(source: Source, file: Path) -> None:
    """One file with every tensor, streamed: memory stays at one tensor.

    Raises:
        ValueError: a dtype that the format has no name for.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for info in source.tensors.values():
        if info.dtype not in _NAMES:
            raise ValueError(f"{info.name} is {info.dtype}, which safetensors cannot hold")
        header[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [at, at + info.nbytes],
        }
        at += info.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in source.read(list(source.tensors)):
            import torch

            opened.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def stage(
    source: Source, running: Running, *, bin_too: bool = False
) -> tuple[PurePosixPath, Path | None]:
    """The checkpoint's folder as the server sees it, and what has to be removed afterwards.

    Safetensors are shared as they lie; anything else is written anew, streamed, under the
    names that the harness reads.

    Args:
        bin_too: share ``*.bin`` files as they lie, for a reader that takes them.
    """
    folder = as_it_lies(source)
    pattern = "*.safetensors"
    if folder is None and bin_too and (folder := torch_files(source)) is not None:
        pattern = "*.bin"
    shared, reach = running.shared_folder, running.reach
    # What lies in the shared folder already is read from there.
    if folder is not None and (shared is None or folder.resolve().is_relative_to(shared)):
        return reach.share(folder), None
    room = Path(tempfile.mkdtemp(prefix="sglang-harness-staged-"))
    if shared is not None:
        shutil.rmtree(room)
        room = shared / f"staged-{uuid.uuid4().hex[:8]}"
        room.mkdir()
    try:
        if folder is not None:
            # Weights alone: of the rest the server has its own.
            for file in folder.glob(pattern):
                _link_or_copy(file, room / file.name)
        else:
            write_safetensors(source, room / "model.safetensors")
        room.chmod(0o755)
        if shared is not None:
            return reach.share(room), room
        make_readable(room)
        inside = reach.share(room)
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    # On this very machine the server reads the folder itself; elsewhere it got a copy.
    if inside == PurePosixPath(room.resolve()):
        return inside, room
    shutil.rmtree(room, ignore_errors=True)
    return inside, None


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes where that is possible and everybody may read them."""
    source = source.resolve()
    if source.stat().st_mode & 0o044 == 0o044:
        try:
            target.hardlink_to(source)
            return
        except OSError:
            pass  # another disk
    shutil.copyfile(source, target)
    target.chmod(0o644)
