"""One side of a hand-over of GPU tensors between two processes.

ipc.py send PAYLOAD DONE    writes handles to PAYLOAD, lives until DONE exists
ipc.py receive PAYLOAD      opens them, and says what it sees
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path

import bare

bare.prepare()

import torch  # noqa: E402
from torch.multiprocessing.reductions import reduce_tensor  # noqa: E402

from sglang_harness.memory.gpu.driver import Driver, gpus  # noqa: E402

#: Two tensors of 256 MiB and one small one, as a bucket of weights has them.
SHAPES = ((8192, 8192), (16384, 4096), (128,))


def send(payload: Path, done: Path) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device="cuda") for shape in SHAPES]
    torch.cuda.synchronize()
    beside = payload.with_suffix(".new")
    beside.write_bytes(pickle.dumps([reduce_tensor(t) for t in tensors]))
    beside.replace(payload)
    size = sum(t.numel() * t.element_size() for t in tensors)
    print(json.dumps({"bytes": size, "sums": sums(tensors)}), flush=True)
    until = time.monotonic() + 120
    while not done.exists() and time.monotonic() < until:
        time.sleep(0.05)


def receive(payload: Path) -> None:
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    before = in_use()
    rebuilt = [make(*words) for make, words in pickle.loads(payload.read_bytes())]
    torch.cuda.synchronize()
    print(json.dumps({"sums": sums(rebuilt), "added": in_use() - before}))


def sums(tensors: list[torch.Tensor]) -> list[float]:
    return [float(t.double().cpu().sum()) for t in tensors]


def in_use() -> int:
    with Driver() as driver:
        return sum(driver.memory(g.uuid).used for g in gpus()[0] if not g.split)


if sys.argv[1] == "send":
    send(Path(sys.argv[2]), Path(sys.argv[3]))
else:
    receive(Path(sys.argv[2]))
