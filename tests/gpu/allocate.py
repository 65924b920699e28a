"""Allocates bytes on the first GPU, and says what NVML and torch see of it. Sizes as arguments."""

from __future__ import annotations

import json
import sys
import time

import bare

bare.prepare()

import torch  # noqa: E402

from sglang_harness.memory.gpu.driver import Driver, gpus  # noqa: E402


def uuid_of_first() -> str:
    """NVML's name of torch's first device."""
    told = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    found = [g.uuid for g in gpus()[0] if not g.split]
    if told is not None:
        return next(u for u in found if u.removeprefix("GPU-") == str(told).removeprefix("GPU-"))
    assert len(found) == 1, "this torch names no UUIDs: leave one GPU by CUDA_VISIBLE_DEVICES"
    return found[0]


def main() -> None:
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the context, and whatever comes with it
    torch.cuda.synchronize()
    rows = []
    with Driver() as driver:
        uuid = uuid_of_first()

        def seen() -> tuple[int, int]:
            torch.cuda.synchronize()
            time.sleep(0.2)
            return driver.memory(uuid).used, torch.cuda.mem_get_info(0)[0]

        for size in map(int, sys.argv[1:]):
            used, free = seen()
            if size > free - (1 << 30):
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
    print(json.dumps({"uuid": uuid, "rows": rows}))


main()
