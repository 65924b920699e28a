"""The host that a kit is for: what describes it, and what a person says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nvml_mock
from nvml_mock import GIB, Device, Scenario
from sglang_harness.errors import KitError
from sglang_harness.kit import describe, request
from sglang_harness.kit.record import KitRecord
from sglang_harness.kit.target import Target, capability, shipped

DESCRIBE = Path(describe.__file__)
SHIPPED = "h100-python3.12-torch2.11-cuda13"


def described(*, python: str = sys.executable, **environment: str) -> dict[str, object]:
    ended = subprocess.run(
        [python, "-I", str(DESCRIBE)], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(ended.stdout)


def test_a_description_of_this_host_is_a_target():
    text = json.dumps(described(PATH="/nowhere"))
    target = Target.model_validate_json(text)
    assert target.python_minor == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert target.packages["pydantic"]
    assert json.loads(text)["tools"]["nvcc"] in (None, "/usr/local/cuda/bin/nvcc")


def test_the_description_imports_nothing_but_the_standard_library(tmp_path: Path):
    alone = tmp_path / "carried.py"
    shutil.copy(DESCRIBE, alone)
    ended = subprocess.run(
        [sys.executable, "-I", "-S", str(alone)], capture_output=True, text=True, check=True
    )
    assert json.loads(ended.stdout)["packages"] == {}


@pytest.mark.parametrize("minor", ["3.10", "3.12", "3.13", "3.14"])
def test_the_description_runs_under_other_pythons(minor: str):
    python = shutil.which(f"python{minor}")
    if python is None or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip(f"no Python {minor} here")
    told = described(python=python, PATH="/usr/bin")
    assert str(told["python"]).startswith(minor)


def test_a_torch_in_the_users_own_site_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    torch = tmp_path / "lib" / f"python{minor}" / "site-packages" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("")
    (torch / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda = '13.0'\n")
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path))
    base = Path(sys._base_executable)  # type: ignore[attr-defined]
    told = json.loads(request.described(base))
    assert (told["torch"], told["cuda"]) == ("2.11.0+cu130", "13.0")


def test_gpus_are_told_by_the_driver(tmp_path: Path):
    if reason := nvml_mock.why_not():
        pytest.skip(reason)
    scenario = Scenario(tmp_path / "scenario", [Device("GPU-a"), Device("GPU-b", 24 * GIB)])
    scenario.rules = ["capability GPU-b 8 6"]
    told = described(**nvml_mock.environment(scenario))
    assert told["driver"] == "570.86.15"
    assert told["driver_trouble"] is None
    mock = {"name": "NVIDIA Mock 80GB"}
    assert told["gpus"] == [
        {**mock, "capability": "9.0", "memory_bytes": 80 * GIB, "uuid": "GPU-a"},
        {**mock, "capability": "8.6", "memory_bytes": 24 * GIB, "uuid": "GPU-b"},
    ]


def test_a_gpu_whose_memory_the_driver_does_not_tell_is_there_all_the_same(tmp_path: Path):
    if reason := nvml_mock.why_not():
        pytest.skip(reason)
    # NVML_ERROR_NO_PERMISSION: a GPU with MIG, seen without privileges.
    scenario = Scenario(tmp_path / "scenario", [Device("GPU-a")])
    scenario.rules = ["fail nvmlDeviceGetMemoryInfo 4"]
    told = described(**nvml_mock.environment(scenario))
    (gpu,) = told["gpus"]  # type: ignore[misc]
    assert (gpu["uuid"], gpu["memory_bytes"], told["driver_trouble"]) == ("GPU-a", None, None)
    Target.model_validate_json(json.dumps(told))


def test_a_gpu_that_is_lost_does_not_hide_the_others(tmp_path: Path):
    if reason := nvml_mock.why_not():
        pytest.skip(reason)
    scenario = Scenario(tmp_path / "scenario", [Device("GPU-a"), Device("GPU-b")])
    scenario.rules = ["fail nvmlDeviceGetCudaComputeCapability 15 GPU-a"]
    told = described(**nvml_mock.environment(scenario))
    assert [gpu["uuid"] for gpu in told["gpus"]] == ["GPU-b"]  # type: ignore[attr-defined]
    assert str(told["driver_trouble"]).startswith("GPU 0: nvmlDeviceGetCudaComputeCapability")


def test_a_driver_that_fails_is_not_taken_for_a_host_without_gpus(tmp_path: Path):
    if reason := nvml_mock.why_not():
        pytest.skip(reason)
    scenario = Scenario(tmp_path / "scenario", rules=["fail nvmlDeviceGetCount_v2 999"])
    told = described(**nvml_mock.environment(scenario))
    assert told["gpus"] == []
    assert "999" in str(told["driver_trouble"])


def test_a_driver_that_does_not_answer_does_not_hold_up_the_description(
    monkeypatch: pytest.MonkeyPatch, driver: Scenario
):
    library = nvml_mock.library()
    driver.rules = ["slow nvmlDeviceGetCount_v2 3000"]
    driver.write()
    monkeypatch.setattr(describe, "DRIVER_WITHIN", 0.2)
    original = describe.ctypes.CDLL
    monkeypatch.setattr(describe.ctypes, "CDLL", lambda _: original(str(library)))
    gpus, version, trouble = describe.gpus_and_driver()
    assert (gpus, version) == ([], None)
    assert trouble == "the NVIDIA driver did not answer within 0.2 s"


def test_torch_and_its_cuda_are_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "version.py").write_text(
        "__all__ = ['__version__', 'cuda']\n__version__ = '2.11.0+cu130'\n"
        "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert describe.torch_and_cuda() == ("2.11.0+cu130", "13.0")
    (package / "version.py").write_text("__version__ = '2.11.0+cpu'\ncuda: Optional[str] = None\n")
    assert describe.torch_and_cuda() == ("2.11.0+cpu", None)


def test_the_shipped_target_is_there_by_its_name():
    assert SHIPPED in shipped()
    target = Target.read(SHIPPED)
    assert (target.python_minor, target.torch_release, target.cuda_major) == ("3.12", "2.11.0", 13)
    assert target.architectures == ("sm90",)
    assert target.packages["numpy"] is None
    assert target.packages["tokenizers"] == "0.23.2"


def test_a_target_is_made_of_what_a_person_knows(tmp_path: Path):
    installed = tmp_path / "freeze.txt"
    installed.write_text(
        "# of the host\nnumpy==2.3.1\nTyping_Extensions\nmine @ file:///somewhere\n\n"
    )
    target = Target.from_options(
        python="3.11", torch="2.13.0", cuda="13", gpu="sm_90a", installed=installed
    )
    assert target.packages == {
        "torch": "2.13.0",
        "numpy": "2.3.1",
        "typing-extensions": None,
        "mine": None,
    }
    assert target.architectures == ("sm90",)
    assert target.on("12.0").architectures == ("sm120",)


@pytest.mark.parametrize("given", ["sm90", "SM_90", "9.0", "90", "sm90a"])
def test_a_gpu_generation_may_be_written_in_any_usual_way(given: str):
    assert capability(given) == "9.0"


def test_what_is_no_target_is_said_in_one_line(tmp_path: Path):
    with pytest.raises(KitError, match=r"No target is named 'h100'.*Shipped: .*h100-python"):
        Target.read("h100")
    broken = tmp_path / "target.json"
    broken.write_text('{"schema": 1, "python": "3.12", "torch": null, "cuda": null}')
    with pytest.raises(KitError, match=r"not the description of a host: packages: Field required"):
        Target.read(str(broken))
    broken.write_text('{"schema": 2}')
    with pytest.raises(KitError, match="schema"):
        Target.read(str(broken))
    with pytest.raises(KitError, match="'hopper' is not a GPU generation"):
        capability("hopper")
    with pytest.raises(KitError, match="no target: python"):
        Target.from_options(python="2.7", torch="2.11.0", cuda="13", gpu="sm90", installed=None)
    broken.write_text("numpy>=2\n")
    with pytest.raises(KitError, match=r"line 1: 'numpy>=2' is neither a name nor name==version"):
        Target.from_options(python="3.12", torch="2.11.0", cuda="13", gpu="sm90", installed=broken)


def test_a_kits_record_is_read_back_as_it_was_written(tmp_path: Path):
    record = KitRecord.model_validate(
        {
            "schema": 1,
            "name": "sglang-harness-kit-0.5.15-torch2.11-cp312-sm90",
            "harness": {"version": "1", "revision": None},
            "made_for": {
                "python": "3.12",
                "torch": "2.11.0",
                "cuda": 13,
                "machine": "x86_64",
                "glibc": "2.34",
                "architectures": ["sm90"],
            },
            "payload": {"file": "payload.tar.xz", "sha256": "0" * 64, "unpacked_bytes": 1},
            "needs": ["numpy"],
            "releases": [],
            "packages": [],
        }
    )
    file = tmp_path / "kit.json"
    file.write_text(record.as_json())
    assert json.loads(file.read_text())["schema"] == 1
    assert KitRecord.read(file) == record
    file.write_text("{}")
    with pytest.raises(KitError, match="not a kit's record: name: Field required"):
        KitRecord.read(file)
