"""gpu-check on a machine with no GPU, and with the mock driver in place of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvml_mock import Scenario, environment
from sglang_harness.errors import SpecError
from sglang_harness.gpu_check import bounds, machine, request
from sglang_harness.gpu_check.machine import NotRun
from sglang_harness.gpu_check.parts import PARTS
from sglang_harness.gpu_check.request import Request
from sglang_harness.runtime.device import gpus

MIB = 1 << 20


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_harness", "gpu-check", *words],
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


@pytest.fixture
def parts_of(driver: Scenario, tmp_path: Path) -> Any:
    """Runs parts on the mock driver; returns their results by name."""

    def of(*names: str, code: int) -> dict[str, dict[str, Any]]:
        out = tmp_path / "out"
        words = [word for name in names for word in ("--part", name)]
        done = run(*words, "--out", str(out), env=environment(driver))
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stderr == ""
        results = json.loads((out / "results.json").read_text())
        return {part["part"]: part for part in results["parts"]}

    return of


# --- a machine that it cannot run on -------------------------------------------------------------
def test_without_a_gpu_it_says_that_it_did_not_run(tmp_path: Path):
    if gpus()[0]:
        pytest.skip("this machine has a GPU")
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert done.stdout.startswith("not run: no GPU: ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert not (tmp_path / "out").exists()


def test_on_a_gpu_that_is_in_use_it_does_not_run_and_says_who_uses_it(
    driver: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    driver.use("GPU-b", os.getpid(), 3000 * MIB)
    done = run("--out", str(tmp_path / "out"), env=environment(driver))
    assert done.returncode == 3
    assert done.stdout.startswith(
        f"not run: GPU GPU-b is in use: 3000 MiB by process {os.getpid()} (py"
    )
    assert "with at most 256 MiB it is idle" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_of_several_gpus_it_takes_those_that_cuda_may_use(
    driver: Scenario, monkeypatch: pytest.MonkeyPatch
):
    driver.use("GPU-b", os.getpid(), 3000 * MIB)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert [gpu.uuid for gpu in machine.of_gpu().gpus] == ["GPU-a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NotRun, match="no GPU: CUDA_VISIBLE_DEVICES leaves none"):
        machine.of_gpu()


def test_another_bound_of_idle_lets_it_run(driver: Scenario, monkeypatch: pytest.MonkeyPatch):
    driver.devices[0].base = 1600 * MIB
    driver.write()
    monkeypatch.setattr(machine, "SETTLES_WITHIN", 0.1)
    with pytest.raises(NotRun, match="1600 MiB by no process that the driver names"):
        machine.of_gpu()
    monkeypatch.setenv("SGLANG_HARNESS_GPU_IDLE_BELOW", "1700")
    assert machine.of_gpu().at_rest["GPU-a"] == 1600 * MIB


def test_what_a_driver_holds_at_rest_with_no_process_on_the_gpu_does_not_cost_the_run(
    driver: Scenario, monkeypatch: pytest.MonkeyPatch
):
    driver.devices[0].base = 600 * MIB
    driver.write()
    monkeypatch.setattr(machine, "SETTLES_WITHIN", 0.1)
    here = machine.of_gpu()
    assert here.idle_below == (600 + 256) * MIB
    assert here.facts["taken for idle below"] == "856 MiB"
    assert not bounds.idle(here.at_rest.values(), first_call_only=False).holds, "it is a finding"


def test_a_process_that_holds_little_is_still_in_the_way(
    driver: Scenario, monkeypatch: pytest.MonkeyPatch
):
    driver.use("GPU-a", os.getpid(), 600 * MIB)
    monkeypatch.setattr(machine, "SETTLES_WITHIN", 0.1)
    with pytest.raises(NotRun, match=f"in use: 600 MiB by process {os.getpid()}"):
        machine.of_gpu()


def test_a_gpu_that_does_not_answer_is_no_gpu(driver: Scenario):
    driver.devices = driver.devices[:1]
    driver.devices[0].lost = True
    driver.write()
    with pytest.raises(NotRun, match=r"no GPU: .*has fallen off the bus"):
        machine.of_gpu()


def test_a_driver_that_hangs_is_not_waited_for(driver: Scenario, monkeypatch: pytest.MonkeyPatch):
    driver.rules = ["slow nvmlDeviceGetCount_v2 20000"]
    driver.write()
    monkeypatch.setattr(machine, "ANSWERS_WITHIN", 0.2)
    monkeypatch.setattr(machine, "SETTLES_WITHIN", 0.1)
    with pytest.raises(NotRun, match=r"no GPU: the NVIDIA driver has not answered for 0\.3 s"):
        machine.of_gpu()


def test_memory_that_a_part_left_is_told_once(driver: Scenario, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "SETTLES_WITHIN", 0.1)
    here = machine.of_gpu()
    assert here.left_on_gpus() == []
    driver.use("GPU-a", os.getpid(), 900 * MIB)
    (told,) = here.left_on_gpus()
    assert told.startswith(f"GPU GPU-a has 900 MiB in use, 0 MiB before (process {os.getpid()} (")
    assert here.left_on_gpus() == []


# --- the kit -------------------------------------------------------------------------------------
def kit_in(folder: Path, **made_for: Any) -> Path:
    record = {
        "schema": 1,
        "name": "sglang-harness-kit",
        "harness": {"version": "0.1.0", "revision": None},
        "made_for": {
            "python": "3.12",
            "torch": "2.11.0",
            "cuda": 13,
            "machine": "x86_64",
            "glibc": "2.34",
            "architectures": ["sm90"],
            **made_for,
        },
        "payload": {"file": "payload.tar.xz", "sha256": "0" * 64, "unpacked_bytes": 1},
        "needs": [],
        "releases": [
            {
                "version": version,
                "kernels": "sglang-kernel 0.4.4",
                "site": None,
                "server_args": {"attention-backend": "triton", "disable-cuda-graph": "true"},
                "environment": {"SOME": "thing"},
                "stand_ins": [],
                "caveats": [f"made for {version}"],
            }
            for version in ("0.5.15", "0.5.23")
        ],
        "packages": [],
    }
    (folder / "unpacked").mkdir()
    (folder / "kit.json").write_text(json.dumps(record))
    return folder / "unpacked"


def test_a_kit_without_kernels_for_the_gpu_does_not_run(driver: Scenario, tmp_path: Path):
    driver.rules = ["capability GPU-b 8 0"]
    kit = kit_in(tmp_path)
    done = run("--kit", str(kit), env=environment(driver))
    assert done.returncode == 3
    assert done.stdout == (
        "not run: NVIDIA Mock 80GB has compute capability 8.0, and the kit has kernels for sm90 "
        "alone; build one with --gpu sm80\n"
    )


def test_the_releases_of_a_kit_are_those_of_its_record(tmp_path: Path):
    folder = kit_in(tmp_path)
    asked = Request(kit=folder)
    kit = request._kit(folder)
    found = request._releases(asked, kit)
    assert [each.version for each in found] == ["0.5.15", "0.5.23"]
    assert found[0].python == folder / "python-0.5.15"
    assert found[0].server_args == {"attention-backend": "triton", "disable-cuda-graph": True}
    assert found[0].environment == {"SOME": "thing"}
    assert found[1].caveats == ["made for 0.5.23"]
    rehearsed = request._releases(Request(kit=folder, device="cpu"), kit)
    assert [each.server_args for each in rehearsed] == [{}, {}], "no server has them on a CPU"
    one = request._releases(Request(kit=folder, releases=["0.5.23"]), kit)
    assert [each.version for each in one] == ["0.5.23"]
    with pytest.raises(SpecError, match=r"--release '0.5.99' is not here. The releases are 0.5.15"):
        request._releases(Request(kit=folder, releases=["0.5.99"]), kit)


# --- the table of the parts ----------------------------------------------------------------------
def test_every_part_has_a_name_of_its_own_and_asks_one_question():
    names = [part.name for part in PARTS]
    assert len(names) == len(set(names))
    for part in PARTS:
        assert part.asks.endswith("?"), part.name
        assert part.seconds > 0
        assert part.name == part.name.lower()
        assert " " not in part.name


def test_the_command_lists_every_part():
    done = run("--list")
    assert done.returncode == 0
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == [part.name for part in PARTS]


def test_the_table_is_read_without_torch():
    script = (
        "import sys; from sglang_harness.gpu_check import request, run_parts; run_parts.table(); "
        "print(*({'torch', 'sglang', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout + done.stderr


# --- the parts that need no CUDA, on the mock driver ---------------------------------------------
def test_the_parts_that_need_no_cuda_hold_on_the_mock_and_the_rest_is_not_run(parts_of: Any):
    rows = parts_of(code=3)
    assert list(rows) == [part.name for part in PARTS]
    held = {name for name, row in rows.items() if row["outcome"] == "held"}
    assert held == {"facts", "sampler", "leases", "mock-driver"}
    for name, row in rows.items():
        if name not in held:
            assert row["outcome"] == "not run", row
            assert row["message"], row
    assert rows["death"]["message"].startswith("there is no SGLang here")
    assert rows["sampler"]["figures"]["devices"] == 2
    assert rows["leases"]["figures"]["processes"] == 6
    assert rows["figures"]["message"] in ("torch sees no GPU", "torch is not installed")
    told = rows["facts"]["figures"]
    assert [gpu["name"] for gpu in told["nvml"]["gpus"]] == ["NVIDIA Mock 80GB"] * 2
    assert told["nvml"]["gpus"][0]["memory"]["first call"]["used"] == 500 * MIB
    assert told["nvml"]["gpus"][0]["memory"]["second call"]["used"] == 0
    assert told["described"]["gpus"][0]["capability"] == "9.0"
    assert {"what": "idle use of NVIDIA Mock 80GB", "topic": "memory", "value": "0.0 MiB"} in (
        rows["facts"]["notes"]
    )
    # Names of variables, and of few their values.
    assert "HOME" in told["environment"]["names"]
    assert "HOME" not in told["environment"]


def test_sampling_that_is_too_slow_fails(parts_of: Any, driver: Scenario):
    driver.rules = ["slow nvmlDeviceGetMemoryInfo_v2 400 GPU-a"]
    driver.write()
    (row,) = parts_of("sampler", code=1).values()
    assert row["outcome"] == "failed"
    assert "samples in 5 s at 10 Hz, expected at least 45" in row["message"]
    assert row["figures"]["devices"] == 2


def test_a_mock_that_answers_otherwise_than_the_driver_fails(
    parts_of: Any, driver: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The driver is a mock too, and says something that the compared one cannot be told."""
    driver.rules = ["fail nvmlDeviceGetCudaComputeCapability 3 GPU-a"]
    driver.write()
    (row,) = parts_of("mock-driver", code=1).values()
    assert row["message"] == "capability of GPU-a: the driver says '', the mock '9.0'"


def test_without_the_mocks_source_its_part_is_not_run(
    driver: Scenario, monkeypatch: pytest.MonkeyPatch
):
    from sglang_harness.gpu_check.outcomes import NotHere
    from sglang_harness.gpu_check.parts import mock_driver

    class Context:
        class settings:  # noqa: N801
            nvml_mock = None

    with pytest.raises(NotHere, match="neither in a kit nor in a checkout"):
        mock_driver.run(Context())  # type: ignore[arg-type]
