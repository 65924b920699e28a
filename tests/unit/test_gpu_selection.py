"""Which GPUs words mean: --gpus, CUDA_VISIBLE_DEVICES and MIG."""

from __future__ import annotations

import pytest

from nvml_mock import Device, Scenario
from sglang_harness import ServerSpec
from sglang_harness.errors import SpecError
from sglang_harness.memory.gpu.driver import Gpu
from sglang_harness.memory.gpu.selection import allotted, select, visible
from sglang_harness.runtime.device import choose, cuda_environment, within_visible

A = Gpu(0, "GPU-aa11", "H100", 80)
B = Gpu(1, "GPU-aa22", "H100", 80)
C = Gpu(2, "GPU-bb33", "H100", 80, split=True)
C0 = Gpu(2, "MIG-c0", "H100 MIG 1g", 10, parent="GPU-bb33", instance=0)
C1 = Gpu(2, "MIG-c1", "H100 MIG 1g", 10, parent="GPU-bb33", instance=1)
ALL = [A, B, C, C0, C1]


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("all", [A, B, C0, C1]),
        ("0", [A]),
        ("1,0", [B, A]),
        (" 1 , 1 ", [B]),
        ("GPU-aa22", [B]),
        ("GPU-bb", [C0, C1]),
        ("2", [C0, C1]),
        ("2:1", [C1]),
        ("MIG-c0,0", [C0, A]),
    ],
)
def test_what_gpus_means(wanted: str, meant: list[Gpu]):
    assert select(ALL, wanted) == meant


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("7", r"gpus names 7, which this host does not have \(it has 0 GPU-aa11"),
        ("2:9", "gpus names 2:9"),
        ("GPU-zz", "gpus names GPU-zz"),
        ("GPU-aa", "which fits GPU-aa11, GPU-aa22"),
        ("0,", "does not have"),
    ],
)
def test_what_gpus_cannot_mean(wanted: str, words: str):
    with pytest.raises(SpecError, match=words):
        select(ALL, wanted)


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("1", [B]),
        ("1,0", [B, A]),
        ("", []),
        ("-1", []),
        ("0,7,1", [A]),
        ("GPU-aa2", [B]),
        ("GPU-aa", []),
        ("MIG-c1", [C1]),
        ("0,0", [A]),
    ],
)
def test_what_cuda_visible_devices_leaves(value: str, left: list[Gpu]):
    assert visible(ALL, {"CUDA_VISIBLE_DEVICES": value}) == left
    assert visible(ALL, {}) is None


def test_counting_unlike_gpus_in_cudas_own_order_is_not_guessed():
    mixed = [A, Gpu(1, "GPU-cc", "L4", 24)]
    with pytest.raises(SpecError, match="fastest first"):
        visible(mixed, {"CUDA_VISIBLE_DEVICES": "0"})
    by_bus = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible(mixed, by_bus) == mixed[1:]
    assert visible(mixed, {"CUDA_VISIBLE_DEVICES": "GPU-cc"}) == mixed[1:]


def test_all_means_all_that_are_left_and_a_name_has_to_be_among_them():
    only_b = {"CUDA_VISIBLE_DEVICES": "1"}
    assert allotted(ALL, "all", only_b) == [B]
    assert allotted(ALL, "GPU-aa22", only_b) == [B]
    assert allotted(ALL, "0", {}) == [A]
    with pytest.raises(SpecError, match="CUDA_VISIBLE_DEVICES=1 does not leave it"):
        allotted(ALL, "0", only_b)
    with pytest.raises(SpecError, match="leaves no GPU"):
        allotted(ALL, "all", {"CUDA_VISIBLE_DEVICES": ""})


def test_a_spec_gets_no_more_than_its_job_was_given(driver: Scenario):
    spec = ServerSpec(model="tiny", device="gpu")
    assert within_visible(spec, {}) is spec
    assert within_visible(spec, {"CUDA_VISIBLE_DEVICES": "1"}).gpus == "GPU-b"
    auto = ServerSpec(model="tiny")
    assert within_visible(auto, {"CUDA_VISIBLE_DEVICES": ""}).device == "cpu"
    with pytest.raises(SpecError, match="leaves no GPU"):
        within_visible(spec, {"CUDA_VISIBLE_DEVICES": ""})


def test_a_process_is_shown_its_gpus_by_number_and_mig_instances_by_uuid(driver: Scenario):
    driver.devices.append(Device("MIG-1", parent="GPU-b", total=10 << 30, reserved=0))
    driver.write()
    assert cuda_environment("all") == {}
    assert cuda_environment("GPU-a") == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    assert cuda_environment("1,0")["CUDA_VISIBLE_DEVICES"] == "MIG-1,0"


def test_an_engine_that_hands_out_gpus_is_given_those_that_are_named(driver: Scenario):
    info = {"Runtimes": {"nvidia": {}}}
    assert choose(ServerSpec(gpus="1"), info) == "gpu"
    with pytest.raises(SpecError, match="gpus names 4"):
        choose(ServerSpec(gpus="4"), info)
    assert ServerSpec(gpus="0:1,GPU-a").gpus == "0:1,GPU-a"
