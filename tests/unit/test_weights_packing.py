"""Buckets, and the body that carries one: what arrives is what was packed."""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_harness.checkpoint.reading import TensorInfo
from sglang_harness.errors import ModelError
from sglang_harness.weights.routes.buckets import ALIGNMENT, Bucket, plan
from sglang_harness.weights.routes.packing import (
    PIECE,
    TensorBody,
    buffer,
    in_base64,
    pieces,
    place,
)

torch = pytest.importorskip("torch")


#: What SGLang 0.5.23 lets a pickle name, as far as tensors need it (its SafeUnpickler).
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch", "Size"),
    ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"),
}


class Metadata:
    """What SGLang's class of that name is: a record that is unpickled by its fields."""


class AsSGLang(pickle.Unpickler):
    """Loads as strictly as SGLang 0.5.21 and later: exact names, storages with weights_only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if (module, name) in ALLOWED or isinstance(getattr(torch, name, None), torch.dtype):
            if name == "FlattenedTensorMetadata":
                return Metadata
            return super().find_class(module, name)
        raise RuntimeError(f"blocked {module}.{name}")


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(33, 7, generator=generator)
    return {
        "a.weight": drawn,
        "a.bias": drawn[0].bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "two": torch.tensor([1.0, -2.0]),  # eight bytes, as long as a length
        "half": drawn.half().t().contiguous(),
        "eighth": drawn.to(torch.float8_e4m3fn),
        "whole": torch.arange(-9, 9),
        "odd": torch.arange(3, dtype=torch.uint8),
        "flag": torch.tensor([True, False, True]),
        "ünïcode.weight": drawn[:2],
    }


def packed(given: dict[str, Any]) -> tuple[Any, Bucket]:
    infos = [TensorInfo(n, str(t.dtype)[6:], tuple(t.shape)) for n, t in given.items()]
    (bucket,) = plan(infos, 1 << 30)
    room = buffer(bucket.extent)
    for slot in bucket.slots:
        place(room, slot).copy_(given[slot.name])
    return room, bucket


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("flattened", [False, True])
def test_what_is_unpickled_is_what_was_packed(flattened: bool, ranks: int):
    given = tensors()
    room, bucket = packed(given)
    fields = {"load_format": None, "weight_version": "v1"}
    body = TensorBody(pieces(room, bucket, flattened=flattened), ranks=ranks, fields=fields)
    sent = b"".join(body)
    assert len(sent) == len(body)
    assert body.handed_over_at is not None
    read = json.loads(sent)
    payloads = read.pop("serialized_named_tensors")
    assert read == fields
    assert len(payloads) == ranks
    for payload in payloads:
        got = AsSGLang(io.BytesIO(base64.b64decode(payload, validate=True))).load()
        if flattened:
            whole = got["flattened_tensor"]
            assert whole.dtype == torch.uint8
            got = [
                (m.name, whole[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape))
                for m in got["metadata"]
            ]
            assert all(m.numel == m.end_idx - m.start_idx for m in bucket_metadata(payload))
        assert [name for name, _ in got] == list(given)
        for name, tensor in got:
            assert tensor.dtype == given[name].dtype
            assert tensor.shape == given[name].shape
            assert same_bytes(tensor, given[name]), name


def bucket_metadata(payload: str) -> list[Any]:
    found: list[Any] = AsSGLang(io.BytesIO(base64.b64decode(payload))).load()["metadata"]
    return found


def same_bytes(one: Any, other: Any) -> bool:
    return bool(torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other))))


def test_a_plain_pickle_of_torch_loads_the_same():
    """torch's own reader, without SGLang's strictness: what 0.5.20 and before use."""
    given = tensors()
    room, bucket = packed(given)
    data = b"".join(bytes(p) for p in pieces(room, bucket, flattened=False))
    for name, tensor in pickle.loads(data):
        assert same_bytes(tensor, given[name])


def test_the_bucket_names_sglangs_own_class(monkeypatch: pytest.MonkeyPatch):
    room, bucket = packed(tensors())
    data = b"".join(bytes(p) for p in pieces(room, bucket, flattened=True))
    name = "sglang.srt.weight_sync.tensor_bucket"
    for module in ("sglang", "sglang.srt", "sglang.srt.weight_sync", name):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    sys.modules[name].FlattenedTensorMetadata = Metadata  # type: ignore[attr-defined]
    loaded = pickle.loads(data)
    assert {type(m) for m in loaded["metadata"]} == {Metadata}


def test_the_bytes_travel_without_a_copy():
    room, bucket = packed({"w": torch.zeros(1000)})
    parts = pieces(room, bucket, flattened=True)
    room[0] = 7
    views = [p for p in parts if isinstance(p, memoryview)]
    assert [v[0] for v in views] == [7], "the body reads the buffer itself"


@given(st.lists(st.binary(max_size=40), max_size=12))
@settings(deadline=None)
def test_pieces_of_base64_join(parts: list[bytes]):
    assert b"".join(in_base64(parts)) == base64.b64encode(b"".join(parts))


def test_large_pieces_are_encoded_a_part_at_a_time():
    data = bytes(range(256)) * (PIECE // 100)
    encoded = list(in_base64([data, b"xy"]))
    assert b"".join(encoded) == base64.b64encode(data + b"xy")
    assert max(map(len, encoded)) == PIECE // 3 * 4


# --- buckets ---------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from(["uint8", "bfloat16", "float32"]), st.integers(1, 50)),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 400),
)
@settings(deadline=None)
def test_every_tensor_has_one_place_and_no_bucket_is_too_full(drawn, limit):
    infos = [TensorInfo(f"t{i}", dtype, (n,)) for i, (dtype, n) in enumerate(drawn)]
    buckets = plan(infos, limit)
    assert [n for b in buckets for n in b.names] == [i.name for i in infos]
    assert [b.number for b in buckets] == list(range(len(buckets)))
    for bucket in buckets:
        assert bucket.extent <= limit or len(bucket.slots) == 1
        end = 0
        for slot in bucket.slots:
            assert slot.start % ALIGNMENT == 0
            assert slot.start >= end
            end = slot.end
    assert sum(b.nbytes for b in buckets) == sum(i.nbytes for i in infos)


def test_nothing_to_push_is_an_error():
    with pytest.raises(ModelError, match="no tensor"):
        plan([], 100)
    with pytest.raises(ModelError, match="no elements"):
        plan([TensorInfo("empty", "float32", (0, 3))], 100)
