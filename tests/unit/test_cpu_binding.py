"""Which cores the ranks of a parallel server get, and what a check's own server is started with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harness.errors import SpecError
from sglang_harness.run.server_pool import variant_of
from sglang_harness.runtime import cpu_binding, device
from sglang_harness.runtime.device import Gpu
from sglang_harness.spec import ServerSpec
from sglang_harness.suite import needs


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({}, 1),
        ({"tp-size": 2}, 2),
        ({"tp": "2"}, 2),
        ({"tensor-parallel-size": "2", "dp": 2}, 4),
        ({"pp-size": 2, "dp-size": "3"}, 6),
        ({"pipeline-parallel-size": 2}, 2),
        ({"tp-size": "many"}, 1),
        ({"tp-size": 0}, 1),
        ({"tp-size": True}, 1),
    ],
)
def test_ranks_are_counted_by_whatever_name_their_flag_has(arguments: dict[str, Any], number: int):
    assert cpu_binding.ranks(arguments) == number


def test_one_rank_needs_no_binding():
    assert cpu_binding.binding({"tp-size": 1}, [0, 1]) == {}
    assert cpu_binding.binding({}, [0, 1]) == {}


@pytest.mark.parametrize(
    ("number", "mine", "bound"),
    [
        (2, [0, 1], "0|1"),
        (2, [0, 1, 2, 3], "0,1|2,3"),
        (2, [4, 6, 9], "4|6"),
        (4, [0, 1], "0|1|0|1"),
        (2, [3], "3|3"),
    ],
)
def test_each_rank_gets_cores_that_are_there(number: int, mine: list[int], bound: str):
    assert cpu_binding.binding({"tp-size": number}, mine) == {cpu_binding.VARIABLE: bound}


@given(st.integers(2, 16), st.sets(st.integers(0, 127), min_size=1))
def test_every_rank_has_as_many_cores_as_every_other_and_none_is_made_up(
    number: int, mine: set[int]
):
    value = cpu_binding.binding({"dp-size": number}, sorted(mine))[cpu_binding.VARIABLE]
    parts = [[int(core) for core in part.split(",")] for part in value.split("|")]
    assert len(parts) == number
    assert len({len(part) for part in parts}) == 1
    assert all(set(part) <= mine for part in parts)
    if len(mine) >= number:
        used = [core for part in parts for core in part]
        assert len(set(used)) == len(used), "no two ranks share a core"


def engine_with(cpus: int) -> Any:
    return SimpleNamespace(info=lambda: {"NCPU": cpus})


def test_a_container_is_bound_to_cores_that_its_engine_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_binding, "cores_here", lambda: [1, 5])
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    assert cpu_binding.cores_of(engine_with(8)) == [1, 5]
    # An engine in a smaller virtual machine has fewer.
    assert cpu_binding.cores_of(engine_with(4)) == [1]
    assert cpu_binding.cores_of(engine_with(1)) == [0]
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.5:2375")
    assert cpu_binding.cores_of(engine_with(3)) == [0, 1, 2]


# --- what a server of two processes needs ---------------------------------------------------------


def server_on(kind: str, gpus: str = "all", cores: int = 2) -> Any:
    return SimpleNamespace(
        device=kind,
        lacks={},
        spec=ServerSpec(gpus=gpus),
        running=SimpleNamespace(cores=lambda: list(range(cores))),
    )


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [("all", None), ("0,1", None), ("GPU-b", "needs 2 GPUs"), ("1", "needs 2 GPUs")],
)
def test_two_gpus_are_those_that_the_spec_means(
    monkeypatch: pytest.MonkeyPatch, gpus: str, reason: str | None
):
    found = [Gpu(0, "GPU-a", "one", 1), Gpu(1, "GPU-b", "two", 1)]
    monkeypatch.setattr(device, "gpus", lambda: (found, ""))
    assert needs.TWO_DEVICES.lacking(server_on("gpu", gpus)) == reason


def test_on_a_cpu_it_takes_two_cores():
    assert needs.TWO_DEVICES.lacking(server_on("cpu", cores=1)) == "needs 2 processor cores"
    assert needs.TWO_DEVICES.lacking(server_on("cpu", cores=2)) is None


# --- a server beside another ----------------------------------------------------------------------

WANTED = ServerSpec.make(
    model="/models/large",
    sglang_version="0.5.23",
    port=30000,
    pull="always",
    memory="64g",
    server_args={"tp-size": 8, "quantization": "fp8"},
    environment={"NCCL_DEBUG": "INFO"},
    limits={"start": 1800},
)


def test_a_server_beside_it_has_its_image_and_limits_and_another_model_and_port():
    spec = variant_of(WANTED, image="an/image@sha256:1", model="tiny-qwen3")
    assert (spec.image, spec.sglang_version, spec.pull) == ("an/image@sha256:1", None, "missing")
    assert (spec.model, spec.port) == ("tiny-qwen3", None)
    assert (spec.memory, spec.limits.start) == ("64g", 1800)
    assert spec.server_args == WANTED.server_args
    assert spec.environment == WANTED.environment


def test_flags_of_its_own_replace_those_of_the_run_and_variables_join_them():
    spec = variant_of(
        WANTED,
        image=None,
        model="tiny",
        server_args={"dp_size": 2},
        environment={"NCCL_DEBUG": "WARN", "MINE": "1"},
    )
    assert spec.server_args == {"dp-size": 2}
    assert spec.environment == {"NCCL_DEBUG": "WARN", "MINE": "1"}
    assert variant_of(WANTED, image=None, model="tiny", server_args={}).server_args == {}


def test_what_it_leaves_alone_was_not_said_so_that_no_runtime_takes_offence():
    # The runtime compose refuses fields that its file has a say in, where they are given.
    spec = variant_of(ServerSpec.make(model="tiny"), image=None, model="tiny")
    refused = {"gpus", "publish_on", "hub_cache", "model_mount", "shm_size"}
    assert not refused & spec.model_fields_set


def test_a_slip_of_a_check_is_told_at_the_door():
    with pytest.raises(SpecError, match="port"):
        variant_of(WANTED, image=None, model="tiny", server_args={"port": 1})


def test_the_process_runtime_hands_the_binding_to_its_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Started for real, with a Python that prints its variables in place of a server."""
    from sglang_harness.runtime.process import SGLangProcess

    monkeypatch.setattr(cpu_binding, "cores_here", lambda: [2, 3])
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nenv\n")
    fake.chmod(0o755)
    spec = ServerSpec.make(model="tiny", server_args={"pp-size": 2})
    server = SGLangProcess(spec, python=fake, model=None, device="cpu", run_id="r")
    server.start()
    try:
        assert server.watch.wait(10) is not None
        told = server.logs().splitlines()
    finally:
        server.end()
    assert f"{cpu_binding.VARIABLE}=2|3" in told
    assert "TORCH_COMPILE_DISABLE=1" in told
