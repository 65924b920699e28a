"""A file that asks for far more memory or time than its length justifies is refused at once.

Each is opened in a process of its own that may take little more memory than it has, and little
time: without that, a failure of one of these tests could take the machine with it.
"""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_harness.checkpoint.formats import pickles
from sglang_harness.checkpoint.formats.pickles import read_pickle
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import write_distributed, write_torch
from sglang_harness.errors import BrokenCheckpoint

OPENING = """
import json, resource, sys
from pathlib import Path
from sglang_harness.checkpoint.reading import open_checkpoint

def of_memory(what):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(what)]
    return int(line.split()[1]) << 10

may = of_memory("VmSize:") + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (may, may))
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
before = of_memory("VmHWM:")
try:
    open_checkpoint(sys.argv[1])
    error, text = "", ""
except Exception as caught:
    error, text = type(caught).__name__, str(caught)
print(json.dumps([error, text[:2000], (of_memory("VmHWM:") - before) >> 20]))
"""


def assert_refused(path: Path, why: str, error: str = "BrokenCheckpoint", limit: int = 64) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OPENING, str(path)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, (ended.returncode, ended.stderr[-500:])
    kind, text, megabytes = json.loads(ended.stdout)
    assert (kind, why in text) == (error, True), (kind, text)
    assert megabytes < limit


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


ORDERED = b"ccollections\nOrderedDict\n"


def doubled(made: bytes, times: int = 60) -> bytes:
    """Pickled: a thing in a pair of it with itself, and so on. Looks like 2^60 of them."""
    return made + b"2\x86" * times


def mappings(times: int) -> bytes:
    """Pickled: dictionaries that each hold the one before under two names."""
    return b"}" + b"".join(
        b"r%b0}(X\x01\x00\x00\x00aj%bX\x01\x00\x00\x00bj%bu" % ((number(place, 4),) * 3)
        for place in range(times)
    )


HOSTILE = {
    # What killed a machine: the memo gets as long as its largest index says.
    "LONG_BINPUT": (b"NrIIII.", "is remembered within"),
    "LONG_BINPUT, less": (b"]r" + number(80 << 20, 4) + b".", "is remembered within"),
    "PUT": (b"]p66666666\n.", "is remembered within"),
    "PUT of a long number": (b"]p" + b"6" * 5000 + b"\n.", "a number that is not valid"),
    # Memory is taken for as many bytes as are said to follow.
    **{
        f"{code!r} of {length}": (
            code + number(length, size) + b".",
            f"{length} bytes are said to follow",
        )
        for code, size, length in [
            (b"T", 4, (1 << 31) - 1),
            (b"X", 4, (1 << 32) - 1),
            (b"B", 4, (1 << 32) - 1),
            (b"\x8b", 4, (1 << 31) - 1),
            (b"\x8d", 8, 3 << 30),
            (b"\x8e", 8, 3 << 30),
            (b"\x95", 8, 3 << 30),
            (b"\x96", 8, 3 << 30),
            (b"\x96", 8, 1 << 56),
        ]
    },
    "a negative length": (b"\x8b\xff\xff\xff\xff.", "-1 bytes are said to follow"),
    # One long thing, copied as often as a few bytes ask for it.
    "shapes": (
        b"ctorch\nSize\nq\x000]q\x01(" + b"K\x01" * 50_000 + b"eh\x01\x85q\x020("
        + b"h\x00h\x02R" * 5_000 + b"l.",
        "an invalid shape or stride",
    ),
    "ordered dictionaries": (
        ORDERED + b"q\x000]q\x01(" + b"".join(b"M%bN\x86" % number(n, 2) for n in range(20_000))
        + b"eh\x01\x85q\x020(" + b"h\x00h\x02R" * 2_000 + b"l.",
        "more copies of its items",
    ),
    "arguments": (
        b"cnumpy\ndtype\nq\x000(" + b"N" * 100_000 + b"tq\x010("
        + b"h\x00h\x01\x81" * 3_000 + b"l.",
        "a call with more than 250 arguments",
    ),
    # One thing that holds others so often that whoever goes through it never ends.
    "a key": (b"}" + doubled(b")") + b"Ns.", "a key of more than"),
    "keys": (b"}(" + doubled(b")") + b"Nu.", "a key of more than"),
    "a key of a dictionary that is made at once": (b"(" + doubled(b")") + b"Nd.", "a key of more"),
    "a member": (b"\x8f(" + doubled(b")") + b"\x90.", "a key of more than"),
    "a frozen member": (b"((" + doubled(b")") + b"\x91\x91.", "a key of more than"),
    "a remembered key": (b"}" + doubled(b")") + b"q\x000h\x00Ns.", "a key of more than"),
    "a key among pairs": (
        ORDERED + b"]" + doubled(b")") + b"N\x86a\x85R.",
        "keys that are neither text nor numbers",
    ),
    # Hashing goes down C's stack, and off its end.
    "a deep key": (b"})" + b"\x85" * 300_000 + b"Ns.", "a key of more than"),
    "mappings": (mappings(60) + b".", "holds others too many times over"),
    "a mapping that holds itself": (
        b"}q\x00(" + b"".join(b"X\x01\x00\x00\x00%ch\x00" % c for c in range(97, 123)) + b"u.",
        "holds itself",
    ),
    "sets": (b"(" + b"\x8f" * ((1 << 20) + 1) + b"l.", "sets"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_asks_for_more_than_is_in_it_is_refused(tmp_path: Path, name: str):
    content, why = HOSTILE[name]
    file = tmp_path / "a.bin"
    file.write_bytes(content)
    assert_refused(file, why)


def test_what_fills_an_ordered_dictionary_is_not_copied_into_each(tmp_path: Path):
    state = b"}q\x01(" + b"".join(b"X\x06\x00\x00\x00%06dN" % n for n in range(10_000)) + b"u0"
    file = tmp_path / "a.bin"
    file.write_bytes(ORDERED + b"q\x000" + state + b"(" + b"h\x00)Rh\x01b" * 3_000 + b"l.")
    # Is nothing of torch's, but nothing that takes memory either.
    assert_refused(file, "not one of torch.save", "ModelError")


@pytest.mark.parametrize("place", ["zip", "distributed"])
def test_pickles_are_walked_over_wherever_they_are(tmp_path: Path, place: str):
    content, why = HOSTILE["LONG_BINPUT"]
    file = tmp_path / "a.pt"
    if place == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", content)
    else:
        (tmp_path / ".metadata").write_bytes(content)
        file = tmp_path
    assert_refused(file, why)


@pytest.mark.parametrize(
    ("bound", "value", "why"),
    [("LONGEST", 1 << 20, "longer than 1048576 bytes"), ("_MOST_STEPS", 1 << 10, "1024 steps")],
)
def test_no_pickle_is_longer_than_any_real_one(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: int, why: str
):
    monkeypatch.setattr(pickles, bound, value)
    with pytest.raises(BrokenCheckpoint, match=why):
        read_pickle(io.BytesIO(b"N0" * (1 << 20) + b"N."), Path("a"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_whatever_a_trainer_keeps_passes_the_walk(protocol: int):
    shared = (1, 2.5, "three", None)
    content = {
        "text": ["ä" * 70_000, "line\nline", "", b"bytes" * 300],
        "numbers": [0, -1, 255, 256, 65_536, -(1 << 31), 1 << 40, 1 << 3000, 0.5, True, False],
        "nested": [{(1, ("a", 2)): [shared] * 300}, (), (1,), tuple(range(1000))],
        "many": [{str(n): [n, shared]} for n in range(3_000)],
    }
    pickled = pickle.dumps(content, protocol)
    file = io.BytesIO(b"before" + pickled + b"after" * 100_000)
    file.seek(6)
    # Protocols below 3 have no bytes: they call a function for them, which is a box here.
    expected = pickle.loads(pickled)
    found = read_pickle(file, Path("a"))
    if protocol < 3:
        del expected["text"][3], found["text"][3]
    assert found == expected
    assert file.tell() == 6 + len(pickled)


# --- zip archives --------------------------------------------------------------------------------


def repacked(file: Path, more: dict[str, bytes], compression: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = {
            name: archive.read(name)
            for name in archive.namelist()
            if not any(name.endswith(end) for end in more)
        }
    root = next(name for name in entries if name.endswith("data.pkl")).removesuffix("data.pkl")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        for name, content in more.items():
            archive.writestr(root + name, content, compression)


@pytest.mark.parametrize(
    ("compression", "why"),
    [
        (zipfile.ZIP_DEFLATED, "with compression"),
        (zipfile.ZIP_BZIP2, "with compression"),
        (zipfile.ZIP_STORED, "big-endian"),
    ],
)
def test_the_order_of_bytes_is_no_place_for_a_bomb(tmp_path: Path, compression: int, why: str):
    file = write_torch(tmp_path / "a.pt", {"a.b": torch.ones(2)})
    repacked(file, {"byteorder": bytes(200 << 20)}, compression)
    assert_refused(file, why, "ModelError")


@pytest.mark.parametrize("entry", ["data.pkl", "data/0", "byteorder"])
def test_an_entry_that_says_it_is_longer_than_the_file_is_refused(tmp_path: Path, entry: str):
    file = write_torch(tmp_path / "a.pt", {"a.b": torch.ones(2)})
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        at = archive.start_dir
    while not content[at + 46 :].startswith(b"a/" + entry.encode()):
        at = content.index(b"PK\x01\x02", at + 4)
    content[at + 20 : at + 28] = number(0x7FFFFFF0, 4) * 2  # compressed and not
    file.write_bytes(content)
    assert_refused(file, "bytes of a/" + entry + " are not there")


# --- the other formats ---------------------------------------------------------------------------


def distributed(tmp_path: Path, change: Any) -> Path:
    folder = write_distributed(tmp_path / "dcp", {"a.b": torch.ones(4)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def in_parts(metadata: Any, count: int, length: int) -> None:
    """As if the tensor lay in so many parts, all of them where it is now."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    told = metadata.state_dict_metadata["a.b"]
    ((_, info),) = metadata.storage_data.items()
    told.size = torch.Size([count * length])
    starts = [torch.Size([part * length]) for part in range(count)]
    told.chunks = [ChunkStorageMetadata(start, torch.Size([length])) for start in starts]
    metadata.storage_data = {MetadataIndex("a.b", start): info for start in starts}


@pytest.mark.parametrize(
    ("count", "length", "why"),
    [(2, 1 << 40, "fewer bytes than its shape needs"), (1000, 4, "shorter than the parts")],
)
def test_parts_that_are_larger_than_their_files_are_refused(
    tmp_path: Path, count: int, length: int, why: str
):
    folder = distributed(tmp_path, lambda metadata: in_parts(metadata, count, length))
    assert_refused(folder, why)


def laughs(times: int = 60) -> Any:
    made: Any = ()
    for _ in range(times):
        made = (made, made)
    return made


def test_what_stands_in_for_a_name_is_not_written_out(tmp_path: Path):
    folder = distributed(
        tmp_path, lambda metadata: metadata.planner_data.update({"a.b": (laughs(), "b")})
    )
    assert_refused(folder, "expected names of text")


def test_what_stands_in_for_a_transformation_is_not_written_out(tmp_path: Path):
    def change(metadata: Any) -> None:
        ((_, info),) = metadata.storage_data.items()
        info.transform_descriptors = laughs()

    assert_refused(distributed(tmp_path, change), "transformations", "ModelError")


@pytest.mark.parametrize("field", ["offset", "length"])
@pytest.mark.parametrize("value", [-1, 1 << 70, "1"])
def test_a_place_that_is_none_is_refused(tmp_path: Path, field: str, value: Any):
    def change(metadata: Any) -> None:
        ((_, info),) = metadata.storage_data.items()
        setattr(info, field, value)

    with pytest.raises(BrokenCheckpoint, match="expected a number of bytes"):
        open_checkpoint(distributed(tmp_path, change))


@pytest.mark.parametrize(
    "told",
    [
        {"shape": [1] * 3_000_000, "data_offsets": [0, 4]},
        {"shape": [10**4000] * 3_000, "data_offsets": [0, 4]},
        {"shape": [10**4299], "data_offsets": [0, 4 * 10**4299]},
    ],
    ids=["dimensions", "lengths", "offsets"],
)
def test_a_header_of_numbers_that_no_tensor_has_is_refused(tmp_path: Path, told: Any):
    header = json.dumps({"a": {"dtype": "F32", **told}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(number(len(header), 8) + header + bytes(8))
    assert_refused(file, "an invalid description of a", limit=256)


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, 99_000_000])
def test_a_header_that_says_it_is_longer_than_the_file_is_refused(tmp_path: Path, length: int):
    file = tmp_path / "a.safetensors"
    file.write_bytes(number(length, 8) + b"{}" + bytes(8))
    assert_refused(file, "is not a safetensors file")


@pytest.mark.parametrize("count", [10**8, 10**200])
def test_a_name_that_says_there_are_very_many_shards_is_no_reason_to_count_them(
    tmp_path: Path, count: int
):
    write_torch(tmp_path / "x.bin", {"a.b": torch.ones(2)})
    (tmp_path / "x.bin").rename(tmp_path / f"x-1-of-{count}.bin")
    assert_refused(tmp_path, "number 2 is missing", "ModelError")


def test_an_index_that_is_very_long_or_deep_is_refused(tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[" * 200_000)
    assert_refused(tmp_path, "cannot be read as an index")
    with index.open("wb") as file:
        file.truncate(300 << 20)
    assert_refused(tmp_path, "cannot be read as an index")
