"""gpu-check's parts about memory and death, against a real server and a mock driver: they hold on
an honest server, and fail on each that lies. See ``gpu_proxy.py``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_proxy import CONTEXT, HELD, UUID, Conduct, GpuProxy, OnGpu, ProxyRuntime

import nvml_mock
from nvml_mock import MIB, Device, Scenario
from sglang_harness.gpu_check import served
from sglang_harness.gpu_check.context import Context
from sglang_harness.gpu_check.parts import (
    cycles,
    death,
    fused_layout,
    occupancy,
    planted_leak,
    pushes,
    releases,
)
from sglang_harness.gpu_check.servers import Servers
from sglang_harness.gpu_check.settings import Release, Settings
from sglang_harness.runtime import Order
from sglang_harness.runtime.process import ProcessRuntime
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.checks.memory import colocated, release

NOTHING = dict.fromkeys(HELD, 0.0)
HALF_OF_THE_CACHE = {**dict.fromkeys(HELD, 1.0), "kv_cache": 0.5}
MODEL = "random-small"

pytestmark = pytest.mark.skipif(bool(nvml_mock.why_not()), reason=nvml_mock.why_not() or "-")


@pytest.fixture(scope="module")
def real_server() -> Iterator[Server]:
    with Server.start(ServerSpec(model=MODEL), runtime=ProcessRuntime()) as server:
        yield server


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scenario]:
    monkeypatch.setenv("SGLANG_HARNESS_GPU_LEASES", str(tmp_path / "leases"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(served, "model", lambda _, seed=0: f"{MODEL}:{seed}" if seed else MODEL)
    # A lie takes as long to be believed as the truth is waited for.
    for module in (release, releases):
        monkeypatch.setattr(module, "FREE_WITHIN", 2.0)
    for module in ("memory.gpu.guard", "gpu_check.parts.occupancy", "gpu_check.parts.death"):
        monkeypatch.setattr(f"sglang_harness.{module}.PATIENCE", 2.0)
    for module in (colocated, planted_leak):
        monkeypatch.setattr(module, "CYCLES", colocated.FEWEST_CYCLES)
    scenario = Scenario(tmp_path / "scenario", [Device(UUID, base=4 * MIB)])
    # For the second run, which is a process of its own.
    monkeypatch.setenv("LD_LIBRARY_PATH", nvml_mock.environment(scenario)["LD_LIBRARY_PATH"])
    with nvml_mock.installed(scenario):
        yield scenario


class Reports:
    """What a part reports while it runs."""

    def __init__(self) -> None:
        self.put: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        self.headline = ""

    def __call__(self, report: dict[str, Any]) -> None:
        if report["kind"] == "put":
            self.put[report["key"]] = report["value"]
        elif report["kind"] == "note":
            self.notes[report["what"]] = report["value"]
        elif report["kind"] == "headline":
            self.headline = report["text"]


class ServersOf(Servers):
    """Servers of a runtime that the test made."""

    def __init__(self, runtime: Any, settings: Settings, reports: Reports) -> None:
        super().__init__(settings, settings.releases[0], reports, {})
        self._made = runtime

    def runtime(self) -> Any:
        return self._made


Ask = Callable[..., tuple[Context, Reports]]


@pytest.fixture
def asked(real_server: Server, driver: Scenario, tmp_path: Path) -> Iterator[Ask]:
    """``asked(Conduct(...))``: the context of a part whose servers behave so."""
    open_servers: list[ServersOf] = []

    def context(conduct: Conduct, *, runtime: Any = None) -> tuple[Context, Reports]:
        settings = Settings(
            out=tmp_path / "out",
            gpus=[UUID],
            releases=[Release(version="0.5.23")],
            ends_at=time.time() + 600,
            models=tmp_path / "models",
        )
        reports = Reports()
        servers = ServersOf(
            runtime or ProxyRuntime(real_server, driver, conduct), settings, reports
        )
        open_servers.append(servers)
        made = Context(
            settings,
            settings.releases[0],
            "a-part",
            ends_at=time.time() + 300,
            report=reports,
            servers=lambda: servers,
            earlier={},
        )
        return made, reports

    yield context
    for servers in open_servers:
        servers.close()


class PlanterOf:
    """Holds memory of the mock's GPU under a process id of its own."""

    uuid = UUID
    PID = 4_000_000

    def __init__(self, driver: Scenario, *, honest: bool = True) -> None:
        self._driver, self._held, self._honest = driver, 300 * MIB, honest

    def __call__(self, *_: object) -> PlanterOf:
        return self

    def __enter__(self) -> PlanterOf:
        self._driver.use(UUID, self.PID, self._held)
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.use(UUID, self.PID, 0)

    def keep(self, amount: int) -> None:
        self._held += amount if self._honest else 0
        self._driver.use(UUID, self.PID, self._held)


# --- weights -----------------------------------------------------------------------------------


def test_pushes_and_checksums_of_an_honest_server_hold(asked: Ask) -> None:
    context, reports = asked(Conduct(late=0.0))
    # What the proxy stands in front of computes on a CPU, and hashes as one.
    server = served.shared(context)
    server.device = "cpu"
    told = fused_layout.run(context)
    assert (told["different"], told["only_stated"]) == (0, [])
    assert told["equal"] > 20
    routes = pushes.run(context)["routes"]
    by = {name: route for name, route in routes.items() if "lacking" not in route}
    assert sorted(by) == ["disk", "tensor", "tensor-bucket"]
    assert all(route["held"] and route["pushes"] == 6 for route in by.values()), routes
    for name in ("shared-memory", "distributed"):
        assert routes[name]["lacking"] == "it stands behind a proxy"
    # Read by NVML: the mock's GPU does not move under a push.
    assert by["disk"]["rows"][0]["gpu_before_mib"] == (4 * MIB + CONTEXT + sum(HELD.values())) / MIB
    assert by["disk"]["gpu_above_before_mib"] == 0.0
    assert reports.put["routes"] == routes


def test_a_push_that_is_only_said_to_have_succeeded_fails_the_part(asked: Ask) -> None:
    context, reports = asked(Conduct(late=0.0, pushes=False))
    served.shared(context).device = "cpu"
    with pytest.raises(AssertionError, match=r"disk, push 1 .* expected good, got failed"):
        pushes.run(context)
    assert reports.put["routes"]["disk"]["held"] is False


# --- release and resume ------------------------------------------------------------------------


def test_releases_of_an_honest_server_hold_with_a_line_around_each_answer(asked: Ask) -> None:
    context, reports = asked(Conduct(late=0.4))
    told = releases.run(context)
    rows = {row["tags"]: row for row in told["releases"]}
    assert list(rows) == ["kv_cache", "weights", "kv_cache+weights", "cuda_graph"]
    for tags, row in rows.items():
        held = sum(HELD[tag] for tag in tags.split("+")) / MIB
        change = row["release"]
        assert row["freed_mib"] == pytest.approx(held, abs=0.2)
        # It answers before the memory is free: at the answer all of it is still in use.
        assert change["at_answer_mib"] == change["before_mib"]
        assert change["answer_to_settled_seconds"] == pytest.approx(0.4, abs=0.25)
        # 200 are asked for; it is a figure, as a machine with other work reaches fewer.
        assert change["readings_per_second"] >= 20
        assert change["line"][0][0] < 0 < change["line"][-1][0]
        assert row["answers_right"]
    assert told["colocated_order"]["outcome"] == "pass"
    assert told["colocated_order"]["steps_mib"]["released"] == (4 * MIB + CONTEXT) / MIB
    assert told["constants"][0]["holds"]
    assert "proposed" in reports.notes["tolerance of releases"]


RELEASE_LIES = {
    "frees nothing": (Conduct(releases=NOTHING), "release of kv_cache, GPU GPU-a"),
    "frees half of the cache": (
        Conduct(releases=HALF_OF_THE_CACHE),
        "release of kv_cache, GPU GPU-a",
    ),
    "takes nothing back": (Conduct(resumes=NOTHING), "resume of kv_cache, GPU GPU-a"),
    "the push is only said to have succeeded": (
        Conduct(pushes=False, late=0.0),
        "parameters that stayed as they were",
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("lie", RELEASE_LIES)
def test_a_release_that_is_none_fails_the_part(asked: Ask, lie: str) -> None:
    conduct, words = RELEASE_LIES[lie]
    context, reports = asked(conduct)
    with pytest.raises(AssertionError, match=words):
        releases.run(context)
    assert len(reports.put["releases"]) == 4, "its figures are kept"


# --- leaks -------------------------------------------------------------------------------------


def test_cycles_without_a_leak_hold_and_those_with_one_fail(asked: Ask) -> None:
    context, reports = asked(Conduct(late=0.0))
    slope = cycles.run(context)["slopes"][f"GPU {UUID}"]
    assert (slope["mb_a_cycle"], slope["claimed"]) == (0.0, False)
    context.close_server()
    context, reports = asked(Conduct(late=0.0, keeps=2 * MIB))
    with pytest.raises(AssertionError, match=f"GPU {UUID} memory over cycles"):
        cycles.run(context)
    assert reports.put["slopes"][f"GPU {UUID}"]["mb_a_cycle"] == pytest.approx(2.1, abs=0.01)


def test_a_planted_leak_is_claimed_and_measured(
    asked: Ask, driver: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted_leak, "ChildPlanter", PlanterOf(driver))
    context, reports = asked(Conduct(late=0.0))
    told = planted_leak.run(context)
    assert told["slopes"][UUID]["mb_a_cycle"] == told["planted_mb_a_cycle"]
    assert told["released_each_cycle"]
    assert "8.39 MB a cycle planted, 8.39 seen" in reports.headline


@pytest.mark.parametrize(
    ("conduct", "honest", "words"),
    [
        (Conduct(late=0.0), False, "expected a leak to be claimed"),
        pytest.param(
            *(Conduct(late=0.0, keeps=8 * MIB), True, "within the interval"),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_planted_leak_that_is_not_seen_as_it_is_fails_the_part(
    asked: Ask,
    driver: Scenario,
    monkeypatch: pytest.MonkeyPatch,
    conduct: Conduct,
    honest: bool,
    words: str,
) -> None:
    monkeypatch.setattr(planted_leak, "ChildPlanter", PlanterOf(driver, honest=honest))
    context, _ = asked(conduct)
    with pytest.raises(AssertionError, match=words):
        planted_leak.run(context)


# --- a second run ------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_gpu_is_given_back(asked: Ask) -> None:
    context, reports = asked(Conduct())
    told = occupancy.run(context)
    assert told["second_run_by_lease"]["error"] == "LeaseTaken"
    assert "a server with random-small" in told["second_run_by_lease"]["message"]
    assert told["second_run_by_guard"]["error"] == "DeviceNotIdle"
    assert told["guard_names_a_process"]
    assert told["next_run"]["before"] == {UUID: 4 * MIB}
    assert told["residue_mib"] == 0.0
    assert "memory/gpu/guard.py IDLE_BELOW" in reports.notes


@pytest.mark.nightly
def test_a_gpu_that_is_not_given_back_fails_the_part(asked: Ask) -> None:
    context, _ = asked(Conduct(leaves=False))
    with pytest.raises(AssertionError, match=r"after the server's end.*the next run: expected"):
        occupancy.run(context)


# --- death -------------------------------------------------------------------------------------


class Killable(OnGpu):
    """A server of its own whose death the mock's GPU follows, ``conduct.late`` seconds later."""

    def __init__(self, real: Server, proxy: GpuProxy, run_id: str, *, own: bool) -> None:
        super().__init__(real, proxy, run_id, host_memory=False)
        self._own = own

    def start(self) -> None:
        super().start()
        self.watch.call_on_end(self._gone)

    def _gone(self) -> None:
        time.sleep(self.proxy.conduct.late)
        self.proxy.unload()

    def host_pids(self) -> list[int]:
        return self._real.running.host_pids()

    def end(self, *, at_once: bool = False) -> int:
        super().end()
        if self._own:
            self._real.stop(at_once=True)
        return 0


class KillableRuntime(ProxyRuntime):
    """Starts a real server for each that is asked for; the second is ``again``, where given."""

    def __init__(self, driver: Scenario, conduct: Conduct, again: Server | None = None) -> None:
        self._scenario, self._conduct = driver, conduct
        self._next = [None, again]

    def prepare(self, order: Order) -> Killable:
        there = self._next.pop(0)
        real = there or Server.start(ServerSpec(model="tiny"), runtime=ProcessRuntime())
        proxy = GpuProxy(real, self._conduct, self._scenario)
        return Killable(real, proxy, order.run_id, own=there is None)


@pytest.mark.nightly
def test_a_killed_scheduler_is_noticed_and_another_server_answers(
    asked: Ask, driver: Scenario
) -> None:
    conduct = Conduct(late=0.5)
    context, reports = asked(conduct, runtime=KillableRuntime(driver, conduct))
    told = death.run(context)
    assert told["killed"] == "sglang::scheduler"
    assert told["noticed_after_seconds"] > 0
    # The mock's GPU follows the whole server, half a second after its end.
    assert told["free_after_seconds"] >= told["noticed_after_seconds"]
    assert told["after_mib"] == 4.0
    assert told["fresh_server_answers"] == 2
    assert "exit code 137" in reports.notes["reason"]


@pytest.mark.nightly
def test_a_gpu_that_a_killed_server_stays_on_fails_the_part(
    asked: Ask, driver: Scenario, real_server: Server
) -> None:
    conduct = Conduct(leaves=False)
    # Nothing of the second one is started: the guard refuses it.
    context, reports = asked(conduct, runtime=KillableRuntime(driver, conduct, real_server))
    with pytest.raises(AssertionError, match=r"expected at most .* a fresh server: expected to"):
        death.run(context)
    assert reports.put["free_after_seconds"] is None
