"""SGLang's checksum of one tensor, computed here.

From SGLang 0.5.20 and 0.5.23: ``srt/managers/mm_utils.py`` (``tensor_hash``) and
``kernels/ops/memory/gpu_tensor_hash.py``. On a CPU it is a hash of the tensor's bytes; on a GPU
a sum of mixed 32-bit words, which depends on each word's value and place.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from sglang_harness._base import headroom

if TYPE_CHECKING:
    import torch

_SEED = 0x243F6A88
_WORD = 0xFFFFFFFF

#: For each half of the hash: factor, seed and rotation of a word's place.
_HALVES = (
    (0x27D4EB2D, _SEED, 15),
    (0x165667B1, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _WORD, 13),
)

#: Words that are summed before the sum is mixed.
_TILE = 8192

#: Tiles that are mixed at a time, a power of two: 1 MiB of words. What numpy works on then stays in
#: the caches, several times as fast as through memory; with fewer tiles threads that take turns at
#: the interpreter wait for each other (measured, two threads on two cores: 16 tiles 2.2 GB/s,
#: 32 2.7, 64 2.9, 128 2.1).
_TILES_AT_ONCE = 32

#: Bytes that are worth a thread of their own: some 20 ms of work.
_WORTH_A_THREAD = 32 << 20


#: Threads at most, whatever a machine has: they take turns at the interpreter for some 6% of their
#: work (measured), so that more would mostly wait.
_MOST_THREADS = 16


def threads_here() -> int:
    """How many threads compute at most, of this process."""
    return min(headroom.cores(), _MOST_THREADS)


def checksum(
    tensor: torch.Tensor, device: Literal["cpu", "gpu"], *, threads: int | None = None
) -> str:
    """Sixteen hexadecimal digits, as ``/weights_checker`` states them for such a tensor.

    Args:
        device, threads: as of :func:`checksum_of`.
    """
    return checksum_of((tensor,), device, threads=threads)


def checksum_of(
    pieces: Iterable[torch.Tensor], device: Literal["cpu", "gpu"], *, threads: int | None = None
) -> str:
    """:func:`checksum` of one tensor whose elements are those of ``pieces``, one after another.
    Copies only pieces that are not contiguous.

    Args:
        device: that the server holds it on.
        threads: how many compute at most; :func:`threads_here` where not given. The
            hash of a CPU is computed by one: each of its steps needs the one before.
    """
    import torch

    data = [piece.contiguous().reshape(-1).view(torch.uint8).numpy() for piece in pieces]
    if device == "cpu":
        digest = hashlib.sha256()
        for each in data:
            # Neither copies the bytes nor holds the interpreter.
            digest.update(each.data)
        return digest.hexdigest()[:16]
    return f"{_mixed(_Words(data), threads or threads_here()):016x}"


class _Words:
    """Bytes of several arrays, one after another, as 32-bit words; the last is filled up with
    zeros."""

    def __init__(self, data: Sequence[Any]) -> None:
        self._data = data
        self._ends = list(itertools.accumulate(each.size for each in data))
        self._bytes = self._ends[-1] if data else 0
        self.size = -(-self._bytes // 4)

    def part(self, first: int, length: int) -> Any:
        """At most ``length`` words from word ``first`` on; copied only where they are not in one
        array."""
        import numpy as np

        begin, end = 4 * first, min(4 * (first + length), self._bytes)
        which = bisect.bisect_right(self._ends, begin)
        offset = begin - (self._ends[which] - self._data[which].size)
        inside = self._data[which][offset : offset + end - begin]
        if inside.size == end - begin and not inside.size % 4:
            return inside.view("<u4")
        made = np.zeros(-(-(end - begin) // 4), dtype="<u4")
        filled, at = made.view(np.uint8), 0
        while at < end - begin:
            filled[at : at + inside.size] = inside
            at += inside.size
            which += 1
            if at < end - begin:
                inside = self._data[which][: end - begin - at]
        return made


def _mixed(words: _Words, threads: int) -> int:
    """The GPU's hash. Held against SGLang's kernel in triton's interpreter; not run on a GPU
    yet."""
    if not words.size:
        return 0
    at_once = _TILE * _TILES_AT_ONCE
    chunks = -(-words.size // at_once)
    threads = max(1, min(threads, 4 * words.size // _WORTH_A_THREAD, chunks))
    # Each thread has one run of chunks: numpy lets go of the interpreter while it computes.
    bounds = [chunks * each // threads for each in range(threads + 1)]
    runs = [range(*pair) for pair in itertools.pairwise(bounds)]
    if threads == 1:
        return _last_mix(_sum_of_chunks(words, runs[0], at_once))
    return _last_mix(sum(_threads().map(lambda run: _sum_of_chunks(words, run, at_once), runs)))


@cache
def _threads() -> ThreadPoolExecutor:
    """Shared by all tensors: what is given to these threads waits for none of them."""
    return ThreadPoolExecutor(threads_here(), thread_name_prefix="tensor-hash")


class _Mixer(threading.local):
    """What a thread mixes chunks with: its memory, and numbers that numpy need not make again.

    A chunk takes a thread some 30 calls of numpy, and threads wait for each other between them.
    """

    def __init__(self) -> None:
        import numpy as np

        self._at_once = 0
        self._shifts = tuple(np.uint32(shift) for shift in (16, 13, 16))
        self._factors = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35), None)

    def fit(self, at_once: int) -> None:
        """Makes room for chunks of so many words."""
        import numpy as np

        if self._at_once != at_once:
            self._at_once = at_once
            self._key, self._beside = (np.empty(at_once, np.uint32) for _ in range(2))
            self._starts = np.arange(0, at_once, _TILE)

    def tiles(self, words: Any, multiplied: Any, more: int, turned: Any, turned_too: int) -> Any:
        """One half of the hash of a chunk, tile by tile.

        A word's place is the chunk's first, whose low bits are zero, plus its place in the chunk:
        the product of a sum is the sum of the products, and the rotation of bits that do not meet
        is the rotation of each.

        Args:
            multiplied: each place in the chunk, times the half's factor.
            more: the chunk's own part of it, with the seed.
            turned: each place in the chunk, rotated.
            turned_too: the chunk's own part of it.
        """
        import numpy as np

        size = words.size
        key, beside, starts = self._key, self._beside, self._starts
        if size < self._at_once:
            key, beside, starts = key[:size], beside[:size], starts[: -(-size // _TILE)]
            multiplied, turned = multiplied[:size], turned[:size]
        np.add(multiplied, np.uint32(more), out=key)
        np.bitwise_xor(key, turned, out=key)
        np.bitwise_xor(key, np.uint32(turned_too), out=key)
        np.bitwise_xor(key, words, out=key)
        self.avalanche(key, beside)
        # Wrapping sums: numpy would widen them otherwise.
        return np.add.reduceat(key, starts, dtype=np.uint32)

    def avalanche(self, x: Any, beside: Any) -> None:
        """MurmurHash3's finaliser over 32-bit words, in place; arithmetic wraps.

        Args:
            beside: memory of the same size, overwritten.
        """
        import numpy as np

        for shift, factor in zip(self._shifts, self._factors, strict=True):
            np.right_shift(x, shift, out=beside)
            np.bitwise_xor(x, beside, out=x)
            if factor is not None:
                np.multiply(x, factor, out=x)


@cache
def _mixer() -> _Mixer:
    return _Mixer()


@cache
def _places(at_once: int) -> list[tuple[Any, Any]]:
    """What each half makes of the places of the words in a first chunk: multiplied, rotated."""
    import numpy as np

    place = np.arange(at_once, dtype=np.uint32)
    made = []
    for factor, _, turn in _HALVES:
        turned = (place << np.uint32(turn)) | (place >> np.uint32(32 - turn))
        made.append((place * np.uint32(factor), turned))
    return made


def _sum_of_chunks(all_words: _Words, chunks: range, at_once: int) -> int:
    import numpy as np

    mixer, places = _mixer(), _places(at_once)
    mixer.fit(at_once)
    nbytes = np.uint32(4 * all_words.size & _WORD)
    total = 0
    for chunk in chunks:
        words = all_words.part(chunk * at_once, at_once)
        first = chunk * at_once & _WORD
        halves = []
        for (factor, seed, turn), (multiplied, turned) in zip(_HALVES, places, strict=True):
            more = (first * factor + seed) & _WORD
            turned_too = (first << turn | first >> (32 - turn)) & _WORD
            half = mixer.tiles(words, multiplied, more, turned, turned_too)
            half ^= nbytes
            mixer.avalanche(half, np.empty_like(half))
            halves.append(half.astype(np.uint64))
        total += int(((halves[0] << np.uint64(32)) | halves[1]).sum(dtype=np.uint64))
    return total & 0xFFFFFFFFFFFFFFFF


def _last_mix(x: int) -> int:
    """SplitMix64's finaliser."""
    mask = 0xFFFFFFFFFFFFFFFF
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
