"""Judges of gpu-check's parts about weights, memory, death and a second GPU: good observations
hold, and each thing that can be wrong is told. No server, no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_check_contexts import context, figures

from sglang_harness.errors import NotProvided, Refused
from sglang_harness.gpu_check import bounds, planter, served
from sglang_harness.gpu_check.device_timeline import (
    Change,
    change,
    seconds_until_it_stays,
    thinned,
)
from sglang_harness.gpu_check.outcomes import NotHere
from sglang_harness.gpu_check.parts import (
    cycles,
    death,
    fused_layout,
    occupancy,
    planted_leak,
    pushes,
    releases,
    second_gpu,
)
from sglang_harness.gpu_check.parts.death import DeathSeen
from sglang_harness.gpu_check.parts.fused_layout import LayoutSeen
from sglang_harness.gpu_check.parts.occupancy import OccupancySeen
from sglang_harness.gpu_check.parts.planted_leak import PlantedSeen
from sglang_harness.gpu_check.parts.pushes import OnePush, RouteSeen
from sglang_harness.gpu_check.parts.releases import ReleasesSeen, TagsSeen
from sglang_harness.gpu_check.parts.second_gpu import TwoRanksSeen
from sglang_harness.gpu_check.probes.second_run import SecondRun
from sglang_harness.memory.gpu.guard import GIVEN_BACK_WITHIN, IDLE_BELOW
from sglang_harness.memory.timeline import Sample
from sglang_harness.suite.lib.scored import Scored
from sglang_harness.verdict import CheckResult, Outcome
from sglang_harness.weights import routes

MIB = 1 << 20
GIB = 1 << 30
GPU = "GPU-a"
OTHER = "GPU-b"


def answer(served_logprob: float = -1.0) -> Scored:
    """One answer of one token; -1.0 is what the reference model says."""
    return Scored(
        prompt="Hello",
        prompt_ids=[1],
        text="x",
        output_ids=[7],
        served=[served_logprob],
        served_ids=[7],
        oracle=[-1.0],
        best_ids=[7],
        best=[-1.0],
        prompt_tokens=1,
        completion_tokens=1,
        cached_tokens=0,
        finish="length",
        tolerance=0.1,
    )


# --- the timeline ------------------------------------------------------------------------------


def samples(*readings: tuple[float, int]) -> list[Sample]:
    return [Sample(seconds, used, {GPU: used}) for seconds, used in readings]


def below(limit: int) -> Any:
    return lambda parts: parts[GPU] <= limit


def test_memory_is_free_from_the_reading_on_from_which_it_stays_free():
    line = samples((1.0, 9), (1.1, 2), (1.2, 9), (1.3, 3), (1.4, 2))
    assert seconds_until_it_stays(line, since=1.0, there=below(3)) == pytest.approx(0.3)
    assert seconds_until_it_stays(line, since=1.0, there=below(9)) == 0.0
    assert seconds_until_it_stays(line, since=1.0, there=below(1)) is None
    assert seconds_until_it_stays([], since=1.0, there=below(9)) is None


def test_a_change_says_what_was_in_use_at_the_answer_and_how_long_it_took_after_it():
    timeline = SimpleNamespace(
        line=SimpleNamespace(samples=samples((0.0, 900), (1.0, 800), (1.5, 400), (2.0, 401))),
        readings_per_second=100.0,
    )
    seen = change(
        timeline,  # type: ignore[arg-type]
        before={GPU: 900},
        settled={GPU: 400},
        called=0.5,
        answered=0.9,
        within=5,
    )
    assert (seen.at_answer, seen.settled) == ({GPU: 800}, {GPU: 400})
    assert seen.answered_after == pytest.approx(0.4)
    assert seen.settled_after == pytest.approx(0.6)


def test_a_line_keeps_the_readings_around_each_change_and_its_ends():
    steady = samples(*((n / 100, 5 * MIB if n < 50 else 2 * MIB) for n in range(100)))
    kept = thinned(steady, origin=0.5)
    assert [round(seconds, 2) for seconds, _ in kept] == [-0.5, -0.01, 0.0, 0.49]
    assert [used for _, used in kept] == [5.0, 5.0, 2.0, 2.0]
    moving = samples(*((n / 100, n * MIB) for n in range(1000)))
    few = thinned(moving, origin=0.0, most=20)
    assert len(few) == 20
    assert (few[0][1], few[-1][1]) == (0.0, 999.0)


# --- bounds ------------------------------------------------------------------------------------


def test_bounds_in_use_stand_beside_what_was_seen_and_a_proposal(monkeypatch):
    monkeypatch.delenv("SGLANG_HARNESS_GPU_IDLE_BELOW", raising=False)
    idle = bounds.idle([4 * MIB, 3 * MIB], first_call_only=False)
    assert idle.told() == {
        "constant": "memory/gpu/guard.py IDLE_BELOW",
        "in_use_mib": IDLE_BELOW / MIB,
        "seen_mib": 4.0,
        "proposed_mib": 32.0,
        "holds": True,
    }
    left = bounds.residue([100 * MIB])
    assert (left.in_use, left.proposed, left.holds) == (GIVEN_BACK_WITHIN, 224 * MIB, False)


def test_nothing_is_proposed_where_nothing_was_seen():
    assert bounds.residue([]).told()["proposed_mib"] is None
    assert bounds.of_release([]).told()["seen_mib"] is None


def test_the_tolerance_is_held_against_the_release_that_comes_nearest_to_it():
    # 40 MiB of 20 GiB is little; 30 MiB of 1 GiB is most of what is allowed.
    bound = bounds.of_release([(40 * MIB, 20 * GIB), (30 * MIB, GIB), (-9, GIB)])
    assert bound.seen == 30 * MIB
    assert bound.proposed == 64 * MIB


# --- releases ----------------------------------------------------------------------------------

HOLDS = {"kv_cache": 20 * GIB, "weights": 2 * GIB, "cuda_graph": GIB // 4}
BEFORE = 30 * GIB


def moved(before: int, settled: int) -> Change:
    return Change({GPU: before}, {GPU: before}, {GPU: settled}, 0.1, 0.3, 99.0)


def one(tags: tuple[str, ...], *, freed: float = 1.0, back: float = 1.0) -> TagsSeen:
    by = sum(HOLDS[tag] for tag in tags)
    low = BEFORE - int(by * freed)
    return TagsSeen(
        tags=tags,
        said=by,
        released=moved(BEFORE, low),
        resumed=moved(low, low + int(by * back)),
        answers=[answer()],
    )


def all_released(**instead: TagsSeen) -> ReleasesSeen:
    each = [instead.get("+".join(tags).replace("+", "_and_"), one(tags)) for tags in releases.TAGS]
    return ReleasesSeen([GPU], each, [])


def test_releases_that_free_what_was_said_hold():
    assert releases.wrong(all_released()) == []
    told = releases.figures(all_released())
    assert [row["tags"] for row in told["releases"]] == [
        *("kv_cache", "weights", "kv_cache+weights", "cuda_graph")
    ]
    assert told["releases"][0]["freed_mib"] == 20 * 1024
    assert told["constants"][0]["seen_mib"] == 0.0


WRONG_RELEASES: dict[str, tuple[ReleasesSeen, str]] = {
    "half": (
        all_released(kv_cache=one(("kv_cache",), freed=0.5, back=0.5)),
        "release of kv_cache, GPU GPU-a: expected at least",
    ),
    "not resumed": (
        all_released(weights=one(("weights",), back=0.0)),
        "resume of weights, GPU GPU-a",
    ),
    "graphs take more": (
        all_released(cuda_graph=one(("cuda_graph",), back=3.0)),
        "resume of cuda_graph, GPU GPU-a",
    ),
    "wrong after the graphs": (
        all_released(cuda_graph=replace(one(("cuda_graph",)), answers=[answer(-3.0)])),
        "after cuda_graph",
    ),
    "wrong afterwards": (
        all_released(weights=replace(one(("weights",)), answers=[answer(-3.0)])),
        "afterwards",
    ),
    "checksums": (replace(all_released(), differing_checksums=["model.norm"]), "checksums with"),
    "no GPU": (replace(all_released(), devices=[]), "GPUs that the server is on"),
    "says nothing": (
        all_released(kv_cache=replace(one(("kv_cache",)), said=None)),
        "what the server says of kv_cache",
    ),
    "one is missing": (
        ReleasesSeen([GPU], [one(tags) for tags in releases.TAGS[:2]], []),
        "release of kv_cache+weights: expected one, got none",
    ),
}


@pytest.mark.parametrize("what", WRONG_RELEASES)
def test_a_release_that_is_none_is_told(what: str):
    seen, words = WRONG_RELEASES[what]
    assert any(words in each for each in releases.wrong(seen)), releases.wrong(seen)


# --- leaks -------------------------------------------------------------------------------------


def planted(by_cycle: Mapping[str, int], count: int = 20) -> PlantedSeen:
    used = {
        uuid: [10 * GIB + number * each for number in range(count)]
        for uuid, each in by_cycle.items()
    }
    return PlantedSeen(GPU, 8 * MIB, used, True, [1.0] * count)


def test_a_planted_leak_that_is_claimed_and_measured_holds():
    seen = planted({GPU: 8 * MIB, OTHER: 0})
    assert planted_leak.wrong(seen) == []
    told = planted_leak.figures(seen)
    assert told["slopes"][GPU]["claimed"]
    assert told["slopes"][GPU]["mb_a_cycle"] == pytest.approx(8.3886, abs=1e-3)
    assert not told["slopes"][OTHER]["claimed"]


@pytest.mark.parametrize(
    ("by_cycle", "count", "words"),
    [
        ({GPU: 0}, 20, "expected a leak to be claimed"),
        ({GPU: 16 * MIB}, 20, "within the interval"),
        ({GPU: 8 * MIB, OTHER: 2 * MIB}, 20, "GPU GPU-b: nothing was planted"),
        ({OTHER: 0}, 20, "expected 12 readings, got 0"),
        ({GPU: 8 * MIB}, 5, "expected 12 readings, got 5"),
    ],
)
def test_a_planted_leak_that_is_not_seen_right_is_told(by_cycle, count, words):
    found = planted_leak.wrong(planted(by_cycle, count))
    assert any(words in each for each in found), found


def test_cycles_tell_the_slope_and_its_interval_by_source():
    evidence = {"saver": True, "used_bytes": {"GPU GPU-a": [GIB] * 20}, "seconds": [2.0] * 22}
    told = cycles.figures(
        CheckResult(id=cycles.CHECK, outcome=Outcome.PASS, seconds=44.0, evidence=evidence)
    )
    assert (told["cycles"], told["seconds_a_cycle"]) == (22, 2.0)
    assert told["slopes"]["GPU GPU-a"]["claimed"] is False
    assert cycles.headline(told).startswith("GPU GPU-a: +0.00 MB a cycle")


def test_a_process_that_cannot_hold_gpu_memory_says_why_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(planter, "cuda_environment", lambda _: {"CUDA_VISIBLE_DEVICES": ""})
    made = planter.ChildPlanter("all")
    with (
        pytest.raises(NotProvided, match=r"The process that holds GPU memory ended: \w+Error"),
        made,
    ):
        raise AssertionError("it is on no GPU")
    assert made._process.left_behind() == []
    assert not Path(made._folder.name).exists()


# --- a second run ------------------------------------------------------------------------------

REFUSED = SecondRun(
    False, "LeaseTaken", "GPU GPU-a was not free for 1 s: run 4f1b (process 4711) has it", 1.0, {}
)
NOT_IDLE = SecondRun(False, "DeviceNotIdle", "GPU GPU-a has 9000 MiB in use", 1.0, {})
LET_IN = SecondRun(True, "", "", 0.1, {GPU: 4 * MIB})
OCCUPIED = OccupancySeen(
    holder="4f1b",
    holder_pid=4711,
    before={GPU: 4 * MIB},
    in_use={GPU: 9000 * MIB},
    leased=REFUSED,
    guarded=NOT_IDLE,
    after={GPU: 6 * MIB},
    next_run=LET_IN,
    stop_seconds=2.0,
    seconds_to_bound=0.4,
    readings_per_second=99.0,
    line=[],
)


def test_a_gpu_that_nobody_else_gets_until_it_is_free_holds():
    assert occupancy.wrong(OCCUPIED) == []
    told = occupancy.figures(OCCUPIED)
    assert (told["residue_mib"], told["end_to_bound_seconds"]) == (2.0, 0.4)
    assert [bound["constant"].split()[-1] for bound in told["constants"]] == [
        *("IDLE_BELOW", "GIVEN_BACK_WITHIN")
    ]


@pytest.mark.parametrize(
    ("change_of", "words"),
    [
        ({"leased": LET_IN}, "second run, leases: expected LeaseTaken, got let in"),
        ({"leased": NOT_IDLE}, "second run, leases: expected LeaseTaken, got DeviceNotIdle"),
        ({"holder": "another"}, "expected a message with 'another'"),
        ({"holder_pid": 12}, "expected a message with 'process 12'"),
        ({"guarded": LET_IN}, "second run, guard: expected DeviceNotIdle, got let in"),
        ({"guarded": replace(NOT_IDLE, message="no")}, "a message with the GPU's UUID"),
        ({"after": {GPU: 500 * MIB}}, "at most 64 MiB above 4 MiB, got 500 MiB"),
        ({"after": {}}, "expected a reading, got none"),
        ({"next_run": NOT_IDLE}, "the next run: expected to be let in"),
        ({"in_use": {GPU: 4 * MIB}}, "expected more in use than before its start"),
    ],
)
def test_a_second_run_that_is_treated_wrongly_is_told(change_of: dict[str, Any], words: str):
    found = occupancy.wrong(replace(OCCUPIED, **change_of))
    assert any(words in each for each in found), found


# --- death -------------------------------------------------------------------------------------

DIED = DeathSeen(
    killed="sglang::scheduler",
    noticed_after=6.0,
    reason="The server ended (exit code 137): its log names no exception.",
    before={GPU: 4 * MIB},
    at_kill={GPU: 9000 * MIB},
    at_notice={GPU: 4 * MIB},
    freed_after=0.7,
    after={GPU: 4 * MIB},
    holders=[],
    readings_per_second=99.0,
    line=[],
    restarted_after=20.0,
    not_restarted="",
    answers=[answer()],
)


def test_a_death_that_is_noticed_and_leaves_nothing_holds():
    assert death.wrong(DIED) == []
    assert death.figures(DIED)["free_after_seconds"] == 0.7
    on_cpu = replace(DIED, before={}, at_kill={}, at_notice={}, after={}, freed_after=None)
    assert death.wrong(on_cpu) == []
    assert death.figures(on_cpu)["after_mib"] is None


@pytest.mark.parametrize(
    ("change_of", "words"),
    [
        ({"noticed_after": None, "reason": ""}, "the end of the server: expected within 60 s"),
        ({"reason": ""}, "the reason of the end"),
        ({"at_kill": {GPU: 4 * MIB}}, "expected the server on it, got none of it"),
        ({"after": {GPU: 9000 * MIB}, "holders": ["process 7"]}, "got 9000 MiB (process 7)"),
        ({"after": {}}, "got no reading (nobody is named)"),
        ({"restarted_after": None, "not_restarted": "DeviceNotIdle: GPU"}, "got DeviceNotIdle"),
        ({"answers": [answer(-3.0)]}, "of the fresh server"),
        ({"answers": []}, "answers of the fresh server: expected some, got none"),
    ],
)
def test_a_death_that_is_not_as_it_has_to_be_is_told(change_of: dict[str, Any], words: str):
    found = death.wrong(replace(DIED, **change_of))
    assert any(words in each for each in found), found


def titled(title: str, code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('up', flush=True); input()", title],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_no_process_is_killed_that_is_not_called_a_scheduler():
    child = titled("sglang::scheduler", "pass")
    try:
        assert child.stdout is not None
        child.stdout.readline()
        server: Any = SimpleNamespace(running=SimpleNamespace(host_pids=lambda: [child.pid]))
        # The name is somewhere in its command line, and not what the process calls itself.
        with pytest.raises(NotProvided, match=r"No process of the server is called"):
            death.scheduler_of(server)
    finally:
        child.communicate(b"\n", timeout=30)


# --- pushes ------------------------------------------------------------------------------------

PUSH = OnePush(
    to="b",
    scored=False,
    outcome="unproven",
    reason="log-probabilities: not asked for",
    checksums="agrees",
    logprobs="not asked for",
    bytes=2_000_000_000,
    seconds=1.0,
    staged=0.0,
    read=0.2,
    pack=0.1,
    hand_over=0.1,
    server=0.5,
    outside=0.3,
    buckets=8,
    peer_peak=300_000_000,
    gpu_before=10 * GIB,
    gpu_peak=10 * GIB + 256 * MIB,
    gpu_after=10 * GIB,
)
SCORED = replace(PUSH, scored=True, outcome="good", reason="", logprobs="agrees", seconds=4.0)
ROUTE = RouteSeen("cuda-ipc", None, 6, [SCORED, *[PUSH] * 5], checksum_seconds=0.1)


def test_a_route_that_pushed_right_holds_and_its_first_push_is_no_part_of_the_rate():
    assert pushes.wrong(ROUTE) == []
    told = pushes.told(ROUTE)
    assert told["held"]
    assert (told["gb_per_s_first"], told["gb_per_s"]) == (0.5, 2.0)
    assert (told["peer_peak_mb"], told["gpu_above_before_mib"]) == (300.0, 256.0)
    assert told["bracket_seconds"] == 1.0


def test_a_route_that_does_not_lead_to_the_server_is_a_figure_with_its_reason():
    seen = RouteSeen("cuda-ipc", "the server runs on a CPU", 6)
    assert pushes.wrong(seen) == []
    assert pushes.not_pushed([seen]) == []
    assert pushes.told(seen) == {"route": "cuda-ipc", "lacking": "the server runs on a CPU"}


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (replace(ROUTE, pushes=[PUSH]), "expected one push with both witnesses, got none"),
        (
            replace(ROUTE, pushes=[replace(SCORED, outcome="unproven", reason="no control")]),
            "expected good, got unproven: no control",
        ),
        (
            replace(ROUTE, pushes=[SCORED, replace(PUSH, checksums="differs", outcome="failed")]),
            "push 2 (to b): expected checksums that agree, got failed, checksums differs",
        ),
        (
            replace(ROUTE, pushes=[SCORED, replace(PUSH, checksums="not available")]),
            "checksums not available",
        ),
        (replace(ROUTE, pushes=[], error="NotPrepared: the disk is full"), "the disk is full"),
    ],
)
def test_a_route_that_did_not_push_right_is_told(seen: RouteSeen, words: str):
    found = pushes.wrong(seen)
    assert any(words in each for each in found), found
    assert not pushes.told(seen)["held"]


def test_a_route_for_which_no_time_was_left_is_no_route_that_held():
    late = RouteSeen("disk", None, 6, stopped="3 s for this route were used up")
    assert pushes.not_pushed([ROUTE, late]) == ["disk: 3 s for this route were used up"]
    assert not pushes.told(late)["held"]


def test_every_route_is_asked_and_those_first_whose_speed_a_gpu_is_for():
    assert sorted(pushes.names()) == routes.names()
    assert tuple(pushes.names()[: len(pushes.FIRST)]) == pushes.FIRST


class Clock:
    """Time that only pushes take."""

    def __init__(self, left: float) -> None:
        self.left = left
        self.made: list[tuple[str, str]] = []

    def push(
        self, _: Any, checkpoint: Path, route: str, *, scored: bool, timeout: float
    ) -> OnePush:
        took = {"tensor": 20.0, "tensor-bucket": 25.0}.get(route, 2.0)
        self.left -= took
        self.made.append((route, checkpoint.name))
        return replace(SCORED if scored else PUSH, to=checkpoint.name, seconds=took, staged=0.0)


def pushed_within(left: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, list[RouteSeen]]:
    clock = Clock(left)
    monkeypatch.setattr(pushes, "_push", clock.push)
    monkeypatch.setattr(pushes, "_checksum_seconds", lambda _: 0.1)
    monkeypatch.setattr(routes, "make", lambda _: SimpleNamespace(lacking=lambda _: None))
    server: Any = SimpleNamespace(
        model=Path("first"),
        spec=SimpleNamespace(limits=SimpleNamespace(check=100.0)),
        running=SimpleNamespace(watch=SimpleNamespace(ended=None)),
        weights=SimpleNamespace(unfit=None),
    )
    asked = ["disk", "tensor-bucket", "tensor"]
    seen = pushes.observe(
        server, Path("other"), left=lambda: clock.left, asked=asked, round_trips=1
    )
    return clock, seen


def test_every_route_is_taken_there_and_back_where_there_is_time(monkeypatch: pytest.MonkeyPatch):
    clock, seen = pushed_within(150.0, monkeypatch)
    assert [len(each.pushes) for each in seen] == [2, 2, 2]
    assert pushes.not_pushed(seen) == []
    assert clock.made[-1] == ("tensor", "first")


def test_a_route_that_takes_longer_than_what_is_left_is_not_begun(monkeypatch: pytest.MonkeyPatch):
    """The part was killed in the middle of it, and had failed with every route right."""
    clock, seen = pushed_within(60.0, monkeypatch)
    assert [len(each.pushes) for each in seen] == [2, 2, 0]
    assert pushes.not_pushed(seen) == ["tensor: 6 s were left"]
    assert clock.left > 0


def test_the_way_back_is_a_quick_one_where_there_is_no_time_for_the_routes_own(
    monkeypatch: pytest.MonkeyPatch,
):
    clock, seen = pushed_within(45.0, monkeypatch)
    assert [len(each.pushes) for each in seen] == [2, 1, 0]
    assert "back by disk" in seen[1].stopped
    assert clock.made[-1] == ("disk", "first")
    assert clock.left > 0
    assert [pushes.wrong(each) for each in seen] == [[], [], []]


def test_a_server_that_dies_of_a_push_takes_no_other_route_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """CUDA IPC comes first, and where a host has none the server dies of it."""
    started: list[Any] = []

    def fresh(_: Any) -> Any:
        watch = SimpleNamespace(ended=None)
        watch.wait = lambda _: setattr(watch, "ended", "it died")
        limits = SimpleNamespace(check=100.0)
        server = SimpleNamespace(
            model=Path("first"),
            spec=SimpleNamespace(limits=limits),
            running=SimpleNamespace(watch=watch),
            weights=SimpleNamespace(unfit=None),
        )
        started.append(server)
        return server

    def push(server: Any, checkpoint: Path, route: str, *, scored: bool, timeout: float) -> OnePush:
        if route == "cuda-ipc":
            raise Refused("POST /update_weights_from_tensor", 500, "invalid device context")
        return replace(SCORED if scored else PUSH, to=checkpoint.name)

    monkeypatch.setattr(served, "shared", fresh)
    monkeypatch.setattr(served, "other_checkpoint", lambda _: Path("other"))
    monkeypatch.setattr(pushes, "_push", push)
    monkeypatch.setattr(pushes, "_checksum_seconds", lambda _: 0.1)
    monkeypatch.setattr(routes, "make", lambda _: SimpleNamespace(lacking=lambda _: None))
    given, reports = context(tmp_path, device="gpu", gpus=["GPU-1"], seconds=300.0)
    with pytest.raises(AssertionError, match=r"^cuda-ipc: Refused: .*invalid device context"):
        pushes.run(given)
    rows = figures(reports)["routes"]
    assert set(rows) == set(routes.names())
    assert {name for name, row in rows.items() if not row["held"]} == {"cuda-ipc"}
    assert len(started) == 2


# --- the fused layout --------------------------------------------------------------------------

SUMS = {"model.norm.weight": "aa", "qkv_proj.weight": "bb"}


def layout(stated: dict[str, str], computed: dict[str, str]) -> LayoutSeen:
    return LayoutSeen([stated], [computed], "bfloat16", 0.1, 2.0, 2_000_000_000)


def test_equal_checksums_of_every_parameter_hold():
    seen = layout({**SUMS, "rotary_emb.cos_sin_cache": "cc"}, SUMS)
    assert fused_layout.wrong(seen) == []
    told = fused_layout.figures(seen)
    assert (told["equal"], told["different"], told["computed_gb_per_s"]) == (2, 0, 1.0)


@pytest.mark.parametrize(
    ("stated", "computed", "words"),
    [
        ({**SUMS, "qkv_proj.weight": "xx"}, SUMS, "1 parameters with another checksum"),
        ({**SUMS, "extra": "xx"}, SUMS, "1 parameters that nothing was computed for: extra"),
        (SUMS, {**SUMS, "lost": "xx"}, "1 parameters that the server does not have: lost"),
        ({}, {}, "expected parameters with equal checksums, got none"),
    ],
)
def test_a_parameter_that_is_laid_out_otherwise_is_named(stated, computed, words):
    found = fused_layout.wrong(layout(stated, computed))
    assert any(words in each for each in found), found


class WithoutChecksums:
    """A client of an SGLang that refuses its checksums."""

    def __init__(self, *, has_route: bool = True) -> None:
        self._has_route = has_route

    def has_route(self, *_: str) -> bool:
        return self._has_route

    def checksums(self) -> None:
        raise Refused("POST /weights_checker", 400, "Torch not compiled with CUDA enabled")


def test_checksums_that_are_refused_are_a_failure_on_a_gpu_and_not_run_on_a_cpu():
    on_cpu: Any = SimpleNamespace(client=WithoutChecksums(), device="cpu")
    with pytest.raises(NotProvided, match=r"states no checksums on a CPU \(Torch not compiled"):
        fused_layout.checksums(on_cpu)
    on_gpu: Any = SimpleNamespace(client=WithoutChecksums(), device="gpu")
    with pytest.raises(Refused):
        fused_layout.checksums(on_gpu)
    older: Any = SimpleNamespace(client=WithoutChecksums(has_route=False), device="gpu")
    with pytest.raises(NotProvided, match="has no POST /weights_checker"):
        fused_layout.checksums(older)


def test_a_rank_that_is_missing_is_seen():
    seen = replace(layout(SUMS, SUMS), stated=[SUMS], computed=[SUMS, SUMS])
    assert "rank1:model.norm.weight" in fused_layout.compared(seen).only_computed


# --- a second GPU ------------------------------------------------------------------------------

NCCL = RouteSeen("distributed", None, 2, [SCORED, PUSH])
TWO = TwoRanksSeen(2, None, "not known", [answer()], {GPU: GIB, OTHER: GIB})


def test_two_gpus_that_do_what_they_should_hold():
    assert second_gpu.wrong(NCCL, TWO) == []
    assert second_gpu.figures(NCCL, TWO)["ranks"] == 2


@pytest.mark.parametrize(
    ("nccl", "two", "words"),
    [
        (replace(NCCL, lacking="one GPU"), TWO, "expected to lead to the server, got one GPU"),
        (replace(NCCL, pushes=[]), TWO, "expected a push, got none"),
        (NCCL, replace(TWO, ranks=1), "expected 2 ranks, got 1"),
        (NCCL, replace(TWO, added={GPU: GIB, OTHER: 0}), "got it on GPU-a"),
        (NCCL, replace(TWO, answers=[answer(-3.0)]), "over two GPUs"),
        (
            NCCL,
            replace(TWO, layout=layout({**SUMS, "qkv_proj.weight": "xx"}, SUMS)),
            "tensor parallel: 1 parameters with another checksum",
        ),
    ],
)
def test_what_two_gpus_do_wrong_is_told(nccl, two, words):
    found = second_gpu.wrong(nccl, two)
    assert any(words in each for each in found), found


# --- how a part ends ---------------------------------------------------------------------------


class Kept:
    """What a part puts down and says."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.lines: list[str] = []

    def put(self, key: str, value: Any) -> None:
        self.figures[key] = value

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_figures_are_kept_whether_a_part_holds_or_not():
    held: Any = Kept()
    assert served.ended(held, {"a": 1}, []) == {"a": 1}
    failed: Any = Kept()
    with pytest.raises(AssertionError, match=r"^w0; w1; w2; w3; w4; and 2 more$"):
        served.ended(failed, {"a": 1}, [f"w{n}" for n in range(7)])
    assert failed.figures == {"a": 1}
    assert failed.lines[-1] == "wrong: w6"


def test_what_this_machine_cannot_provide_is_not_run_and_no_failure():
    with pytest.raises(NotHere, match=r"^no torch$"), served.not_run_where_not_provided():
        raise NotProvided("no torch.")


def test_the_table_of_parts_imports_no_torch():
    code = "import sys, sglang_harness.gpu_check.parts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
