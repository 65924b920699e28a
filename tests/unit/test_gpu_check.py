"""The check for machines with a GPU: what it says where there is none, and what of it a mock driver
can show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nvml_mock import Scenario, environment
from sglang_harness.runtime.device import gpus

CHECK = Path(__file__).parents[1] / "gpu" / "check.py"


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECK), *words],
        capture_output=True,
        text=True,
        timeout=240,
        **options,  # type: ignore[call-overload]
    )


def test_without_a_gpu_it_says_that_it_did_not_run():
    if gpus()[0]:
        pytest.skip("this machine has a GPU")
    done = run()
    assert done.returncode == 3
    assert done.stdout.startswith("not run: no GPU: ")
    assert "held" not in done.stdout


def test_the_parts_that_need_no_cuda_hold_on_the_mock_and_the_rest_is_not_run(
    driver: Scenario, tmp_path: Path
):
    out = tmp_path / "figures.json"
    done = run("--seconds", "3", "--out", str(out), env=environment(driver))
    assert done.returncode == 3, done.stdout + done.stderr
    rows = {row["part"]: row for row in json.loads(out.read_text())["parts"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "figures": "not run",
        "sampler": "held",
        "ipc": "not run",
        "leases": "held",
        "mock": "held",
        "server": "not run",
    }
    assert rows["sampler"]["figures"]["devices"] == 2
    assert rows["leases"]["figures"]["processes"] == 6
    assert rows["figures"]["message"] in ("torch sees no GPU", "torch is not installed")


def test_a_part_that_does_not_hold_is_exit_code_1(driver: Scenario, tmp_path: Path):
    driver.rules = ["slow nvmlDeviceGetMemoryInfo_v2 400 GPU-a"]
    driver.write()
    done = run(
        "--out",
        str(tmp_path / "f.json"),
        "--part",
        "sampler",
        "--seconds",
        "3",
        env=environment(driver),
    )
    assert done.returncode == 1, done.stdout
    assert "samples in 3 s at 10 Hz" in done.stdout
