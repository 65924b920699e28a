"""The checks that need a GPU, against a real server and a mock driver: an honest server passes,
and each that lies with a release is told what it did. See ``gpu_proxy.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml
import pytest
from gpu_proxy import CONTEXT, HELD, UUID, Conduct, Hoarder, ProxyRuntime

import nvml_mock
from nvml_mock import GIB, MIB, Device, Scenario
from sglang_harness import suite
from sglang_harness.errors import DeviceNotIdle, EngineError
from sglang_harness.run.qualification import Qualification, Request
from sglang_harness.runtime import engine
from sglang_harness.runtime.process import ProcessRuntime
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.check import Check, Context, run_check
from sglang_harness.suite.checks.memory import release
from sglang_harness.verdict import CheckResult, Figure, Outcome, Verdict

SPEC = ServerSpec(model="tiny", device="gpu")
NOTHING = dict.fromkeys(HELD, 0.0)

pytestmark = pytest.mark.skipif(bool(nvml_mock.why_not()), reason=nvml_mock.why_not() or "-")


@pytest.fixture(scope="module")
def process_server() -> Iterator[Server]:
    with Server.start(ServerSpec(model="tiny"), runtime=ProcessRuntime()) as server:
        yield server


@pytest.fixture
def real_server(request: pytest.FixtureRequest) -> Server:
    """The shared one in its container; without an engine one as a process."""
    try:
        engine.connect().close()
    except EngineError:
        return request.getfixturevalue("process_server")
    return request.getfixturevalue("shared_server")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scenario]:
    monkeypatch.setenv("SGLANG_HARNESS_GPU_LEASES", str(tmp_path / "leases"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # A lie takes as long to be believed as the truth is waited for.
    monkeypatch.setattr(release, "FREE_WITHIN", 2.0)
    monkeypatch.setattr("sglang_harness.memory.gpu.guard.PATIENCE", 2.0)
    with nvml_mock.installed(Scenario(tmp_path / "scenario", [Device(UUID, base=4 * MIB)])) as s:
        yield s


OnGpu = Callable[..., Server]
Made = tuple[Path, dict[int, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Where the second checkpoint is, made once: all these servers are the same real one."""
    return tmp_path_factory.mktemp("scratch"), {}


@pytest.fixture
def on_gpu(real_server: Server, driver: Scenario) -> OnGpu:
    """``with on_gpu(Conduct(...)) as server``: started by the harness's own way, guard and all."""

    @contextmanager
    def start(conduct: Conduct, *, host_memory: bool = False) -> Iterator[Server]:
        runtime = ProxyRuntime(real_server, driver, conduct, host_memory=host_memory)
        with Server.start(SPEC, runtime=runtime) as server:
            yield server

    return start


def ask(check_id: str, server: Server, made: Made) -> tuple[CheckResult, list[Figure]]:
    check: Check = suite.registered()[check_id]

    def none() -> None:
        raise AssertionError("no check here needs a server of its own")

    for need in check.needs:
        assert need.lacking(server) is None, need.name
    return run_check(check, Context(server, 11, none, made[0], made[1]))


def lacking(check_id: str, server: Server) -> list[str]:
    needs = suite.registered()[check_id].needs
    return [reason for need in needs if (reason := need.lacking(server))]


def test_an_honest_server_passes(on_gpu: OnGpu, made: Made, driver: Scenario) -> None:
    with on_gpu(Conduct(late=0.4)) as server:
        marks = {r.mark: r.parts for r in server.memory.readings}
        assert marks["before start"] == {UUID: 4 * MIB}
        assert marks["ready"] == {UUID: 4 * MIB + CONTEXT + sum(HELD.values())}
        assert server.memory.samplers["nvml"].taken > 0

        told, figures = ask("memory/explained", server, made)
        assert told.outcome is Outcome.PASS, told.message
        assert figures[0].value == pytest.approx(CONTEXT / MIB, abs=1)

        by_tag, figures = ask("memory/release-by-tag", server, made)
        assert by_tag.outcome is Outcome.PASS, by_tag.message
        # It answers before the memory is free, and that time is a figure of its own.
        assert all(0.3 < f.value < 2 for f in figures), figures
        assert len(figures) == 3

        order, _ = ask("memory/colocated-order", server, made)
        assert order.outcome is Outcome.PASS, order.message
        steps = order.evidence["steps"]
        assert steps["released"][UUID] == 4 * MIB + CONTEXT
        assert steps["weights resumed"][UUID] == steps["released"][UUID] + HELD["weights"]
        # It says that it has a saver, so the control is not for it.
        assert "it has to release memory" in lacking("memory/release-without-saver", server)[0]
    (device,) = server.stopped.devices
    assert device.given_back
    given, _ = ask("memory/device-given-back", server, made)
    assert given.outcome is Outcome.PASS, given.message


def test_the_calls_come_in_the_order_of_trainers(on_gpu: OnGpu, made: Made) -> None:
    with on_gpu(Conduct(late=0.0)) as server:
        ask("memory/colocated-order", server, made)
        seen = [
            call
            for call in server.running.proxy.seen
            if call.startswith(("/release", "/resume", "/update", "/flush", "/generate"))
        ]
    start = seen.index("/release_memory_occupation kv_cache+weights+cuda_graph")
    assert seen[start - 1 : start + 6] == [
        "/flush_cache",
        "/release_memory_occupation kv_cache+weights+cuda_graph",
        "/resume_memory_occupation weights",
        "/flush_cache",
        "/update_weights_from_disk",
        "/flush_cache",
        "/resume_memory_occupation kv_cache+cuda_graph",
    ]
    assert seen[start + 6] == "/generate"


LIES = {
    "frees nothing": (Conduct(releases=NOTHING), "release of kv_cache, GPU GPU-a"),
    "frees half of the KV cache": (
        Conduct(releases={**dict.fromkeys(HELD, 1.0), "kv_cache": 0.5}),
        "release of kv_cache, GPU GPU-a",
    ),
    "keeps the weights": (
        Conduct(releases={**dict.fromkeys(HELD, 1.0), "weights": 0.0}),
        "release of weights, GPU GPU-a",
    ),
    "takes nothing back": (
        Conduct(resumes=NOTHING),
        "resume of kv_cache, GPU GPU-a",
    ),
    "says it holds nothing": (
        Conduct(says=dict.fromkeys(HELD, 0)),
        "enough to see whether it is released",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_release_that_is_none_is_told(on_gpu: OnGpu, made: Made, lie: str) -> None:
    conduct, words = LIES[lie]
    with on_gpu(conduct) as server:
        result, _ = ask("memory/release-by-tag", server, made)
    assert result.outcome is Outcome.FAIL, result.message
    assert words in result.message


ORDER_LIES = {
    "frees nothing": (Conduct(releases=NOTHING), "released, GPU GPU-a"),
    "the KV cache stays away": (
        Conduct(resumes={**dict.fromkeys(HELD, 1.0), "kv_cache": 0.0}),
        "all resumed, GPU GPU-a",
    ),
    "the push is only said to have succeeded": (
        Conduct(pushes=False, late=0.0),
        "parameters that stayed as they were",
    ),
}


@pytest.mark.parametrize("lie", ORDER_LIES)
def test_a_step_that_is_none_is_told(on_gpu: OnGpu, made: Made, lie: str) -> None:
    conduct, words = ORDER_LIES[lie]
    with on_gpu(conduct) as server:
        result, _ = ask("memory/colocated-order", server, made)
    assert result.outcome is Outcome.FAIL, result.message
    assert words in result.message


def test_a_server_that_says_it_holds_more_than_there_is(on_gpu: OnGpu, made: Made) -> None:
    with on_gpu(Conduct(says={**HELD, "kv_cache": 40 * GIB})) as server:
        result, _ = ask("memory/explained", server, made)
    assert result.outcome is Outcome.FAIL
    assert "that the server says it holds" in result.message


def test_without_the_saver_nothing_is_released_and_that_is_said(on_gpu: OnGpu, made: Made) -> None:
    with on_gpu(Conduct(saver=False, releases=NOTHING)) as server:
        reasons = lacking("memory/release-by-tag", server)
        assert reasons == [
            "the server was started without --enable-memory-saver: it releases nothing"
        ]
        result, _ = ask("memory/release-without-saver", server, made)
        assert result.outcome is Outcome.PASS, result.message
    with on_gpu(Conduct(saver=False, late=0.0)) as server:
        result, _ = ask("memory/release-without-saver", server, made)
        assert result.outcome is Outcome.FAIL
        assert "were freed: the other checks of releases hold here" in result.message


def test_cycles_of_an_honest_server_have_no_slope_and_a_leak_of_2_mb_has(
    on_gpu: OnGpu, made: Made
) -> None:
    with on_gpu(Conduct(late=0.0)) as server:
        result, _ = ask("memory/cycles", server, made)
        assert result.outcome is Outcome.PASS, result.message
    with on_gpu(Conduct(late=0.0, keeps=2 * MIB)) as server:
        result, figures = ask("memory/cycles", server, made)
        assert result.outcome is Outcome.FAIL
        assert "GPU GPU-a memory over cycles: expected a slope of zero" in result.message
        assert figures[0].value == pytest.approx(2.1, abs=0.2)


@pytest.mark.engine
def test_a_leak_in_the_servers_container_is_told_beside_a_gpu_that_is_steady(
    shared_server: Server, on_gpu: OnGpu, made: Made
) -> None:
    hoarder = Hoarder(shared_server)
    conduct = Conduct(late=0.0, before_answer=lambda: hoarder.more(2_000_000))
    try:
        with on_gpu(conduct, host_memory=True) as server:
            result, figures = ask("memory/cycles", server, made)
    finally:
        hoarder.end()
    assert result.outcome is Outcome.FAIL, result.message
    assert "container memory over cycles: expected a slope of zero" in result.message
    assert "GPU GPU-a memory" not in result.message
    (leak,) = (f.value for f in figures if f.name == "memory a cycle (container)")
    assert leak == pytest.approx(2, abs=0.5)


def test_a_gpu_that_is_lost_under_a_check_is_an_error_and_the_server_lives(
    on_gpu: OnGpu, made: Made, driver: Scenario
) -> None:
    with on_gpu(Conduct()) as server:
        driver.rules = [f"fail nvmlDeviceGetMemoryInfo_v2 {pynvml.NVML_ERROR_GPU_IS_LOST}"]
        driver.write()
        result, _ = ask("memory/release-by-tag", server, made)
        assert result.outcome is Outcome.ERROR
        assert "fallen off the bus" in result.message
        assert (
            server.client.generate("Hello", sampling={"max_new_tokens": 2}).completion_tokens == 2
        )
        assert server.memory.samplers["nvml"].alive
    (device,) = server.stopped.devices
    assert not device.given_back
    given, _ = ask("memory/device-given-back", server, made)
    assert given.outcome is Outcome.ERROR
    assert "could not be read" in given.message


def test_a_server_that_keeps_its_gpu_fails_and_no_other_is_started_on_it(
    on_gpu: OnGpu, made: Made, driver: Scenario
) -> None:
    with on_gpu(Conduct(leaves=False)) as server:
        pass
    result, _ = ask("memory/device-given-back", server, made)
    assert result.outcome is Outcome.FAIL
    assert f"process {os.getpid()}" in result.message
    with pytest.raises(DeviceNotIdle, match="did not give the rest back"), on_gpu(Conduct()):
        pass
    driver.use(UUID, os.getpid(), 0)
    with on_gpu(Conduct()):
        pass


class Quiet:
    """A viewer that shows nothing."""

    def say(self, message: str) -> None:
        pass

    def begin(self, check_id: str, number: int, total: int) -> None:
        pass

    def end(self, result: CheckResult) -> None:
        pass


def qualify(real_server: Server, driver: Scenario, conduct: Conduct, out: Path) -> Verdict:
    """A run that asks one thing alone, and not what becomes of the GPU."""
    runtime = ProxyRuntime(real_server, driver, conduct)
    request = Request(SPEC, out, runtime, patterns=["memory/explained"])
    return Qualification(request, Quiet()).run()


def test_a_run_whose_gpu_is_not_given_back_fails_whatever_was_asked(
    real_server: Server, driver: Scenario, tmp_path: Path
) -> None:
    verdict = qualify(real_server, driver, Conduct(), tmp_path / "good")
    assert (verdict.verdict, [c.id for c in verdict.checks]) == ("pass", ["memory/explained"])
    assert verdict.device["gpus"][0]["uuid"] == UUID
    assert verdict.device["driver"] == "570.86.15"
    assert {r.source for r in verdict.memory} == {"nvml"}
    assert verdict.memory[-1].peak_bytes is not None

    kept = qualify(real_server, driver, Conduct(leaves=False), tmp_path / "kept")
    assert kept.verdict == "fail"
    assert kept.reason == "failed: memory/device-given-back"
    assert f"process {os.getpid()}" in kept.checks[-1].message

    refused = qualify(real_server, driver, Conduct(), tmp_path / "refused")
    assert (refused.verdict, refused.exit_code) == ("error", 2)
    assert "did not give the rest back" in refused.checks[0].message
    assert "Nothing was started" in refused.checks[0].message
    assert Verdict.read(tmp_path / "refused" / "verdict.json").verdict == "error"


def test_a_run_without_telemetry_is_an_error_and_never_a_pass(
    real_server: Server, driver: Scenario, tmp_path: Path
) -> None:
    driver.rules = [f"fail nvmlDeviceGetMemoryInfo_v2 {pynvml.NVML_ERROR_NO_PERMISSION}"]
    driver.write()
    verdict = qualify(real_server, driver, Conduct(), tmp_path / "out")
    assert verdict.verdict == "error"
    assert "denies access to this user" in verdict.checks[0].message
