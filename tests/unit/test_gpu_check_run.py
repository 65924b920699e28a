"""The order and the processes of gpu-check's parts, with parts that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_rehearsal_says_first_that_no_gpu_was_seen(tmp_path: Path):
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from sglang_harness.cli import main; main()", "gpu-check"),
            *("--device", "cpu", "--part", "facts", "--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.startswith("A REHEARSAL ON THE CPU: no GPU was seen")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(p["part"], p["outcome"]) for p in results["parts"]] == [("facts", "held")]
