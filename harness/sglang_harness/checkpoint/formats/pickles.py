"""Pickles of tensors, read without running anything from them.

A pickle is a program: it names functions and calls them. This reader knows the few names that
torch writes for tensors and answers each with a description (which storage, which shape); it
never imports what a pickle asks for. Names that trainers leave beside the weights (arguments,
NumPy's random state) become empty boxes. Any other name ends the reading, and is told.

Even a pickle that names nothing can do harm: seven bytes make CPython take 20 GB, for a memo of
the length that they ask for. So each is walked over first, and one that asks for more than its
length justifies is refused before it is unpickled.

The formats: torch/serialization.py, torch/_utils.py and torch/_weights_only_unpickler.py of
torch 2.13; CPython's Lib/pickle.py.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sglang_harness.checkpoint.formats.spans import SIZES
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

#: What is saved next to the weights and not needed here. An empty box stands in for each.
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
    """Stands for an object that is not needed. Takes what a pickle puts into it.

    What it was to be made from is not kept: each box would hold a copy, and one long tuple in a
    pickle can be the arguments of a million boxes.

    Attributes:
        kind: the name that the pickle gave, with its module.
        state: what it was to be filled with.
    """

    __slots__ = ("state",)
    kind = ""
    state: Any

    def __new__(cls, *_: Any, **__: Any) -> Box:
        made = super().__new__(cls)
        made.state = None
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def append(self, _: Any) -> None:
        return

    extend = add = append


class _Dict(dict[Any, Any]):
    """An OrderedDict without attributes. A pickle could have each of a million filled with a
    copy of one large dictionary; the one that torch sets (``_metadata``) is not needed."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None:
        return


class Reader(pickle.Unpickler):
    """One pickle. Every answer to a name is made for this reading, so that nothing that a
    pickle does to it is left afterwards.

    Args:
        content: the pickle, as :func:`cut` returns it.
        path: for messages.
        more_boxes: names that this kind of pickle has besides.
    """

    def __init__(
        self, content: bytes, path: Path, *, more_boxes: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(_Whole(content), encoding="utf-8", errors="replace")
        #: Items that may yet be copied from one object of the pickle into another.
        self._copies = len(content)
        self._path = path
        self._boxes = BOXES | more_boxes
        self._answers: dict[str, Any] = {}

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
        if full == "collections.OrderedDict":
            return _Function(self._ordered)
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

    def _ordered(self, items: Any = ()) -> _Dict:
        """collections.OrderedDict; Python 2 gave it its items as a list of pairs."""
        self._copies -= len(items)
        if self._copies < 0:
            raise _refuse("more copies of its items than it has bytes")
        # Looked at before they are hashed, for what the walk keeps out of other dictionaries.
        pairs = items.items() if isinstance(items, dict) else items
        if not all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], (str, int))
            for pair in pairs
        ):
            raise _refuse("a dictionary with keys that are neither text nor numbers")
        return _Dict(pairs)

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", StorageType(dtype), str(key), _, int(count)) if is_size(count):
                return Storage(dtype, key, count)
            case ("storage", StorageType(dtype), str(key), _, int(count), None) if is_size(count):
                return Storage(dtype, key, count)
            case (
                "storage",
                StorageType(dtype),
                str(key),
                _,
                int(whole),
                (_, int(first), int(count)),
            ) if is_size(whole) and 0 <= first <= first + count <= whole:
                return Storage(dtype, key, count, first)
        raise pickle.UnpicklingError("a storage that is not one of torch's")


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
) -> Any:
    """The object of the pickle that begins where ``file`` stands; tensors are described only.
    ``file`` is left where the pickle ends.

    Raises:
        UnsafeCheckpoint: names something other than tensors. Nothing was run.
        ShardedCheckpoint: holds shards of single ranks.
        BrokenCheckpoint: is cut short or no pickle, or asks for more than is in it.
    """
    try:
        pickled = cut(file)
        reader = Reader(pickled, path, more_boxes=more_boxes)
        content = reader.load()
        _check_sharing(content, _FREE_PARTS + 4 * len(pickled))
    except HarnessError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BrokenCheckpoint(
            f"{path} cannot be read: its pickle is broken ({reason.rstrip('.')}).",
            advice="Copy or write it again.",
        ) from None
    return content


class _Whole(io.BytesIO):
    """Bytes that can be peeked at: without that, the unpickler calls for every single one."""

    def peek(self, length: int = 1) -> bytes:
        here = self.tell()
        found = self.read(length)
        self.seek(here)
        return found


#: Bounds on one pickle, beyond what any real one has: that of a checkpoint with 100 000 tensors
#: takes 12 MB and 3.3 million steps. A file may be as long as its author likes (sparse, it costs
#: nothing), and a step can take 100 bytes of memory or, for a set, 200.
LONGEST = 512 << 20
_MOST_STEPS = 1 << 26
_MOST_SETS = 1 << 20

#: How many objects a key of a dictionary may be made of, if not told apart from its copies.
_LARGEST_KEY = 250

#: Read from a file at a time: a pickle may be followed by gigabytes of something else.
_PIECE = 64 << 10

#: More than any opcode has of bytes that are not counted by it.
_OPCODE = 16

# What opcodes do, as far as the walk needs to know (CPython's Lib/pickletools.py has all of it).
# By opcode: the bytes of an argument of fixed length, of something that is then on the stack;
_PLAIN = [-1] * 256
_PLAIN[0x4B], _PLAIN[0x4D], _PLAIN[0x4A], _PLAIN[0x47] = 1, 2, 4, 8
for _code in b"N)]}\x88\x89":
    _PLAIN[_code] = 0
# the bytes of a length that says how many follow;
_COUNTED = {
    **{ord(code): 1 for code in "UC\x8a\x8c"},
    **{ord(code): 4 for code in "TXB\x8b"},
    **{ord(code): 8 for code in "\x8d\x8e\x96"},
}
_SIGNED = frozenset(b"T\x8b")
# the lines that follow, as text;
_LINES = {ord(code): 1 for code in "ILFSVPpg"} | {ord("c"): 2, ord("i"): 2}
# and how many things are taken from the stack before one is put there.
_TAKES = {0x92: 3, 0x93: 2, ord("Q"): 1, ord("b"): 2, ord("a"): 2}


def cut(file: BinaryIO) -> bytes:
    """The pickle that begins where ``file`` stands, not unpickled. ``file`` is left at its end.

    Walks over its opcodes with a stack of its own, which holds for each object no more than how
    many objects a tuple or frozenset is made of: hashing and comparing those goes through all
    of them, each time that they are met and on C's stack. Takes time and memory in
    proportion to the pickle's length.

    Raises:
        pickle.UnpicklingError: it is cut short or asks for more than is in it.
    """
    begin = file.tell()
    left = file.seek(0, io.SEEK_END) - begin
    file.seek(begin)
    most = min(left, LONGEST)
    data = file.read(min(most, _PIECE))
    try:
        at, data = _walk(file, data, most)
    except (IndexError, struct.error):  # of the data, or of the stack
        raise _refuse("it ends early, or uses what it never made") from None
    file.seek(begin + at)
    return data[:at]


def _walk(file: BinaryIO, data: bytes, most: int) -> tuple[int, bytes]:
    """Where the pickle ends, and at least so much of it."""
    stack, marks, memo = bytearray(), list[int](), bytearray()
    memoised = sets = at = 0
    push, four, plain = stack.append, struct.Struct("<I").unpack_from, _PLAIN
    # Where more of the file has to be read: before anything could reach beyond what is there.
    enough = len(data) - (_OPCODE if len(data) < most else 0)
    for _ in repeat(None, _MOST_STEPS):
        if at >= enough:
            data = _longer(file, data, at, most)
            enough = len(data) - (_OPCODE if len(data) < most else 0)
        code = data[at]
        at += 1
        # In the order of how often they are met; the walk has to keep up with C.
        if code == 0x72:  # LONG_BINPUT
            (index,) = four(data, at)
            at += 4
            if index == len(memo):
                memo.append(stack[-1])
                memoised += 1
            else:
                memoised += _remember(memo, index, stack[-1], at)
        elif (size := plain[code]) >= 0:
            at += size
            push(1)
        elif code == 0x68:  # BINGET
            push(memo[data[at]])
            at += 1
        elif code == 0x28:  # MARK
            marks.append(len(stack))
        elif code == 0x52 or code == 0x81:  # REDUCE, NEWOBJ
            # Each call copies them, so that one long tuple could cost much many times.
            if stack.pop() > _LARGEST_KEY:
                raise _refuse(f"a call with more than {_LARGEST_KEY} arguments")
            stack[-1] = 1
        elif code == 0x94:  # MEMOIZE
            memoised += _remember(memo, memoised, stack[-1], at)
        elif code == 0x71:  # BINPUT
            memoised += _remember(memo, data[at], stack[-1], at)
            at += 1
        elif code in _COUNTED:
            size = _COUNTED[code]
            length = int.from_bytes(data[at : at + size], "little", signed=code in _SIGNED)
            at += size
            if not 0 <= length <= most - at:
                raise _refuse(f"{length} bytes are said to follow where {most - at} are left")
            at += length
            push(1)
        elif 0x85 <= code <= 0x87:  # TUPLE1 to TUPLE3
            whole = 1
            for _item in range(code - 0x84):
                whole += stack.pop()
            push(min(whole, 255))
        elif code == 0x74:  # TUPLE
            mark = marks.pop()
            whole = 1 + sum(stack[mark:])
            del stack[mark:]
            push(min(whole, 255))
        elif code in _TAKES:
            del stack[len(stack) - _TAKES[code] :]
            push(1)
        elif code == 0x6A:  # LONG_BINGET
            push(memo[four(data, at)[0]])
            at += 4
        elif code == 0x73:  # SETITEM
            _check_keys(stack[-2:-1])
            del stack[-2:]
        elif code in b"ud":  # SETITEMS, DICT
            mark = marks.pop()
            _check_keys(stack[mark::2])
            del stack[mark:]
            if code == 0x64:
                push(1)
        elif code in b"elo1":  # APPENDS, LIST, OBJ, POP_MARK
            del stack[marks.pop() :]
            if code in b"lo":
                push(1)
        elif code in _LINES:
            for _line in range(_LINES[code]):
                while (end := data.find(b"\n", at)) < 0:
                    data = _longer(file, data, len(data), most)
                line, at = data[at:end], end + 1
            enough = len(data) - (_OPCODE if len(data) < most else 0)
            if code == 0x67:  # GET
                push(memo[_index(line)])
            elif code == 0x70:  # PUT
                memoised += _remember(memo, _index(line), stack[-1], at)
            else:
                if code == 0x69:  # INST
                    del stack[marks.pop() :]
                push(1)
        elif code == 0x2E:  # STOP
            return at, data
        elif code == 0x80:  # PROTO
            at += 1
        elif code == 0x95:  # FRAME
            length = int.from_bytes(data[at : at + 8], "little")
            at += 8
            if length > most - at:
                raise _refuse(f"{length} bytes are said to follow where {most - at} are left")
        elif code in b"\x8f\x90\x91":  # EMPTY_SET, ADDITEMS, FROZENSET
            sets += 1
            if sets > _MOST_SETS:
                raise _refuse(f"it makes more than {_MOST_SETS} sets")
            if code != 0x8F:
                mark = marks.pop()
                _check_keys(stack[mark:])
                whole = 1 + sum(stack[mark:])
                del stack[mark:]
            if code != 0x90:
                push(1 if code == 0x8F else min(whole, 255))
        elif code == 0x30:  # POP
            if marks and marks[-1] == len(stack):
                marks.pop()
            else:
                stack.pop()
        elif code == 0x32:  # DUP
            push(stack[-1])
        else:
            raise _refuse(f"an unknown opcode, or one that torch does not use, {code:#x}")
    raise _refuse(f"it takes more than {_MOST_STEPS} steps")


def _longer(file: BinaryIO, data: bytes, at: int, most: int) -> bytes:
    """``data`` with more of the file, so that there is something at ``at``."""
    if at >= most:
        raise _refuse(f"it is longer than {most} bytes" if most == LONGEST else "it ends early")
    # Twice as much each time, so that all the copies together are no more than two.
    more = file.read(min(most, max(2 * len(data), at + _PIECE)) - len(data))
    if not more:
        raise _refuse("it became shorter meanwhile")
    return data + more


def _remember(memo: bytearray, index: int, size: int, at: int) -> bool:
    """Whether that index is new."""
    # CPython takes 16 bytes for every index up to the largest one, used or not.
    if index > at:
        raise _refuse(f"an object number {index} is remembered within {at} bytes")
    if index >= len(memo):
        memo.extend(bytes(index + 1 - len(memo)))
    new = not memo[index]
    memo[index] = size
    return new


def _index(line: bytes) -> int:
    if not line.isdigit() or len(line) > 18:
        raise _refuse("a number that is not valid")
    return int(line)


def _check_keys(sizes: bytearray) -> None:
    if sizes and max(sizes) > _LARGEST_KEY:
        raise _refuse(f"a key of more than {_LARGEST_KEY} parts")


#: How many more parts an object may seem to have than its pickle has room for.
_FREE_PARTS = 1 << 20


def _check_sharing(content: Any, most: int) -> None:
    """Refuses an object that a walk over it would find to have more than ``most``
    parts: one that holds itself, or holds things many times over that do so too.

    Only what is walked over here counts: dictionaries, lists, tuples and text. What is in a box
    is read field by field.
    """
    sizes: dict[int, int] = {}  # 0 while it is inside of that one
    todo = [content]
    while todo:
        it = todo[-1]
        if sizes.get(id(it)) or type(it) not in _NESTS:
            todo.pop()
            continue
        inside = [*it.keys(), *it.values()] if isinstance(it, dict) else it
        if id(it) not in sizes:
            sizes[id(it)] = 0
            for part in inside:
                if type(part) in _NESTS and not sizes.get(id(part)):
                    if id(part) in sizes:
                        raise _refuse("an object that holds itself")
                    todo.append(part)
            continue
        todo.pop()
        sizes[id(it)] = 1 + sum(
            len(part) if type(part) is str else sizes.get(id(part), 1) for part in inside
        )
        if sizes[id(it)] > most:
            raise _refuse("an object that holds others too many times over")


_NESTS = frozenset({_Dict, dict, list, tuple})


class _Function:
    """A function that a pickle may call. Callable, and nothing else can be done with it."""

    __slots__ = ("_does",)

    def __init__(self, does: Callable[..., Any]) -> None:
        self._does = does

    def __call__(self, *arguments: Any) -> Any:
        return self._does(*arguments)


def _refuse(why: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(why)


#: More than any tensor has of dimensions; torch itself computes with 64 at most.
_DIMENSIONS = 64


def is_size(given: Any) -> bool:
    """Whether it is a number that a length in a file can be: torch's own are of 64 bits."""
    return type(given) is int and 0 <= given < 1 << 63


def is_shape(given: Any) -> bool:
    """Whether it can be a tensor's shape or stride, or where a part of one begins."""
    return (
        isinstance(given, (tuple, list))
        and len(given) <= _DIMENSIONS
        and all(is_size(n) for n in given)
    )


def numbers(given: Any) -> tuple[int, ...]:
    """A shape, a stride, or where a part of a tensor begins.

    Raises:
        pickle.UnpicklingError: it is not one.
    """
    if not is_shape(given):
        raise _refuse("an invalid shape or stride")
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
    shape, stride = numbers(shape), numbers(stride)
    if not is_size(offset) or len(shape) != len(stride):
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
    "collections.defaultdict": lambda *_: {},
    "torch.Size": lambda shape=(): numbers(shape),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_wrapper_subclass": _of_subclass,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: NoValues("on the meta device"),
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
