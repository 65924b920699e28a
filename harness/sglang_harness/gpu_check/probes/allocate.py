"""Allocates memory on the first GPU, and prints what NVML and torch see of it.

allocate BYTES...
"""

from __future__ import annotations

import json
import sys
import time

import torch

from sglang_harness.memory.gpu.driver import Driver, gpus

#: Bytes that stay free beside an allocation.
SPARE = 1 << 30


def uuid_of_first() -> str:
    """NVML's name of torch's first device."""
    told = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    found = [g.uuid for g in gpus()[0] if not g.split]
    if told is not None:
        bare = str(told).removeprefix("GPU-")
        named = [u for u in found if u.removeprefix("GPU-").removeprefix("MIG-") == bare]
        if not named:
            sys.exit(f"torch's first device is {told}, and NVML knows {', '.join(found)}")
        return named[0]
    if len(found) != 1:
        sys.exit("this torch names no UUIDs: leave one GPU by CUDA_VISIBLE_DEVICES")
    return found[0]


def main() -> None:
    """Each size in turn: allocated, measured, freed, measured."""
    began = time.monotonic()
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the context, and whatever comes with it
    torch.cuda.synchronize()
    context_seconds = time.monotonic() - began
    rows, left_out = [], []
    with Driver() as driver:
        uuid = uuid_of_first()

        def seen() -> tuple[int, int]:
            torch.cuda.synchronize()
            time.sleep(0.2)
            return driver.memory(uuid).used, torch.cuda.mem_get_info(0)[0]

        with_context = seen()[0]
        for size in map(int, sys.argv[1:]):
            used, free = seen()
            if size > free - SPARE:
                left_out.append(size)
                continue
            tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
            used_with, free_with = seen()
            del tensor
            used_after, _ = seen()
            rows.append(
                {
                    "asked": size,
                    "nvml": used_with - used,
                    "torch": free - free_with,
                    "kept": used_after - used,
                }
            )
    told = {
        "uuid": uuid,
        "with_context": with_context,
        "context_seconds": context_seconds,
        "rows": rows,
        "did_not_fit": left_out,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
