"""Wants the first GPU, has it for a moment, and says when."""

from __future__ import annotations

import json
import sys
import time

import bare

bare.prepare()

from sglang_harness.memory.gpu import leases  # noqa: E402
from sglang_harness.memory.gpu.driver import gpus  # noqa: E402
from sglang_harness.memory.gpu.selection import usable  # noqa: E402

gpu = usable(gpus()[0])[0]
asked = time.time()
held = leases.acquire([gpu], run_id=f"worker-{sys.argv[1]}", purpose="gpu-check", timeout=60)
began = time.time()
time.sleep(0.1)
ended = time.time()
held.release()
print(json.dumps({"uuid": gpu.uuid, "from": began, "to": ended, "waited": began - asked}))
