"""Another run that wants the same GPUs, up to the point where it would start a server.

second_run GPUS WAIT PATIENCE

It leases the GPUs (at most WAIT seconds), waits until they are idle (PATIENCE seconds), gives them
back, and prints whether it was let in, or what it was told.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass

from sglang_harness.errors import HarnessError
from sglang_harness.memory.gpu.guard import Guard


@dataclass(frozen=True)
class SecondRun:
    """What became of it.

    Attributes:
        let_in: the GPUs were its own for a moment.
        error: the class of the error; empty where it was let in.
        seconds: until it was let in or refused.
        before: bytes that it found in use, by UUID; empty where it was not let in.
    """

    let_in: bool
    error: str
    message: str
    seconds: float
    before: dict[str, int]


def tried(gpus: str, wait: float, patience: float) -> SecondRun:
    """Tries it in this process."""
    guard = Guard(gpus, run_id=f"second-{os.getpid()}", patience=patience)
    began = time.monotonic()
    try:
        guard.open(purpose="a second run of gpu-check", timeout=wait)
        told = SecondRun(True, "", "", time.monotonic() - began, guard.before)
        guard.close()
    except HarnessError as error:
        waited = time.monotonic() - began
        return SecondRun(False, type(error).__name__, error.message, waited, {})
    return told


if __name__ == "__main__":
    print(json.dumps(asdict(tried(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))))
