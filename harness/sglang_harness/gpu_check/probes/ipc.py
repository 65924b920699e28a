"""One side of a hand-over of GPU tensors between two processes.

ipc send PAYLOAD DONE SECONDS   writes handles to PAYLOAD, lives until DONE exists
ipc receive PAYLOAD             opens them, and prints what it sees
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path

import torch
from torch.multiprocessing.reductions import reduce_tensor

from sglang_harness.memory.gpu.driver import Driver, gpus

#: Two tensors of 256 MiB and one small one, as a bucket of weights has them.
SHAPES = ((8192, 8192), (16384, 4096), (128,))


def send(payload: Path, done: Path, seconds: float) -> None:
    """The side that has the tensors."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device="cuda") for shape in SHAPES]
    torch.cuda.synchronize()
    beside = payload.with_suffix(".new")
    beside.write_bytes(pickle.dumps([reduce_tensor(t) for t in tensors]))
    beside.replace(payload)
    size = sum(t.numel() * t.element_size() for t in tensors)
    print(json.dumps({"bytes": size, "sums": sums(tensors)}), flush=True)
    until = time.monotonic() + seconds
    while not done.exists() and time.monotonic() < until:
        time.sleep(0.05)


def receive(payload: Path) -> None:
    """The side that opens them."""
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    before = in_use()
    began = time.monotonic()
    # The file is the other side's, in a folder that only this user can write to.
    rebuilt = [make(*words) for make, words in pickle.loads(payload.read_bytes())]  # noqa: S301
    torch.cuda.synchronize()
    opened = time.monotonic() - began
    added = in_use() - before
    print(json.dumps({"sums": sums(rebuilt), "added": added, "open_seconds": opened}))


def sums(tensors: list[torch.Tensor]) -> list[float]:
    """The sum of each, computed on the CPU in float64."""
    return [float(t.double().cpu().sum()) for t in tensors]


def in_use() -> int:
    """Bytes in use on all devices, by NVML."""
    with Driver() as driver:
        return sum(driver.memory(g.uuid).used for g in gpus()[0] if not g.split)


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
    else:
        receive(Path(sys.argv[2]))
