"""Is a tensor's checksum the one that SGLang states, however it is computed?"""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tensor_hash import TILE, plain

from sglang_harness._base import headroom
from sglang_harness.weights.proof import checksums, tensor_hash
from sglang_harness.weights.proof.checksums import ServedLayout, expected_checksums
from sglang_harness.weights.proof.tensor_hash import checksum, checksum_of

torch = pytest.importorskip("torch")

#: Bytes of a tile, and of the chunks that are mixed at a time in these tests.
TILED, CHUNK = 4 * TILE, 2 * 4 * TILE

DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32",
    "float64", "complex64", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders of chunks and of threads come early."""
    monkeypatch.setattr(tensor_hash, "_TILES_AT_ONCE", 2)
    monkeypatch.setattr(tensor_hash, "_WORTH_A_THREAD", CHUNK)


def drawn(nbytes: int, seed: int = 0) -> Any:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=chance)


#: What SGLang 0.5.23's own kernel said, in triton's interpreter.
STATED = [
    (torch.arange(20001, dtype=torch.float32), "d1e2a3be3f6202b7"),
    (torch.arange(7, dtype=torch.bfloat16), "6acd222320afb5c2"),
]


@pytest.mark.parametrize(("tensor", "stated"), STATED)
def test_a_gpus_checksum_is_that_of_sglangs_kernel(tensor: Any, stated: str):
    assert checksum(tensor, "gpu") == stated
    assert f"{plain(tensor.view(torch.uint8).numpy().tobytes()):016x}" == stated
    assert checksum(tensor.clone().index_fill_(0, torch.tensor([3]), 9.0), "gpu") != stated


near_a_border = st.builds(
    lambda border, times, off: max(0, border * times + off),
    st.sampled_from([0, TILED, CHUNK]),
    st.integers(1, 5),
    st.integers(-9, 9),
)


@settings(deadline=None)
@given(
    nbytes=st.integers(0, 64) | near_a_border,
    cuts=st.lists(st.floats(0, 1), max_size=4),
    threads=st.integers(1, 4),
)
def test_it_is_the_same_for_every_length_in_any_pieces_by_any_number_of_threads(
    nbytes: int, cuts: list[float], threads: int
):
    whole = drawn(nbytes)
    data = whole.numpy().tobytes()
    at = [0, *sorted(int(cut * nbytes) for cut in cuts), nbytes]
    pieces = [whole[first:last] for first, last in pairwise(at)]
    assert checksum(whole, "gpu", threads=threads) == f"{plain(data):016x}"
    assert checksum_of(pieces, "gpu", threads=threads) == f"{plain(data):016x}"
    assert checksum_of(pieces, "cpu") == hashlib.sha256(data).hexdigest()[:16]


@settings(deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 40), max_size=3),
    how=st.sampled_from(["as it is", "transposed", "every second", "without the first"]),
)
def test_it_is_the_same_for_every_dtype_and_for_tensors_that_are_not_contiguous(
    dtype: str, shape: list[int], how: str
):
    kind = getattr(torch, dtype)
    size = torch.empty(0, dtype=kind).element_size()
    numbers = torch.Size(shape).numel()
    raw = drawn(numbers * size) % 2 if dtype == "bool" else drawn(numbers * size)
    tensor = raw.view(kind).reshape(shape)
    if how == "transposed":
        tensor = tensor.permute(list(reversed(range(tensor.dim()))))
    elif how != "as it is" and tensor.dim():
        tensor = tensor[::2] if how == "every second" else tensor[1:]
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert checksum(tensor, "gpu") == f"{plain(data):016x}"
    assert checksum(tensor, "cpu") == hashlib.sha256(data).hexdigest()[:16]


def test_places_begin_again_after_the_last_of_32_bits():
    # Of 16 GiB: the same words in the first chunk and in the one after 2^32 words.
    words = drawn(CHUNK).numpy().view("<u4")

    class Endless:
        size = 1 << 34

        def part(self, first: int, length: int) -> Any:
            return words

    sums = [
        tensor_hash._sum_of_chunks(Endless(), range(n, n + 1), words.size)  # type: ignore[arg-type]
        for n in (0, (1 << 32) // words.size, 1)
    ]
    assert sums[0] == sums[1] != sums[2]


def test_a_large_tensor_is_hashed_in_little_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    tensor = torch.zeros(64 << 20, dtype=torch.uint8)[1:]  # its last word is not whole
    checksum(tensor, "gpu", threads=2)  # what stays is made
    tracemalloc.start()
    try:
        checksum(tensor, "gpu", threads=2)
        checksum(tensor, "cpu")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20


def test_no_more_threads_compute_than_this_process_has_cores(monkeypatch: pytest.MonkeyPatch):
    tensor = drawn(8 * CHUNK)
    monkeypatch.setattr(headroom, "cores", lambda: 1)
    monkeypatch.setattr(tensor_hash, "_threads", lambda: pytest.fail("others are asked"))
    assert checksum(tensor, "gpu") == f"{plain(tensor.numpy().tobytes()):016x}"


def test_a_machine_of_many_cores_is_not_given_a_thread_for_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(headroom, "cores", lambda: 192)
    assert tensor_hash.threads_here() == 16


# --- a whole checkpoint ---------------------------------------------------------------------------


class Met:
    """A checkpoint in memory, of norms of one size; notes who reads at the same time.

    Args:
        meet: so many reads wait for each other.
    """

    def __init__(self, number: int, nbytes: int, meet: int = 1) -> None:
        self.tensors = {
            f"model.layers.{n}.input_layernorm.weight": drawn(nbytes, n).view(torch.float32)
            for n in range(number)
        }
        self._barrier = threading.Barrier(meet)
        self._lock = threading.Lock()
        self._reading = 0
        self.most = 0
        self.read_names: list[str] = []

    def read(self, names: Any) -> Iterator[tuple[str, Any]]:
        with self._lock:
            self._reading += 1
            self.most = max(self.most, self._reading)
            self.read_names += names
        self._barrier.wait(timeout=10.0)
        yield from ((name, torch.nan_to_num(self.tensors[name])) for name in names)
        with self._lock:
            self._reading -= 1


SERVED = ServedLayout(
    {"model_type": "llama", "num_attention_heads": 4, "dtype": "float32"}, {}, "gpu"
)


def test_parameters_are_read_while_others_are_hashed():
    source: Any = Met(8, 4096, meet=4)
    (rank,) = expected_checksums(source, SERVED, threads=4).ranks
    assert source.most == 4
    alone: Any = Met(8, 4096)
    assert expected_checksums(alone, SERVED, threads=1).ranks == (rank,)
    assert list(rank) == list(source.tensors), "in the order of the checkpoint"


def test_tensors_that_are_held_at_a_time_stay_within_the_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checksums, "HELD_BY_A_THREAD", 1024)
    source: Any = Met(12, 2048)
    expected_checksums(source, SERVED, threads=4)
    assert source.most <= 2, "4 threads of 1024 bytes hold two tensors of 2048"
    large: Any = Met(3, 8192)
    expected_checksums(large, SERVED, threads=4)
    assert large.most == 1, "one that is larger than all of the room is alone"
    monkeypatch.setattr(headroom, "memory", lambda: headroom.Memory(4 * 3000, "this machine"))
    tight: Any = Met(12, 2048)
    expected_checksums(tight, SERVED, threads=4)
    assert tight.most == 1, "a quarter of what is left holds one"


def test_a_checkpoint_that_cannot_be_read_is_told_and_read_no_further():
    class Broken(Met):
        def read(self, names: Any) -> Iterator[tuple[str, Any]]:
            yield from super().read(names)
            raise OSError("ends early")

    source: Any = Broken(200, 4096)
    with pytest.raises(OSError, match="ends early"):
        expected_checksums(source, SERVED, threads=2)
    assert len(source.read_names) < 20
