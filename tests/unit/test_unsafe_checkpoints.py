"""A pickle that would run code is refused by the name of what it tried to load, and not run."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harness.checkpoint.formats.pickles import BOXES, Box, StoredTensor, read_pickle
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import write_distributed, write_torch
from sglang_harness.errors import BrokenCheckpoint, HarnessError, UnsafeCheckpoint


class Runs:
    """Unpickled, calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.fixture
def marker(tmp_path: Path):
    """A file that every payload would make, and none may."""
    file = tmp_path / "was run"
    yield file
    assert not file.exists()


def payloads(marker: Path) -> dict[str, Runs]:
    return {
        "os.system": Runs(os.system, f"touch '{marker}'"),
        "builtins.exec": Runs(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "builtins.eval": Runs(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "io.open": Runs(io.open, str(marker), "w"),
        "builtins.getattr": Runs(getattr, "text", "upper"),
    }


NAMES = ["os.system", "builtins.exec", "builtins.eval", "io.open", "builtins.getattr"]


def test_the_payloads_do_run_where_nobody_is_careful(tmp_path: Path):
    """The control: what is refused below is harmful."""
    for name in NAMES[:4]:
        marker = tmp_path / name
        pickle.loads(pickle.dumps(payloads(marker)[name]))
        assert marker.exists(), name


def assert_refused(path: Path, name: str) -> None:
    with pytest.raises(UnsafeCheckpoint) as caught:
        open_checkpoint(path)
    assert caught.value.loads == name
    assert name in str(caught.value)
    assert str(path) in str(caught.value)
    assert "nothing of it was run" in str(caught.value)
    assert caught.value.advice


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_torch_that_would_run_code_is_refused(tmp_path: Path, marker: Path, name: str):
    content = {"model.weight": torch.ones(2), "extra": payloads(marker)[name]}
    assert_refused(write_torch(tmp_path / "a.pt", content), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_pickle_that_would_run_code_is_refused(tmp_path: Path, marker: Path, name: str):
    file = tmp_path / "a.bin"
    file.write_bytes(pickle.dumps(payloads(marker)[name]))
    assert_refused(file, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_of_a_distributed_checkpoint_cannot_run_code_either(
    tmp_path: Path, marker: Path, name: str
):
    folder = write_distributed(tmp_path / "dcp", {"a.b": torch.ones(2)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["more"] = payloads(marker)[name]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpoint) as caught:
        open_checkpoint(folder)
    assert caught.value.loads == name
    assert ".metadata" in str(caught.value)


def test_a_part_of_a_distributed_checkpoint_cannot_run_code_either(tmp_path: Path, marker: Path):
    folder = write_distributed(tmp_path / "dcp", {"a.b": torch.ones(2)})
    (data,) = folder.glob("*.distcp")
    evil = io.BytesIO()
    torch.save(payloads(marker)["os.system"], evil)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    ((_, info),) = metadata.storage_data.items()
    info.offset, info.length = data.stat().st_size, len(evil.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    data.write_bytes(data.read_bytes() + evil.getvalue())
    opened = open_checkpoint(folder)
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        list(opened.read())


def test_one_bad_shard_among_good_ones_is_enough(tmp_path: Path, marker: Path):
    write_torch(tmp_path / "pytorch_model-00001-of-00002.bin", {"a.b": torch.ones(2)})
    evil = write_torch(
        tmp_path / "pytorch_model-00002-of-00002.bin", {"c.d": payloads(marker)["os.system"]}
    )
    with pytest.raises(UnsafeCheckpoint) as caught:
        open_checkpoint(tmp_path)
    assert str(evil) in str(caught.value)


def test_a_whole_model_that_was_pickled_is_refused_with_the_cure(tmp_path: Path):
    file = write_torch(tmp_path / "a.pt", torch.nn.Linear(2, 2))
    with pytest.raises(UnsafeCheckpoint, match=r"torch\.nn\.modules\.linear\.Linear") as caught:
        open_checkpoint(file)
    assert "state_dict()" in caught.value.advice


def test_a_torchscript_program_is_refused(tmp_path: Path):
    file = tmp_path / "a.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("a/constants.pkl", pickle.dumps(()))
        archive.writestr("a/code/__torch__.py", "import os")
    with pytest.raises(HarnessError, match="TorchScript"):
        open_checkpoint(file)


# --- the reader of pickles itself ---------------------------------------------------------------


def reads(content: bytes) -> Any:
    return read_pickle(io.BytesIO(content), Path("a file"))


def test_an_allowed_function_cannot_be_turned_into_another():
    # BUILD with slot state on what a pickle gets for a function: setattr(function, name, value).
    content = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"  # the answer for a function
        b"N}X\x05\x00\x00\x00_doesX\x03\x00\x00\x00abcs\x86b."  # (None, {"_does": "abc"})
    )
    reads(content)
    # Whatever it did to its own answer, the next one's is whole.
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        found = reads(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
    assert isinstance(found["a"], StoredTensor)


def test_what_lies_beside_the_weights_becomes_an_empty_box():
    for name in BOXES:
        module, _, last = name.rpartition(".")
        content = b"\x80\x02c" + module.encode() + b"\n" + last.encode() + b"\n)R."
        box = reads(content)
        assert isinstance(box, Box)
        assert box.kind == name
    # None of them is the real thing.
    assert not isinstance(reads(pickle.dumps({1, 2}, 2)), set)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x04",
        b"\x80\xff.",
        b"r\xff\xff\xff\xff.",  # LONG_BINPUT of an index that would take 32 GiB
        b"X\xff\xff\xff\x7fabc.",  # a string that is longer than the file
        b"ctorch\nFloatStorage\n)R.",  # a call of what is no function
        b"(I1\nI2\ntQ.",  # a persistent id of something else
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)K\x01tR.",
        b"\x82\x01.",  # an extension code
    ],
)
def test_a_broken_pickle_is_told_as_such(content: bytes):
    with pytest.raises(BrokenCheckpoint):
        reads(content)


OPCODES = (
    b"(.0123FIJKLMNPQRSTUVXabcdeghijlopqrstu}]\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x8f\x93\x94"
)
PARTS = [
    *(bytes([code]) for code in OPCODES),
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"cnumpy\ndtype\n",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"X\x07\x00\x00\x00storage",
    b"K\x01",
    b"}",
    b"b",
    b"R",
    b")",
]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=20).map(b"".join) | st.binary(max_size=40))
def test_no_pickle_does_anything_but_describe_or_fail(content: bytes):
    before = dict(os.environ), Path.cwd()
    with contextlib.suppress(HarnessError):
        reads(content)
    assert (dict(os.environ), Path.cwd()) == before
