"""Checkpoints written: safetensors tensor by tensor, files of ``torch.save``, folders of
``torch.distributed.checkpoint``. Whatever is written can be read by every user."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sglang_harness._base.permissions import make_readable
from sglang_harness.checkpoint import footprint
from sglang_harness.checkpoint.footprint import RoomNeeded
from sglang_harness.checkpoint.formats.safetensors_files import DTYPES
from sglang_harness.checkpoint.formats.spans import SIZES, bytes_of
from sglang_harness.checkpoint.reading import TensorInfo
from sglang_harness.errors import MissingExtra, ModelError, NotEnoughRoom

if TYPE_CHECKING:
    import torch


class Described(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str:
        """As torch names it, without ``torch.``."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


#: Where a model's tensors come from: names in, tensors out, in that order.
Source = Callable[[Sequence[str]], Iterable[tuple[str, "torch.Tensor"]]]

#: Bytes of a shard, as Hugging Face's tools cut them.
SHARD = 5_000_000_000

_CODES = {name: code for code, name in DTYPES.items()}

#: Kinds of files that hold weights; everything else in a model's folder goes with the model.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf")


def write_model(
    model_folder: Path,
    target: Path,
    tensors: Iterable[TensorInfo],
    source: Source,
    *,
    shard_bytes: int = SHARD,
    files: Mapping[str, str] | None = None,
) -> Path:
    """A model folder like ``model_folder`` with other weights, as safetensors.

    One tensor is in memory at a time. The configuration and the tokenizer are copied.

    Args:
        target: is made; must not be there yet.
        tensors: what is written, by the names that the model has on disk.
        source: gives the tensors when they are due.
        shard_bytes: where one file ends and the next begins, where ``files`` does not say.
        files: which file each tensor goes to, by its name.

    Raises:
        FileExistsError: the target is there already.
        NotEnoughRoom: the disk is full.
        ModelError: the source gives another tensor than described.

    Whatever is raised, nothing stays of a target that was not there before.
    """
    shards = _shards(list(tensors), shard_bytes, files)
    target.mkdir(parents=True)
    try:
        with disk_may_be_full(target):
            _write(model_folder, target, shards, source)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


@contextmanager
def disk_may_be_full(target: Path) -> Iterator[None]:
    """Writing to ``target``. Raises NotEnoughRoom: the disk, or the user's quota, is used up."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NotEnoughRoom(
            f"The disk was full before {target} was complete.",
            advice="Set TMPDIR to a folder with more space, or take a smaller model.",
        ) from None


def _write(
    model_folder: Path, target: Path, shards: Mapping[str, list[TensorInfo]], source: Source
) -> None:
    copy_all_but_weights(model_folder, target)
    for name, infos in shards.items():
        write_safetensors(target / name, infos, source)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(i.nbytes for infos in shards.values() for i in infos)},
            "weight_map": {i.name: name for name, infos in shards.items() for i in infos},
        }
        (target / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    make_readable(target)


def copy_all_but_weights(model_folder: Path, target: Path) -> None:
    """Copies a model's configuration, tokenizer and other small files to ``target``."""
    for file in model_folder.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != ".metadata":
            shutil.copyfile(file, target / file.name)


def _shards(
    infos: list[TensorInfo], shard_bytes: int, files: Mapping[str, str] | None
) -> dict[str, list[TensorInfo]]:
    if files is not None:
        named: dict[str, list[TensorInfo]] = {}
        for info in infos:
            named.setdefault(files[info.name], []).append(info)
        return named
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if size and size + info.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += info.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def write_safetensors(file: Path, tensors: Iterable[Described], source: Source) -> None:
    """Writes one safetensors file, with one tensor in memory at a time.

    The widest dtypes come first, as the safetensors library orders them, so that every tensor
    is aligned. The file is readable for every user.

    Args:
        tensors: what is written.
        source: called once with the names in the order of the file; gives the tensors in that
            order, such as ``Checkpoint.read``.

    Raises:
        NotEnoughRoom: the disk has less space than the file takes, or fills up; nothing stays.
        ModelError: safetensors has no such dtype, or the source gave another tensor than
            described.
    """
    infos = sorted(tensors, key=lambda info: (-SIZES[info.dtype], info.name))
    # The library's own mark for tensors of torch; transformers asks for it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        if info.dtype not in _CODES:
            raise ModelError(f"{info.name} is {info.dtype}, which safetensors cannot hold.")
        header[info.name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    footprint.require(
        f"Writing {file}", RoomNeeded(memory=0, disk=end + len(written) + 8), file.parent
    )
    try:
        with disk_may_be_full(file):
            _write_tensors(file, written, infos, source)
    except NotEnoughRoom:
        file.unlink(missing_ok=True)
        raise
    file.chmod(0o644)


def _write_tensors(file: Path, header: bytes, infos: list[Described], source: Source) -> None:
    with file.open("wb") as sink:
        sink.write(len(header).to_bytes(8, "little") + header)
        announced = iter(infos)
        for name, tensor in source([info.name for info in infos]):
            info = next(announced)
            got = (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            if got != (expected := (info.name, info.dtype, tuple(info.shape))):
                raise ModelError(f"{file}: expected the tensor {expected}, got {got}.")
            if info.nbytes:
                sink.write(bytes_of(tensor.detach().cpu().contiguous()))


def held(state: Mapping[str, torch.Tensor]) -> tuple[list[TensorInfo], Source]:
    """A state dict in memory as what the writers take."""
    infos = [
        TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in state.items()
    ]

    def source(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, state[name]) for name in names)

    return infos, source


def write_torch(file: Path, content: Any) -> Path:
    """A file of ``torch.save``.

    Args:
        content: a state dict, or the object that a trainer nests it in.

    Raises:
        MissingExtra: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingExtra("Writing a torch checkpoint", "torch") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    file.chmod(0o644)
    return file


def write_distributed(folder: Path, content: Mapping[str, Any]) -> Path:
    """A folder of ``torch.distributed.checkpoint``, written by this process alone.

    Raises:
        MissingExtra: torch is not installed.
    """
    try:
        from torch.distributed.checkpoint.state_dict_saver import save
    except ImportError:
        raise MissingExtra("Writing a distributed checkpoint", "torch") from None
    with warnings.catch_warnings():
        # That one process writes alone is what was asked for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(dict(content), checkpoint_id=folder, no_dist=True)
    make_readable(folder)
    return folder
