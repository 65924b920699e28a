"""Folders of ``torch.distributed.checkpoint`` (DCP): what FSDP and other sharded trainers save.

A ``.metadata`` pickle says which part of which tensor is where; each part is a tensor saved
by ``torch.save`` somewhere in a ``.distcp`` file. torch's own reader unpickles ``.metadata``
with plain pickle, so it would run what is in there; here it goes through the same closed door
as every other pickle. The format: torch/distributed/checkpoint/{metadata,filesystem}.py of
torch 2.13.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sglang_harness.checkpoint.formats.pickles import (
    Box,
    DType,
    StoredTensor,
    is_size,
    numbers,
    read_pickle,
)
from sglang_harness.checkpoint.formats.spans import SIZES, Files, Span
from sglang_harness.checkpoint.formats.torch_files import read_zip
from sglang_harness.checkpoint.names import weights_in
from sglang_harness.errors import BrokenCheckpoint, ModelError

METADATA = ".metadata"

_CHECKPOINT = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"

#: The names in a ``.metadata``, of today's torch and of older ones.
_RECORDS = frozenset(
    {
        *(
            f"{_CHECKPOINT}.metadata.{name}"
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        f"{_CHECKPOINT}.filesystem._StorageInfo",
        f"{_SHARDED}.TensorProperties",
        f"{_SHARDED}.MEM_FORMAT_ENCODING",
    }
)


@dataclass(frozen=True)
class Found:
    """A tensor in a checkpoint and where its parts are."""

    dtype: str
    shape: tuple[int, ...]
    places: tuple[Span | Saved, ...]


@dataclass(frozen=True)
class Saved:
    """A part of a tensor that was saved by ``torch.save`` into a larger file.

    Attributes:
        offset: of that save in the file, in bytes.
        length: of it, in bytes.
        shape: of the part.
        start: of the part within the tensor; ``None`` where it is the whole.
    """

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    start: tuple[int, ...] | None

    def span(self, files: Files) -> Span:
        """Where the bytes are. Looked up when they are read: a large job saves 100 000 parts.

        Raises:
            UnsafeCheckpoint: the save is a pickle of something else.
            BrokenCheckpoint: not the part that the metadata says.
        """
        with open(files.descriptor(self.file), "rb", closefd=False) as file:
            saved = read_zip(file, self.file, self.offset, self.length)
        tensor = saved.content
        if not isinstance(tensor, StoredTensor) or (tensor.dtype, tensor.shape) != (
            self.dtype,
            self.shape,
        ):
            raise BrokenCheckpoint(
                f"{self.file} does not hold at byte {self.offset} the part of "
                f"{self.name} that {METADATA} says is there.",
                advice="Save it again; perhaps two saves went to one folder.",
            )
        span = saved.span(self.name, tensor)
        return Span(span.file, span.offset, span.dtype, span.shape, span.stride, self.start)


def is_distributed(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def read_distributed(folder: Path) -> tuple[dict[str, Found], list[str]]:
    """The model's tensors in the folder, by their names, and notes.

    Raises:
        UnsafeCheckpoint: ``.metadata`` names something that is not of DCP; it was not run.
        BrokenCheckpoint: files are missing or cut short, or parts do not make whole tensors.
        ModelError: there are no weights, or several sets of them.
    """
    path = folder / METADATA
    with path.open("rb") as file:
        metadata = read_pickle(file, path, more_boxes=_RECORDS)
    try:
        told = _fields(metadata, "Metadata")
        tensors = {
            name: it
            for name, it in told["state_dict_metadata"].items()
            if _kind(it) == "TensorStorageMetadata"
        }
        tree = _tree(tensors, told.get("planner_data"))
        where = _storage(told["storage_data"])
        weights, notes = weights_in(tree, lambda it: isinstance(it, _Leaf), str(path))
        found = {
            name: _found(folder, name, leaf.key, tensors[leaf.key], where)
            for name, leaf in weights.items()
        }
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise BrokenCheckpoint(
            f"{path} is not what torch.distributed.checkpoint writes ({error!r}).",
            advice="Save it again with torch.distributed.checkpoint.",
        ) from None
    _check_files(path, found)
    return found, notes


@dataclass(frozen=True)
class _Leaf:
    key: str


def _kind(record: Any) -> str:
    return record.kind.rpartition(".")[2] if isinstance(record, Box) else ""


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if _kind(record) != kind or not isinstance(record.state, dict):
        raise TypeError(f"expected {kind}")
    return cast("dict[str, Any]", record.state)


def _tree(tensors: dict[str, Any], paths: Any) -> dict[str, Any]:
    """The saved object as it was nested, out of the flat names that it was saved under."""
    tree: dict[str, Any] = {}
    for key in tensors:
        *above, last = paths[key] if isinstance(paths, dict) and key in paths else (key,)
        # What else a pickle can hold here may be much longer as text than in the pickle.
        if not all(isinstance(part, (str, int)) for part in (key, *above, last)):
            raise TypeError("expected names of text")
        inside = tree
        for part in above:
            inside = inside.setdefault(str(part), {})
        inside[str(last)] = _Leaf(key)
    return tree


def _storage(told: dict[Any, Any]) -> dict[tuple[str, tuple[int, ...]], dict[str, Any]]:
    """The place of each part, by the tensor's name and where in it the part begins."""
    places = {}
    for index, info in told.items():
        which = _fields(index, "MetadataIndex")
        places[_text(which["fqn"]), numbers(which.get("offset") or ())] = _fields(
            info, "_StorageInfo"
        )
    return places


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError("expected text")
    return given


def _size(given: Any) -> int:
    if not is_size(given):
        raise TypeError("expected a number of bytes")
    return int(given)


def _found(
    folder: Path,
    name: str,
    key: str,
    record: Any,
    where: dict[tuple[str, tuple[int, ...]], dict[str, Any]],
) -> Found:
    told = _fields(record, "TensorStorageMetadata")
    dtype = _dtype(told["properties"])
    shape = numbers(told["size"])
    parts = []
    covered = 0
    for chunk in told["chunks"]:
        fields = _fields(chunk, "ChunkStorageMetadata")
        start, sizes = numbers(fields["offsets"]), numbers(fields["sizes"])
        if len(start) != len(shape) or any(
            a + b > whole for a, b, whole in zip(start, sizes, shape, strict=True)
        ):
            raise BrokenCheckpoint(f"{folder}: a part of {name} is outside of its shape.")
        if not math.prod(sizes):  # of a rank that got nothing of it
            continue
        covered += math.prod(sizes)
        info = where[key, start]
        if info.get("transform_descriptors"):
            raise ModelError(
                f"{folder} was saved with transformations, which this reader does not undo.",
                advice="Save it without extensions.",
            )
        file = folder / _text(info["relative_path"])
        offset, length = _size(info["offset"]), _size(info["length"])
        # Memory for the whole tensor is taken before the first part of it is looked at.
        if math.prod(sizes) * SIZES[dtype] > length:
            raise BrokenCheckpoint(
                f"{folder}: a part of {name} has fewer bytes than its shape needs.",
                advice="Save it again.",
            )
        if not file.resolve().is_relative_to(folder.resolve()):
            raise BrokenCheckpoint(f"{folder}: {name} is outside of the folder, in {file}.")
        parts.append(
            Saved(
                name,
                file,
                offset,
                length,
                dtype,
                sizes,
                None if sizes == shape else start,
            )
        )
    if covered != math.prod(shape) or _overlap(parts):
        raise BrokenCheckpoint(
            f"{folder} holds {covered} elements of {name}, which has {math.prod(shape)}"
            f"{', some of them twice' if _overlap(parts) else ''}.",
            advice="Save it again; perhaps not every rank finished.",
        )
    return Found(dtype, shape, tuple(parts))


def _overlap(parts: list[Saved]) -> bool:
    """Whether two parts share an element. Sorted, those that could are neighbours or few."""
    boxes = sorted((part.start, part.shape) for part in parts if part.start is not None)
    for place, (start, shape) in enumerate(boxes):
        for other, lengths in boxes[place + 1 :]:
            if shape and other[0] >= start[0] + shape[0]:
                break
            if all(
                a < b + n and b < a + m
                for a, m, b, n in zip(start, shape, other, lengths, strict=True)
            ):
                return True
    return False


def _dtype(properties: Any) -> str:
    """TensorProperties come as a tuple today; as fields from torch before 2.1."""
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) else state["dtype"]
    if not isinstance(dtype, DType):
        raise TypeError("expected a dtype")
    return dtype.name


def _check_files(path: Path, found: dict[str, Found]) -> None:
    sizes: dict[Path, int] = {}
    for name, it in found.items():
        lengths: dict[Path, int] = {}
        for place in it.places:
            file = place.file
            if file not in sizes:
                if not file.is_file():
                    raise BrokenCheckpoint(
                        f"{path.parent} lacks {file.name}, which holds a part of {name}.",
                        advice="Copy the folders of all nodes together, or save it again.",
                    )
                sizes[file] = file.stat().st_size
            if isinstance(place, Saved) and place.offset + place.length > sizes[file]:
                raise BrokenCheckpoint(
                    f"{file} was cut short: {name} should end at byte "
                    f"{place.offset + place.length}, and the file ends at {sizes[file]}.",
                    advice="Copy or write it again.",
                )
            if isinstance(place, Saved):
                lengths[file] = lengths.get(file, 0) + place.length
                if lengths[file] > sizes[file]:
                    raise BrokenCheckpoint(
                        f"{file} is shorter than the parts of {name} that are said to be in it.",
                        advice="Save it again.",
                    )
