"""Pickles of tensors, read without running anything from them.

A pickle is a program: it names functions and calls them. This reader knows the few names that
torch writes for tensors and answers each with a description (which storage, which shape); it
never imports what a pickle asks for. Names that trainers leave beside the weights (arguments,
NumPy's random state) become empty boxes. Any other name ends the reading, and is told.

The formats: torch/serialization.py, torch/_utils.py and torch/_weights_only_unpickler.py of
torch 2.13; CPython's Lib/pickle.py.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sglang_harness.checkpoint.spans import SIZES
from sglang_harness.errors import (
    BrokenCheckpoint,
    HarnessError,
    ShardedCheckpoint,
    UnsafeCheckpoint,
)

#: Classes of storage, as torch has named them since long before it had untyped ones.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}

#: What lies beside the weights and means nothing here. An empty box stands in for each.
BOXES = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.frozenset",
        "builtins.set",
        "builtins.slice",
        "collections.Counter",
        "collections.deque",
        "datetime.datetime",
        "datetime.timedelta",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib._local.Path",
        "pathlib._local.PosixPath",
        "torch.device",
        "torch.strided",
        "torch.serialization._get_layout",
    }
)

#: Where torch's classes of sharded tensors live.
_SHARDS = (
    "torch.distributed._shard.",
    "torch.distributed._tensor",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)

#: How a system's module is called where people know it by another name.
_KNOWN_AS = {"posix": "os", "nt": "os"}


class Storage(NamedTuple):
    """A run of elements under a key.

    Attributes:
        elements: how many.
        first: where these begin, in elements from the start of what is kept under the key.
    """

    dtype: str
    key: str
    elements: int
    first: int = 0


class StoredTensor(NamedTuple):
    """A view of a storage; offset and stride in elements of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class NoValues(NamedTuple):
    """A tensor that was saved without its values (on torch's meta device)."""

    why: str


class DType(NamedTuple):
    name: str


class StorageType(NamedTuple):
    dtype: str


class Box:
    """Stands for an object of which nothing is needed. Takes what a pickle puts into it.

    Attributes:
        kind: the name that the pickle gave, with its module.
        arguments: what it was to be made from.
        state: what it was to be filled with.
    """

    __slots__ = ("arguments", "state")
    kind = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> Box:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def append(self, _: Any) -> None:
        return

    extend = add = append


class Reader(pickle.Unpickler):
    """One pickle. Every answer to a name is made for this reading, so that nothing that a
    pickle does to it is left afterwards.

    Args:
        file: stands where the pickle begins; left where it ends.
        path: for messages.
        more_boxes: names that this kind of pickle has besides.
    """

    def __init__(
        self, file: BinaryIO, path: Path, *, more_boxes: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._path = path
        self._boxes = BOXES | more_boxes
        self._answers: dict[str, Any] = {}
        self.storages: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Protocol 2, which torch writes, has Python 2's name for it.
        module = "builtins" if module == "__builtin__" else module
        full = f"{module}.{name}"
        if full not in self._answers:
            self._answers[full] = self._answer(module, name, full)
        return self._answers[full]

    def _answer(self, module: str, name: str, full: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return StorageType(STORAGES[name])
        if module == "torch" and name in SIZES:
            return DType(name)
        if full in _FUNCTIONS:
            return _Function(_FUNCTIONS[full])
        if full in _TENSOR_CLASSES:
            return type("TensorClass", (Box,), {"kind": full})
        if full in self._boxes:
            return type("Box", (Box,), {"kind": full, "__slots__": ()})
        if module.startswith(_SHARDS):
            raise ShardedCheckpoint(
                f"{self._path} holds the shard of one rank ({full}), not whole tensors.",
                advice=CONVERSION,
            )
        known = ".".join([_KNOWN_AS.get(module, module), name])
        told = known if known == full else f"{known} (as {full})"
        raise UnsafeCheckpoint(
            f"{self._path} is a pickle that tries to load {told}; it was stopped there and "
            "nothing of it was run.",
            known,
            advice="Save the tensors alone: torch.save(model.state_dict(), path), or safetensors.",
        )

    def persistent_load(self, pid: Any) -> Storage:
        storage = self._storage(pid)
        self.storages.setdefault(storage.key, storage.dtype)
        return storage

    def _storage(self, pid: Any) -> Storage:
        match pid:
            case ("storage", StorageType(dtype), str(key), _, int(count)) if count >= 0:
                return Storage(dtype, key, count)
            case ("storage", StorageType(dtype), str(key), _, int(count), None) if count >= 0:
                return Storage(dtype, key, count)
            case (
                "storage",
                StorageType(dtype),
                str(key),
                _,
                int(whole),
                (_, int(first), int(count)),
            ) if 0 <= first <= first + count <= whole:
                return Storage(dtype, key, count, first)
        raise pickle.UnpicklingError("a storage that is none of torch's")


#: What to do with the files of single ranks.
CONVERSION = (
    "Save whole tensors or a folder of torch.distributed.checkpoint on all ranks: "
    "dcp.save({'model': get_model_state_dict(model)}, checkpoint_id=folder), which is read here; "
    "verl's per-rank files are merged by: python -m verl.model_merger merge --backend fsdp "
    "--local_dir FOLDER --target_dir MERGED."
)


def read_pickle(
    file: BinaryIO,
    path: Path,
    *,
    more_boxes: frozenset[str] = frozenset(),
    storages: dict[str, str] | None = None,
) -> Any:
    """The object of the pickle that begins where ``file`` stands; tensors are described only.

    Args:
        storages: is given the dtype of every storage that the pickle names, by its key.

    Raises:
        UnsafeCheckpoint: names something that is no tensor. Nothing was run.
        ShardedCheckpoint: holds shards of single ranks.
        BrokenCheckpoint: is cut short or no pickle.
    """
    reader = Reader(file, path, more_boxes=more_boxes)
    try:
        content = reader.load()
    except HarnessError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BrokenCheckpoint(
            f"{path} cannot be read: its pickle is broken ({reason.rstrip('.')}).",
            advice="Copy or write it again.",
        ) from None
    if storages is not None:
        storages |= reader.storages
    return content


class _Function:
    """A function that a pickle may call. Callable, and nothing else can be done with it."""

    __slots__ = ("_does",)

    def __init__(self, does: Callable[..., Any]) -> None:
        self._does = does

    def __call__(self, *arguments: Any) -> Any:
        return self._does(*arguments)


def _refuse(why: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(why)


def _numbers(given: Any) -> tuple[int, ...]:
    if not isinstance(given, (tuple, list)) or not all(
        type(number) is int and number >= 0 for number in given
    ):
        raise _refuse("a shape or stride that is none")
    return tuple(given)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2 (…, requires_grad, hooks, metadata)."""
    if not isinstance(storage, Storage):
        raise _refuse("a tensor without a storage")
    return _view(storage, storage.dtype, offset, shape, stride, rest[2:3])


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *rest: Any
) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3: dtypes that never had a storage class, over bytes."""
    if not isinstance(storage, Storage) or not isinstance(dtype, DType):
        raise _refuse("a tensor without a storage or dtype")
    size = SIZES[dtype.name]
    bytes_, first = (n * SIZES[storage.dtype] for n in (storage.elements, storage.first))
    if first % size:
        raise _refuse("a storage that begins inside an element")
    whole = Storage(dtype.name, storage.key, bytes_ // size, first // size)
    return _view(whole, dtype.name, offset, shape, stride, rest[:1])


def _view(
    storage: Storage, dtype: str, offset: Any, shape: Any, stride: Any, metadata: tuple[Any, ...]
) -> StoredTensor:
    if metadata and isinstance(metadata[0], dict) and any(metadata[0].values()):
        raise _refuse("a tensor that is a conjugate or negative view")
    shape, stride = _numbers(shape), _numbers(stride)
    if type(offset) is not int or offset < 0 or len(shape) != len(stride):
        raise _refuse("a tensor whose shape and stride do not belong together")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _parameter(tensor: Any, *_: Any) -> Any:
    if not isinstance(tensor, (StoredTensor, NoValues)):
        raise _refuse("a parameter without a tensor")
    return tensor


def _of_subclass(*_: Any) -> Any:
    """torch._utils._rebuild_wrapper_subclass. The class is named after it: a DTensor's is
    refused as a shard before this is called, and that of a quantised tensor by its name."""
    raise _refuse("a tensor of a class of its own")


def _from_type(rebuild: Any, kind: Any, arguments: Any, _: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes of its own."""
    if not isinstance(rebuild, _Function) or getattr(kind, "kind", "") not in _TENSOR_CLASSES:
        raise _refuse("a tensor of an unknown class")
    return rebuild(*arguments)


_TENSOR_CLASSES = frozenset(
    {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"}
)

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": lambda shape=(): _numbers(shape),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_wrapper_subclass": _of_subclass,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: NoValues("on the meta device"),
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
