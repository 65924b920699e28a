"""The real binding on the mock driver: figures, versions of calls, and everything that fails."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pynvml
import pytest

import nvml_mock
from nvml_mock import GIB, MIB, Device, Scenario
from sglang_harness.errors import SpecError, TelemetryError
from sglang_harness.memory.gpu.driver import Driver, ProcessUse, gpus
from sglang_harness.memory.gpu.nvml import NvmlMemory, bounded


def test_a_driver_tells_its_devices_and_its_versions(driver: Scenario):
    driver.use("GPU-b", 77, 3 * GIB)
    with Driver() as session:
        found, failed = session.gpus()
        assert failed == []
        assert [(g.index, g.uuid, g.memory_bytes) for g in found] == [
            (0, "GPU-a", 80 * GIB),
            (1, "GPU-b", 80 * GIB),
        ]
        versions = session.versions()
        assert (versions.driver, versions.cuda) == ("570.86.15", "12.8")
        memory, processes = session.memory("GPU-b"), session.processes("GPU-b")
    assert (memory.used, memory.reserved, memory.call) == (3 * GIB, 500 * MIB, 2)
    assert memory.free == 77 * GIB - 500 * MIB
    assert processes == (ProcessUse(77, 3 * GIB),)


def test_what_is_read_follows_what_happens(driver: Scenario):
    memory = NvmlMemory("1")
    assert memory.read() == (0, {"GPU-b": 0})
    driver.use("GPU-b", 1, 5 * MIB)
    driver.use("GPU-a", 1, 9 * MIB)
    assert memory.read() == (5 * MIB, {"GPU-b": 5 * MIB})
    memory.close()
    assert memory.read() == (5 * MIB, {"GPU-b": 5 * MIB})


def test_an_old_driver_counts_what_it_reserves_and_that_is_said(tmp_path: Path):
    if reason := nvml_mock.why_not():
        pytest.skip(reason)
    scenario = Scenario(tmp_path / "scenario")
    scenario.processes["GPU-a", 5] = GIB
    with nvml_mock.installed(scenario, first_calls_only=True):
        memory = NvmlMemory()
        assert memory.read() == (GIB + 500 * MIB, {"GPU-a": GIB + 500 * MIB})
        assert memory.first_call_only
        with Driver() as session:
            told = session.memory("GPU-a")
            assert (told.reserved, told.call) == (None, 1)
            # Processes are told by the second version of their call, the first one known.
            assert session.processes("GPU-a") == (ProcessUse(5, GIB),)


def test_a_new_driver_is_not_asked_the_old_way(driver: Scenario):
    driver.rules = [f"fail nvmlDeviceGetMemoryInfo {pynvml.NVML_ERROR_UNKNOWN}"]
    driver.write()
    memory = NvmlMemory()
    assert memory.read()[0] == 0
    assert not memory.first_call_only


CODES = {
    pynvml.NVML_ERROR_NO_PERMISSION: "denies access to this user",
    pynvml.NVML_ERROR_GPU_IS_LOST: "fallen off the bus",
    pynvml.NVML_ERROR_RESET_REQUIRED: "needs a reset",
    pynvml.NVML_ERROR_TIMEOUT: "did not answer in time",
    pynvml.NVML_ERROR_UNKNOWN: "error 999",
}


@pytest.mark.parametrize("code", CODES)
def test_an_error_of_the_driver_is_a_sentence_and_never_a_figure(driver: Scenario, code: int):
    memory = NvmlMemory("GPU-a,GPU-b")
    assert memory.read()[0] == 0
    driver.rules = [f"fail nvmlDeviceGetMemoryInfo_v2 {code} GPU-b"]
    driver.write()
    with pytest.raises(TelemetryError, match="GPU-b") as caught:
        memory.read()
    assert CODES[code] in str(caught.value) or "mock driver" in str(caught.value)
    assert f"(NVML error {code})" in str(caught.value)
    assert "\n" not in str(caught.value)
    # The other one is still seen by whoever can do with a part.
    used, parts, reasons = memory.read_partly()
    assert (used, parts) == (0, {"GPU-a": 0})
    assert len(reasons) == 1


def test_a_lost_device_is_found_again(driver: Scenario, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sglang_harness.memory.gpu.nvml.RETRY_AFTER", 0.1)
    memory = NvmlMemory()
    memory.read()
    driver.devices[1].lost = True
    driver.use("GPU-a", 1, MIB)
    used, parts, reasons = memory.read_partly()
    assert (used, parts) == (MIB, {"GPU-a": MIB})
    assert "GPU-b" in reasons[0]
    driver.devices[1].lost = False
    driver.write()
    assert set(memory.read_partly()[1]) == {"GPU-a"}, "not asked again at once"
    time.sleep(0.12)
    assert memory.read_partly() == (MIB, {"GPU-a": MIB, "GPU-b": 0}, [])


def test_a_driver_that_was_reloaded_is_found_again(driver: Scenario, monkeypatch):
    monkeypatch.setattr("sglang_harness.memory.gpu.nvml.RETRY_AFTER", 0.0)
    memory = NvmlMemory()
    memory.read()
    text = driver.file
    text.unlink()
    assert memory.read_partly()[1] == {}
    with pytest.raises(TelemetryError, match="not loaded"):
        memory.read()
    driver.write()
    assert memory.read() == (0, {"GPU-a": 0, "GPU-b": 0})


def test_all_gpus_cannot_be_meant_while_one_is_lost_and_another_can(driver: Scenario):
    driver.devices[1].lost = True
    driver.write()
    with pytest.raises(TelemetryError, match="GPU 1 cannot be asked: the GPU has fallen off"):
        NvmlMemory("all").read()
    assert NvmlMemory("0").read() == (0, {"GPU-a": 0})
    with pytest.raises(SpecError, match="fallen off the bus"):
        NvmlMemory("1").read()
    found, why = gpus()
    assert [g.uuid for g in found] == ["GPU-a"]
    assert why == ""


def test_without_permission_the_processes_are_unknown_and_the_device_is_not(driver: Scenario):
    driver.rules = [
        f"fail nvmlDeviceGetComputeRunningProcesses_v3 {pynvml.NVML_ERROR_NO_PERMISSION}"
    ]
    driver.write()
    with Driver() as session:
        with pytest.raises(TelemetryError, match="denies access"):
            session.processes("GPU-a")
        assert session.memory("GPU-a").used == 0


def test_a_device_that_does_not_tell_what_a_process_uses_is_read_all_the_same(driver: Scenario):
    driver.processes["GPU-a", 4] = -1
    driver.write()
    with Driver() as session:
        assert session.processes("GPU-a") == (ProcessUse(4, None),)


def test_a_process_counts_once_however_it_uses_the_device(driver: Scenario):
    driver.processes = {
        ("GPU-a", 9): 4 * GIB,
        ("GPU-a", 9, "graphics"): 4 * GIB,
        ("GPU-a", 10, "mps"): GIB,
    }
    driver.write()
    with Driver() as session:
        assert session.processes("GPU-a") == (ProcessUse(9, 4 * GIB), ProcessUse(10, GIB))


def test_mig_instances_are_devices_of_their_own(driver: Scenario):
    driver.devices += [
        Device("MIG-1", total=10 * GIB, reserved=MIB, parent="GPU-b", name="MIG 1g.10gb"),
        Device("MIG-2", total=20 * GIB, reserved=MIB, parent="GPU-b", name="MIG 2g.20gb"),
    ]
    driver.use("MIG-2", 8, GIB)
    with Driver() as session:
        found, _ = session.gpus()
    assert [(g.uuid, g.parent, g.split, g.instance) for g in found] == [
        ("GPU-a", "", False, None),
        ("GPU-b", "", True, None),
        ("MIG-1", "GPU-b", False, 0),
        ("MIG-2", "GPU-b", False, 1),
    ]
    # A GPU that is split means its instances: its own total would count them twice.
    assert NvmlMemory("all").read()[1] == {"GPU-a": 0, "MIG-1": 0, "MIG-2": GIB}
    assert NvmlMemory("1").read()[1] == {"MIG-1": 0, "MIG-2": GIB}
    assert NvmlMemory("1:1").read()[1] == {"MIG-2": GIB}


def test_no_driver_and_no_device_are_different_sentences(driver: Scenario):
    driver.devices = []
    driver.write()
    assert gpus() == ([], "the NVIDIA driver reports no GPU")
    driver.file.unlink()
    why = "the NVIDIA kernel driver is not loaded (NVML error 9)"
    assert gpus() == ([], f"the NVIDIA driver cannot be asked: {why}")


def test_a_driver_that_hangs_is_no_telemetry(driver: Scenario):
    memory = NvmlMemory(answers_within=0.2)
    memory.read()
    driver.rules = ["slow nvmlDeviceGetMemoryInfo_v2 1500 GPU-a"]
    driver.write()
    began = time.monotonic()
    with pytest.raises(TelemetryError, match=r"has not answered for 0\.2 s"):
        memory.read()
    assert time.monotonic() - began < 1
    driver.rules = []
    driver.write()
    time.sleep(1.6)
    assert memory.read()[0] == 0


def test_what_is_raised_in_bounded_time_is_raised():
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, 1)


#: What the driver's header calls them, and what the binding does.
STRUCTURES = {
    "memory_v1": pynvml.c_nvmlMemory_t,
    "memory_v2": pynvml.c_nvmlMemory_v2_t,
    "process_info": pynvml.c_nvmlProcessInfo_v3_t,
}


class _Layout(ctypes.Structure):
    _fields_ = [
        ("structure", ctypes.c_char_p),
        ("field", ctypes.c_char_p),
        ("offset", ctypes.c_uint),
        ("size", ctypes.c_uint),
    ]


def test_the_mock_lays_its_structures_out_as_the_binding_does():
    if reason := nvml_mock.why_not():
        pytest.skip(reason)
    if os.environ.get("NVML_MOCK_LIBRARY"):
        pytest.skip("NVML_MOCK_LIBRARY names another library, which has no table of layouts")
    library = ctypes.CDLL(str(nvml_mock.library()))
    count = ctypes.c_uint.in_dll(library, "nvml_mock_layout_count").value
    compiled = {
        (row.structure.decode(), row.field.decode()): (row.offset, row.size)
        for row in (_Layout * count).in_dll(library, "nvml_mock_layouts")
    }
    expected = {}
    for name, structure in STRUCTURES.items():
        expected[name, ""] = (0, ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            described = getattr(structure, field)
            expected[name, field] = (described.offset, described.size)
    assert compiled == expected
    version = ctypes.c_uint.in_dll(library, "nvml_mock_memory_v2").value
    assert version == pynvml.nvmlMemory_v2


def test_a_child_process_finds_the_mock_as_it_would_find_a_driver(driver: Scenario):
    driver.use("GPU-a", 3, 2 * GIB)
    code = (
        "import json, pynvml; pynvml.nvmlInit()\n"
        "h = pynvml.nvmlDeviceGetHandleByIndex(0)\n"
        "m = pynvml.nvmlDeviceGetMemoryInfo(h, pynvml.nvmlMemory_v2)\n"
        "print(json.dumps([pynvml.nvmlDeviceGetUUID(h), m.used]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=nvml_mock.environment(driver),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == ["GPU-a", 2 * GIB]


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NVML_MOCK_LIBRARY", raising=False)
    assert "no C compiler" in nvml_mock.why_not()
