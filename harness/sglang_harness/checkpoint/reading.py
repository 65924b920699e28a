"""A torch checkpoint of any layout, opened without running anything from it and read tensor by
tensor: memory stays near the size of the largest tensor, however large the checkpoint is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from sglang_harness.checkpoint.formats.dcp import Found, Saved, is_distributed, read_distributed
from sglang_harness.checkpoint.formats.pickles import CONVERSION, NoValues, StoredTensor
from sglang_harness.checkpoint.formats.safetensors_files import read_safetensors
from sglang_harness.checkpoint.formats.spans import (
    SIZES,
    Files,
    Span,
    empty,
    read_into,
    read_span,
    stamp,
)
from sglang_harness.checkpoint.formats.torch_files import read_torch_file
from sglang_harness.checkpoint.names import canonical, weights_in
from sglang_harness.errors import BrokenCheckpoint, ModelError, ShardedCheckpoint

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        dtype: as torch names it, without ``torch.``: ``bfloat16``.
        shape: of the whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the tensor in memory."""
        return math.prod(self.shape) * SIZES[self.dtype]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint. Holds descriptions, no tensors and no open files.

    Attributes:
        path: as given, resolved.
        layout: ``safetensors``, ``torch zip`` or ``distributed checkpoint``; with ``, sharded``
            if it is in several files.
        tensors: by name, without what wrappers add, in the order of the files.
        notes: what a person should know, such as which part was read.
        saved_as: the name that each tensor has in its file.
    """

    path: Path
    layout: str
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...]
    saved_as: Mapping[str, str]
    _places: Mapping[str, tuple[Span | Saved, ...]] = field(repr=False)
    _stamps: dict[Path, tuple[int, ...]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Of all tensors, as they are in memory."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def files(self) -> Mapping[str, str]:
        """The name of the file that each tensor begins in; empty tensors may have none."""
        return {name: places[0].file.name for name, places in self._places.items() if places}

    def read(
        self, names: Iterable[str] | None = None, *, dtypes: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one after another: contiguous, on the CPU, each with memory of its own.

        Args:
            names: which ones, in this order; all, in the order of the files, where not given.
            dtypes: what to convert tensors to, by name; the others stay as they are saved.

        Raises:
            MissingExtra: torch is not installed.
            BrokenCheckpoint: a file ends early, or changed since it was opened.
            KeyError: a name that is not in the checkpoint.
        """
        wanted = list(self.tensors if names is None else names)
        if unknown := [name for name in wanted if name not in self.tensors]:
            raise KeyError(f"{self.path} does not hold {unknown[0]}")
        return self._read(wanted, dtypes or {})

    def read_into(self, rooms: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Tensors into memory that is there already, straight from the files.

        Fresh memory costs more than reading does (see ``spans.py``), and a bucket is filled
        again and again.

        Args:
            rooms: names, and where each goes: contiguous, on the CPU, in the dtype
                that the tensor is converted to.

        Raises:
            BrokenCheckpoint, KeyError: as of :meth:`read`.
            ValueError: a room of another shape than its tensor's.
        """
        with Files(self._stamps) as files:
            for name, room in rooms:
                if name not in self.tensors:
                    raise KeyError(f"{self.path} does not hold {name}")
                if tuple(room.shape) != self.tensors[name].shape:
                    raise ValueError(
                        f"{name} is {self.tensors[name].shape}, its room {tuple(room.shape)}"
                    )
                for place in self._places[name]:
                    read_into(room, place if isinstance(place, Span) else place.span(files), files)

    @property
    def content(self) -> Hashable:
        """Equal for two openings of the same files; differs once one was written to."""
        files = frozenset((str(file), *found) for file, found in self._stamps.items())
        return (files, frozenset(self.saved_as.items()))

    def _read(
        self, names: list[str], dtypes: Mapping[str, str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        with Files(self._stamps) as files:
            for name in names:
                # Not bound to a name here: the tensor is its receiver's alone.
                yield name, self._tensor(name, files, dtypes.get(name))

    def _tensor(self, name: str, files: Files, dtype: str | None) -> torch.Tensor:
        info, places = self.tensors[name], self._places[name]
        spans = (place if isinstance(place, Span) else place.span(files) for place in places)
        if len(places) == 1 and places[0].start is None:
            return read_span(next(spans), files, dtype)
        whole = empty(info.shape, dtype or info.dtype)
        for span in spans:
            read_into(whole, span, files)
        return whole


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a file or a folder of any layout that trainers save. Reads no tensor yet.

    Raises:
        UnsafeCheckpoint: a pickle names something other than tensors; it was not run.
        ShardedCheckpoint: files of single ranks; the advice names the conversion.
        BrokenCheckpoint: cut short or damaged.
        ModelError: it does not exist, is not a checkpoint, or holds several.
    """
    given = Path(path).expanduser()
    path = given.resolve()
    if given.suffix and not path.suffix:
        # A link into a hub's cache: the file that it leads to is named by its hash, and only the
        # link says of which kind it is.
        path = given.parent.resolve() / given.name
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_files(path, [path])
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from None
    raise ModelError(f"{path} does not exist.", advice="Give a checkpoint: a file or a folder.")


def _open_folder(path: Path) -> Checkpoint:
    if is_distributed(path):
        found, notes = read_distributed(path)
        return _made(path, "distributed checkpoint", found, notes)
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        if indices := sorted(path.glob(f"{pattern}.index.json")):
            named = [index for index in indices if index.name.split(".")[0] in _WHOLE]
            plain = [index for index in named if index.name.count(".") == 3]
            return _open_indexed(path, [*plain, *named, *indices][0])
        files = [f for f in sorted(path.glob(pattern)) if not _BESIDE.match(f.name)]
        if files:
            return _open_files(path, _one_set(path, files))
    inner = [each.name for each in sorted(path.iterdir()) if each.is_dir()]
    raise ModelError(
        f"{path} does not hold a checkpoint (*.safetensors, *.bin, *.pt, *.pth, .metadata).",
        advice=f"Give one of its folders: {', '.join(inner[:5])}."
        if inner
        else "Give the folder or file that the weights are in.",
    )


#: How transformers and SGLang call the weights, whatever lies beside them.
_WHOLE = ("model", "pytorch_model")

#: What trainers save next to the weights, in files of the same kind.
_BESIDE = re.compile(
    r"(training_args|optimizer|optim_|scheduler|rng_state|random_states|extra_state|scaler)"
)

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.\w+$")


def _one_set(path: Path, files: list[Path]) -> list[Path]:
    """The files that make one checkpoint.

    Raises:
        ModelError: shards are missing, or there are several checkpoints.
    """
    if len(files) == 1 and not _SHARD.match(files[0].name):
        return files
    if whole := [file for file in files if file.stem in _WHOLE]:
        return whole
    shards: dict[tuple[str, int], dict[int, Path]] = {}
    for file in files:
        if found := _SHARD.match(file.name):
            key = (found["stem"], int(found["count"]))
            shards.setdefault(key, {})[int(found["number"])] = file
    if len(shards) == 1 and sum(map(len, shards.values())) == len(files):
        (((stem, count), numbered),) = shards.items()
        # Counted from one nearly always, from zero by some.
        # Not all that should be there are counted up: a name can say that there are 10^100.
        missing = next((number for number in range(1, count) if number not in numbered), None)
        if missing is not None or len(numbered) < count:
            which = "one" if missing is None else f"number {missing}"
            raise ModelError(
                f"{path} lacks shards of {stem}: {len(numbered)} of {count} are present, {which} "
                "is missing.",
                advice="Finish the download.",
            )
        return list(numbered.values())
    if any("rank" in file.name for file in files):
        raise ShardedCheckpoint(
            f"{path} holds files of single ranks ({', '.join(f.name for f in files[:3])}), "
            "not whole tensors.",
            advice=CONVERSION,
        )
    raise ModelError(
        f"{path} holds several checkpoints: {', '.join(f.name for f in files[:5])}.",
        advice="Give one of the files.",
    )


#: Bytes of an index of shards; that of 100 000 tensors has some 10 MB.
_LARGEST_INDEX = 100_000_000


def _open_indexed(path: Path, index: Path) -> Checkpoint:
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError("too long")
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): path / str(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        raise BrokenCheckpoint(f"{index} cannot be read as an index of shards.") from None
    files = sorted(set(wanted.values()))
    for file in files:
        if file.parent != path or not file.is_file():
            raise ModelError(
                f"{path} lacks {file.name}, which {index.name} names.",
                advice="Finish the download.",
            )
    layout, found, notes = _read_files(path, files)
    if missing := [name for name in wanted if name not in found]:
        raise BrokenCheckpoint(
            f"{wanted[missing[0]]} lacks {missing[0]}, which {index.name} says it holds "
            f"({len(missing)} such tensors).",
            advice="Copy or write it again.",
        )
    if more := [name for name in found if name not in wanted]:
        notes.append(f"not in the index, not read: {', '.join(more[:5])}")
    return _made(path, layout, {n: it for n, it in found.items() if n in wanted}, notes)


def _open_files(path: Path, files: list[Path]) -> Checkpoint:
    return _made(path, *_read_files(path, files))


def _read_files(path: Path, files: list[Path]) -> tuple[str, dict[str, Found], list[str]]:
    """Layout, tensors and notes of files that make one checkpoint."""
    found: dict[str, Found] = {}
    notes: list[str] = []
    layouts: list[str] = []
    for file in files:
        layout, spans, more = _read_file(file)
        layouts.append(layout)
        notes += [note if len(files) == 1 else f"{file.name}: {note}" for note in more]
        for name, span in spans.items():
            if name in found:
                raise ModelError(
                    f"{path} holds {name} twice, the second time in {file.name}.",
                    advice="Give one of the files, or add an index.",
                )
            found[name] = Found(span.dtype, span.shape, (span,))
    return layouts[0] + (", sharded" if len(files) > 1 else ""), found, notes


def _read_file(file: Path) -> tuple[str, dict[str, Span], list[str]]:
    if file.suffix == ".safetensors":
        return "safetensors", read_safetensors(file), []
    opened = read_torch_file(file)
    weights, notes = weights_in(
        opened.content, lambda it: isinstance(it, (StoredTensor, NoValues)), str(file)
    )
    if empty := [name for name, it in weights.items() if isinstance(it, NoValues)]:
        raise ModelError(
            f"{file} holds {empty[0]} without its values, as {len(empty)} of its tensors.",
            advice="Save the model after it is filled, not from torch's meta device.",
        )
    return "torch zip", {name: opened.span(name, it) for name, it in weights.items()}, notes


def _made(path: Path, layout: str, found: dict[str, Found], notes: list[str]) -> Checkpoint:
    if not found:
        raise ModelError(f"{path} does not hold any tensors.", advice="Give a checkpoint.")
    short = canonical(found, str(path))
    if any(name != own for name, own in short.items()):
        name, own = next((n, o) for n, o in short.items() if n != o)
        notes = [*notes, f"names without their wrappers: {name} is {own}"]
    files = sorted({place.file for it in found.values() for place in it.places})
    return Checkpoint(
        path,
        layout,
        MappingProxyType(
            {short[name]: TensorInfo(short[name], it.dtype, it.shape) for name, it in found.items()}
        ),
        tuple(notes),
        MappingProxyType({own: name for name, own in short.items()}),
        MappingProxyType({short[name]: it.places for name, it in found.items()}),
        {file: stamp(file) for file in files},
    )
