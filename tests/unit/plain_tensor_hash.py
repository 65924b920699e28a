"""SGLang's hash of a tensor on a GPU, as plainly as it can be written: what the fast way in
``weights/proof/tensor_hash.py`` is compared with. It is itself held against values that SGLang's
own kernel stated (``test_tensor_hash.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np

SEED, WORD, TILE = 0x243F6A88, 0xFFFFFFFF, 8192


def avalanche(x: Any) -> Any:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = x ^ (x >> np.uint64(shift))
        x = (x * np.uint64(factor)) & np.uint64(WORD)
    return x


def plain(data: bytes) -> int:
    """The hash of bytes, in 64-bit words so that nothing wraps unseen."""
    words = np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4").astype(np.uint64)
    if not words.size:
        return 0
    place = np.arange(words.size, dtype=np.uint64)
    seed2 = ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & WORD
    halves = []
    for factor, seed, turn in ((0x27D4EB2D, SEED, 15), (0x165667B1, seed2, 13)):
        turned = ((place << np.uint64(turn)) | (place >> np.uint64(32 - turn))) & np.uint64(WORD)
        mixed = (place * np.uint64(factor) + np.uint64(seed)) & np.uint64(WORD)
        key = avalanche(words ^ mixed ^ turned)
        sums = [int(key[at : at + TILE].sum()) & WORD for at in range(0, words.size, TILE)]
        length = words.size * 4 & WORD
        halves.append([int(avalanche(np.uint64(each ^ length))) for each in sums])
    total = sum((high << 32) | low for high, low in zip(*halves, strict=True))
    x, mask = total & 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
