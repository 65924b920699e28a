"""Safetensors files: a header in JSON, then plain bytes. Nothing in them can run.

The format: https://github.com/huggingface/safetensors (README, 'Format').
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sglang_harness.checkpoint.formats.pickles import is_shape, is_size
from sglang_harness.checkpoint.formats.spans import SIZES, Span
from sglang_harness.errors import BrokenCheckpoint

#: The format's names of dtypes.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}

#: The format's own bound on a header, in bytes.
_LARGEST_HEADER = 100_000_000


def read_safetensors(path: Path) -> dict[str, Span]:
    """Every tensor of the file, in the order of their bytes.

    Raises:
        BrokenCheckpoint: cut short, or not what the format says.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise BrokenCheckpoint(
                f"{path} ({size} bytes) is not a safetensors file, or was cut short.",
                advice="Copy or write it again.",
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError, MemoryError):
            header = None
    if not isinstance(header, dict):
        raise BrokenCheckpoint(f"The header of {path} is damaged.", advice="Write it again.")
    header.pop("__metadata__", None)
    spans = {name: _span(path, name, told, 8 + length, size) for name, told in header.items()}
    return dict(sorted(spans.items(), key=lambda item: item[1].offset))


def _span(path: Path, name: str, told: Any, first: int, size: int) -> Span:
    match told:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            is_size(begin) and is_size(end) and begin <= end and is_shape(shape)
        ):
            pass
        case _:
            raise BrokenCheckpoint(
                f"{path} has an invalid description of {name}.", advice="Write it again."
            )
    if dtype not in DTYPES:
        raise BrokenCheckpoint(f"{name} in {path} is {dtype}, which is not supported.")
    span = Span(path, first + begin, DTYPES[dtype], tuple(shape))
    if math.prod(shape) * SIZES[span.dtype] != end - begin:
        raise BrokenCheckpoint(
            f"{name} in {path} has {end - begin} bytes, which is not what its shape "
            f"{tuple(shape)} of {span.dtype} takes.",
            advice="Write it again.",
        )
    if first + end > size:
        raise BrokenCheckpoint(
            f"{path} was cut short: {name} should end at byte {first + end}, and the file ends "
            f"at {size}.",
            advice="Copy or write it again.",
        )
    return span
