"""Copies a checkpoint to where a server or a peer can read it, as safetensors, and removes the
copy again."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from sglang_harness._base.temporary import temporary_folder
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import write_safetensors
from sglang_harness.weights.report import NotPrepared
from sglang_harness.weights.source.fitted import Source

if TYPE_CHECKING:
    from sglang_harness.runtime import Reach, Running


@dataclass(frozen=True)
class Lies:
    """A folder whose files can be read as they are.

    Attributes:
        weights: its files with the tensors.
        indices: which tensor is in which of them, for readers that go by it.
        alone: the folder has no other files of their kind, which a reader would take for more.
    """

    folder: Path
    weights: tuple[Path, ...]
    indices: tuple[Path, ...]
    alone: bool


def as_it_lies(source: Source, *, any_dtype: bool = False, dtype: str | None = None) -> Lies | None:
    """The checkpoint's folder, if its safetensors hold just these tensors under these names;
    ``None`` where they have to be written anew.

    Args:
        any_dtype: for a reader that converts what it reads. Otherwise the files have to hold the
            very bytes: float16 read as bfloat16 has the right size and the wrong values.
        dtype: what that reader converts to, where it is known. Where the served model has another
            one, its values are rounded to that first, and the reader has to get those.
    """
    return _lies(source, "safetensors", ".safetensors", any_dtype=any_dtype, dtype=dtype)


def torch_files(source: Source, *, dtype: str | None = None) -> Lies | None:
    """The checkpoint's folder, if its ``*.bin`` files hold just these tensors under these names;
    SGLang reads such files too, and converts what it reads to ``dtype``."""
    return _lies(source, "torch", ".bin", any_dtype=True, dtype=dtype)


def _lies(
    source: Source, layout: str, suffix: str, *, any_dtype: bool, dtype: str | None
) -> Lies | None:
    folder = source.path
    if not folder.is_dir():
        return None
    found = open_checkpoint(folder)
    same = found.tensors.keys() == source.tensors.keys() and all(
        found.tensors[name] == info or (any_dtype and dtype in (None, info.dtype))
        for name, info in source.tensors.items()
    )
    renamed = any(name != own for name, own in found.saved_as.items())
    # Readers other than this project's do not look below a key of their own.
    nested = any("weights under" in note for note in found.notes)
    files = sorted({folder / name for name in found.files.values()})
    if not found.layout.startswith(layout) or not same or renamed or nested:
        return None
    if any(file.suffix != suffix for file in files):
        return None
    alone = set(files) == set(folder.glob(f"*{suffix}"))
    return Lies(folder, tuple(files), tuple(sorted(folder.glob(f"*{suffix}.index.json"))), alone)


@dataclass(frozen=True)
class Staged:
    """A checkpoint where its reader sees it.

    Attributes:
        inside: its folder, as the reader names it.
    """

    inside: PurePosixPath
    _reach: Reach
    _written: Path | None = None
    """What was written on this machine for it."""

    def remove(self) -> None:
        """Removes what was copied; the checkpoint itself stays. Again: nothing.

        Raises:
            EngineError: it could not be removed. It goes with the server.
        """
        if self._written is not None:
            shutil.rmtree(self._written, ignore_errors=True)
        self._reach.unshare(self.inside)


def stage(
    source: Source,
    running: Running,
    *,
    reader: Literal["server", "peer"],
    dtype: str | None = None,
) -> Staged:
    """Makes the checkpoint readable for ``reader``; the caller removes the copy.

    Files that the reader takes as they are are shared, or linked; anything else is written anew,
    streamed, under the names and in the dtypes of ``source``.

    Args:
        reader: a server converts dtypes and reads ``*.bin`` as well; a peer sends the bytes of
            safetensors.
        dtype: what the server converts to, where it is known.

    Raises:
        ModelError: safetensors has no such dtype.
        NotPrepared: it cannot be written, as on a full disk. Nothing of it is left.
        EngineError: the server's engine did not take it.
    """
    lies = as_it_lies(source, any_dtype=reader == "server", dtype=dtype)
    if lies is None and reader == "server":
        lies = torch_files(source, dtype=dtype)
    shared, reach = running.shared_folder, running.reach
    try:
        # What lies in the shared folder already is read from there.
        if lies and lies.alone and (shared is None or lies.folder.is_relative_to(shared)):
            return Staged(reach.share(lies.folder), reach)
        return _write(source, reach, lies, shared)
    except OSError as error:
        raise NotPrepared(
            f"{source.path} could not be copied to where the {reader} reads it: {error}"
        ) from error


def _write(source: Source, reach: Reach, lies: Lies | None, shared: Path | None) -> Staged:
    if shared is None:
        room = temporary_folder("staged")
    else:
        # Here already where the server sees it: nothing is copied twice.
        room = shared / f"staged-{uuid.uuid4().hex[:8]}"
        room.mkdir()
    try:
        if lies is not None:
            # Weights alone: of the rest the server has its own.
            for file in (*lies.weights, *lies.indices):
                if shared is None:
                    (room / file.name).symlink_to(file.resolve())
                else:
                    _link_or_copy(file, room / file.name)
        else:
            write_safetensors(room / "model.safetensors", source.tensors.values(), source.read)
        # Of the room alone: a link has the mode of the file that it is another name of.
        room.chmod(0o755)
        inside = reach.share(room)
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    if shared is not None or inside == PurePosixPath(room.resolve()):
        return Staged(inside, reach, room)
    # The server got a copy of its own.
    shutil.rmtree(room, ignore_errors=True)
    return Staged(inside, reach)


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for the same bytes where that is possible and every user may read them."""
    source = source.resolve()
    if source.stat().st_mode & 0o044 == 0o044:
        try:
            target.hardlink_to(source)
            return
        except OSError:
            pass  # another disk
    shutil.copyfile(source, target)
    target.chmod(0o644)
