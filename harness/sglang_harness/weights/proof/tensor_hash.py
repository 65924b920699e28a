"""SGLang's checksum of one tensor, computed here.

From SGLang 0.5.20 and 0.5.23: ``srt/managers/mm_utils.py`` (``tensor_hash``) and
``kernels/ops/memory/gpu_tensor_hash.py``. On a CPU it is a hash of the tensor's bytes; on a GPU
a sum of mixed 32-bit words, which depends on each word's value and place.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

_SEED = 0x243F6A88
_TILE = 8192
#: Tiles that are mixed at a time: 32 MiB of words, and some times that while it lasts.
_TILES_AT_ONCE = 256


def checksum(tensor: torch.Tensor, device: Literal["cpu", "gpu"]) -> str:
    """Sixteen hexadecimal digits, as ``/weights_checker`` states them for such a tensor."""
    import torch

    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    if device == "cpu":
        return hashlib.sha256(data.data).hexdigest()[:16]
    return f"{_mixed(data):016x}"


def _mixed(data: Any) -> int:
    """The GPU's hash of bytes. Held against SGLang's kernel in triton's interpreter; not run
    on a GPU yet."""
    import numpy as np

    if data.size % 4:
        data = np.concatenate([data, np.zeros(-data.size % 4, dtype=np.uint8)])
    words = data.view("<u4")
    if not words.size:
        return 0
    seed2 = ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF
    total = 0
    for first in range(0, words.size, _TILE * _TILES_AT_ONCE):
        part = words[first : first + _TILE * _TILES_AT_ONCE]
        place = (np.arange(part.size, dtype=np.uint64) + first).astype(np.uint32)
        halves = []
        for factor, seed, turn in ((0x27D4EB2D, _SEED, 15), (0x165667B1, seed2, 13)):
            turned = (place << np.uint32(turn)) | (place >> np.uint32(32 - turn))
            key = _avalanche(part ^ ((place * np.uint32(factor) + np.uint32(seed)) ^ turned))
            starts = np.arange(0, key.size, _TILE)
            sums = np.add.reduceat(key.astype(np.uint64), starts).astype(np.uint32)
            halves.append(_avalanche(sums ^ np.uint32((words.size * 4) & 0xFFFFFFFF)))
        each = (halves[0].astype(np.uint64) << np.uint64(32)) | halves[1].astype(np.uint64)
        total += int(each.sum(dtype=np.uint64))
    return _last_mix(total & 0xFFFFFFFFFFFFFFFF)


def _avalanche(x: Any) -> Any:
    """MurmurHash3's finaliser over 32-bit words; arithmetic wraps."""
    import numpy as np

    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _last_mix(x: int) -> int:
    """SplitMix64's finaliser."""
    mask = 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
