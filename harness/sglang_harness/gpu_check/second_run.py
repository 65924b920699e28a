"""Another run that wants the same GPUs, up to the point where it would start a server.

    python -m sglang_harness.gpu_check.second_run --gpus all --wait 1 --patience 1

It leases the GPUs, waits until they are idle, gives them back, and says in one line of JSON whether
it was let in, or what it was told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang_harness.errors import HarnessError
from sglang_harness.memory.gpu.guard import Guard

#: Seconds for Python's imports, beside what the run waits for.
IMPORTS_WITHIN = 60.0


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


def second_run(gpus: str, *, wait: float, patience: float, leases: Path | None = None) -> SecondRun:
    """Tries it in a process of its own.

    Args:
        wait: seconds for the lease.
        patience: seconds for the GPUs to become idle.
        leases: another folder of leases: then the guard alone is in the way; ``None``: the usual.

    Raises:
        HarnessError: that process told nothing.
    """
    environment = dict(os.environ)
    if leases is not None:
        environment["SGLANG_HARNESS_GPU_LEASES"] = str(leases)
    words = ["-m", __name__, "--gpus", gpus, "--wait", str(wait), "--patience", str(patience)]
    limit = IMPORTS_WITHIN + wait + 2 * patience
    try:
        done = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise HarnessError(f"A second run on {gpus} told nothing within {limit:.0f} s.") from None
    if done.returncode:
        raise HarnessError(f"A second run on {gpus} failed: {done.stderr.strip()[-500:]}")
    return SecondRun(**json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--gpus", required=True)
    options.add_argument("--wait", type=float, required=True)
    options.add_argument("--patience", type=float, required=True)
    asked = options.parse_args()
    guard = Guard(asked.gpus, run_id=f"second-{os.getpid()}", patience=asked.patience)
    began = time.monotonic()
    try:
        guard.open(purpose="a second run of gpu-check", timeout=asked.wait)
        told = SecondRun(True, "", "", time.monotonic() - began, guard.before)
        guard.close()
    except HarnessError as error:
        waited = time.monotonic() - began
        told = SecondRun(False, type(error).__name__, error.message, waited, {})
    print(json.dumps(asdict(told)))


if __name__ == "__main__":
    main()
