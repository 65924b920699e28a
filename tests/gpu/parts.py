"""The parts of the check. Each returns figures, raises AssertionError for what does not hold, and
NotHere for what this machine lacks."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bare import ROOT

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
GIB = 1 << 30
#: Allocations whose figures are compared.
SIZES = [MIB, 16 * MIB, 256 * MIB, GIB, 4 * GIB, 20 * GIB]
#: Sampling has to cost less of one core than this.
OF_ONE_CORE = 0.01


class NotHere(Exception):
    """This machine lacks what a part needs."""


def machine() -> tuple[dict[str, Any], str]:
    """This machine, and why it has no GPU to be checked."""
    try:
        from sglang_harness.memory.gpu.driver import Driver, gpus
    except ImportError as error:
        return {}, f"nvidia-ml-py is not installed ({error})"
    found, why = gpus()
    if not found:
        return {}, why
    with Driver() as driver:
        versions = vars(driver.versions())
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gpus": [g.name for g in found],
        "memory_bytes": [g.memory_bytes for g in found],
        "torch": _torch_version(),
        **versions,
    }, ""


def _torch_version() -> str:
    try:
        import torch
    except ImportError:
        return ""
    return str(torch.__version__)


def _cuda() -> Any:
    try:
        import torch
    except ImportError:
        raise NotHere("torch is not installed") from None
    if not torch.cuda.is_available():
        raise NotHere("torch sees no GPU")
    return torch


def _child(script: str, *words: str, **environment: str) -> dict[str, Any]:
    """Runs one of the scripts beside this file; its last line is JSON."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{script}: {done.stderr.strip()[-500:]}"
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def figures(asked: argparse.Namespace) -> dict[str, Any]:
    """NVML's figures beside torch's own, for allocations of known size."""
    _cuda()
    sizes = [size for size in SIZES if size <= asked.largest * GIB]
    # Without its cache torch asks the driver for each tensor, and gives each back.
    told = _child("allocate.py", *map(str, sizes), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert told["rows"], "not one allocation fitted"
    for row in told["rows"]:
        allowed = max(row["asked"] // 100, 4 * MIB)
        for which in ("torch", "asked"):
            off = abs(row["nvml"] - row[which])
            assert off <= allowed, (
                f"{row['asked'] // MIB} MiB: NVML sees {row['nvml']}, {which} {row[which]} bytes: "
                f"off by {off}, allowed {allowed}"
            )
        assert abs(row["kept"]) <= 4 * MIB, f"{row['kept']} bytes are still in use after it"
    return told


def sampler(asked: argparse.Namespace) -> dict[str, Any]:
    """What sampling costs, and how long one reading of each device takes."""
    from sglang_harness.memory.gpu.driver import Driver
    from sglang_harness.memory.gpu.nvml import NvmlMemory
    from sglang_harness.memory.sampler import Sampler
    from sglang_harness.memory.timeline import Timeline

    memory, line = NvmlMemory(), Timeline()
    memory.read()
    cpu, wall = time.process_time(), time.monotonic()
    running = Sampler(memory.read_partly, line.add).start()
    time.sleep(asked.seconds)
    running.stop()
    share = (time.process_time() - cpu) / (time.monotonic() - wall)
    with Driver() as driver:
        found, _ = driver.gpus()
        began = time.monotonic()
        for gpu in found:
            driver.memory(gpu.uuid)
        reading = time.monotonic() - began
    memory.close()
    told = {
        "devices": len(found),
        "samples": running.taken,
        "missed": running.missed,
        "slowest_seconds": running.slowest,
        "share_of_a_core": share,
        "reading_seconds": reading,
    }
    assert not running.gaps, running.gaps
    assert running.taken >= 9 * asked.seconds, (
        f"{running.taken} samples in {asked.seconds:g} s at 10 Hz"
    )
    assert share < OF_ONE_CORE, f"sampling costs {share:.2%} of a core"
    return told


def ipc(asked: argparse.Namespace) -> dict[str, Any]:
    """A tensor on the GPU is handed to a process that is no child, as weights are pushed."""
    del asked
    _cuda()
    with tempfile.TemporaryDirectory() as folder:
        payload, done = Path(folder) / "payload", Path(folder) / "done"
        sender = subprocess.Popen(
            [sys.executable, str(HERE / "ipc.py"), "send", str(payload), str(done)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert sender.stdout is not None
            sent = json.loads(sender.stdout.readline() or "{}")
            assert sent, "the sender died"
            received = _child("ipc.py", "receive", str(payload))
        finally:
            done.touch()
            sender.wait(60)
    assert sender.returncode == 0, f"the sender ended with {sender.returncode}"
    assert received["sums"] == sent["sums"], f"sent {sent['sums']}, received {received['sums']}"
    # A handle is no copy: what the receiver adds is its context, and no second tensor.
    assert received["added"] < sent["bytes"], (
        f"{received['added']} bytes more in use for a payload of {sent['bytes']}"
    )
    return {**sent, **received}


def leases(asked: argparse.Namespace) -> dict[str, Any]:
    """Processes that all want the same GPU have it one after another."""
    del asked
    try:
        import psutil  # noqa: F401
    except ImportError:
        raise NotHere("psutil is not installed, and leases need it") from None
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "SGLANG_HARNESS_GPU_LEASES": folder}
        children = [
            subprocess.Popen(
                [sys.executable, str(HERE / "lease.py"), str(number)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(6)
        ]
        told = [json.loads(child.communicate(timeout=120)[0] or "{}") for child in children]
    assert all(told), "a process died that wanted the GPU"
    spans = sorted((one["from"], one["to"]) for one in told)
    for (_, ended), (began, _) in itertools.pairwise(spans):
        assert began >= ended, f"two had it at once: {spans}"
    waits = [one["waited"] for one in told]
    return {"processes": len(told), "longest_wait_seconds": max(waits), "uuid": told[0]["uuid"]}


def mock(asked: argparse.Namespace) -> dict[str, Any]:
    """The mock driver, told what this driver says, answers as this driver does."""
    del asked
    import nvml_mock

    if why := nvml_mock.why_not():
        raise NotHere(why)
    told = _child("ask.py")
    devices = [
        nvml_mock.Device(
            row["uuid"],
            total=row["total"],
            reserved=row["reserved"] or 0,
            base=row["used"],
            name=row["name"],
            parent=row["parent"],
        )
        for row in told["devices"]
    ]
    with tempfile.TemporaryDirectory() as folder:
        scenario = nvml_mock.Scenario(Path(folder) / "scenario", devices)
        old = any(row["call"] == 1 for row in told["devices"])
        environment = nvml_mock.environment(scenario, first_calls_only=old)
        answered = _child("ask.py", **environment)
    compared = ("uuid", "name", "total", "reserved", "parent", "call")
    for real, mocked in zip(told["devices"], answered["devices"], strict=True):
        for name in compared:
            assert real[name] == mocked[name], f"{name}: driver {real[name]}, mock {mocked[name]}"
    assert told["missing"] == [], f"this driver lacks {told['missing']}, which the mock has"
    return {"devices": len(told["devices"]), "structures": told["structures"]}


def server(asked: argparse.Namespace) -> dict[str, Any]:
    """The suite's checks of memory, against the SGLang that is here, without a container."""
    python = asked.sglang_python or Path(sys.executable)
    found = subprocess.run([str(python), "-c", "import sglang"], capture_output=True)
    if found.returncode:
        raise NotHere("there is no SGLang here (--sglang-python names a Python that has it)")
    command = [sys.executable, "-c", "from sglang_harness.cli import main; main()"]
    whole = {**os.environ, "PYTHONPATH": str(ROOT / "harness")}
    able = subprocess.run([*command, "--help"], env=whole, capture_output=True, text=True)
    if able.returncode:
        raise NotHere("the harness's own dependencies are not installed")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *(*command, "qualify", "--runtime", "process", "--python", str(python)),
                *("--device", "gpu", "--model", "tiny", "--out", folder, "-k", "memory/"),
                *("--server-arg", "enable-memory-saver", "--server-arg", "mem-fraction-static=0.5"),
            ],
            env=whole,
            capture_output=True,
            text=True,
        )
        file = Path(folder) / "verdict.json"
        assert file.exists(), done.stderr.strip()[-500:]
        verdict = json.loads(file.read_text(encoding="utf-8"))
    assert verdict["verdict"] == "pass", verdict["reason"]
    return {c["id"]: c["outcome"] for c in verdict["checks"]}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "figures": figures,
    "sampler": sampler,
    "ipc": ipc,
    "leases": leases,
    "mock": mock,
    "server": server,
}
