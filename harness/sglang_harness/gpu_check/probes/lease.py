"""Wants the first GPU, has it for a moment, and prints when.

lease NUMBER SECONDS
"""

from __future__ import annotations

import json
import os
import sys
import time

from sglang_harness.memory.gpu import leases
from sglang_harness.memory.gpu.driver import gpus
from sglang_harness.memory.gpu.selection import usable, visible


def main() -> None:
    """Waits for the lease as long as the second argument says."""
    found = gpus()[0]
    seen = visible(found, os.environ)
    gpu = (usable(found) if seen is None else seen)[0]
    asked = time.time()
    held = leases.acquire(
        [gpu],
        run_id=f"worker-{sys.argv[1]}",
        purpose="gpu-check",
        timeout=float(sys.argv[2]),
    )
    began = time.time()
    time.sleep(0.1)
    ended = time.time()
    held.release()
    print(json.dumps({"uuid": gpu.uuid, "from": began, "to": ended, "waited": began - asked}))


if __name__ == "__main__":
    main()
