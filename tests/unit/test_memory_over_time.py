"""Samples, marks, rest and creep: what is said of memory over time, and when nothing is said."""

from __future__ import annotations

import random
import threading
import time

import pytest

from sglang_harness.errors import HarnessError
from sglang_harness.memory import MemoryLedger, timeline
from sglang_harness.memory.analysis.explained import GIB, Said, explain, said
from sglang_harness.memory.analysis.leak import MB, slope
from sglang_harness.memory.analysis.steady import MIB, settle
from sglang_harness.memory.sampler import Sampler
from sglang_harness.memory.timeline import Sample, Timeline


def sample(seconds: float, used: int) -> Sample:
    return Sample(seconds, used, {"a": used})


# --- timeline ---------------------------------------------------------------------------------


def test_samples_between_two_moments_include_both():
    line = Timeline()
    for seconds, used in enumerate([1, 9, 2, 5, 3]):
        line.add(sample(seconds, used))
    assert [s.used for s in line.between(1, 2)] == [9, 2]
    assert line.between(5) == []


def test_a_long_run_keeps_its_peaks_and_a_bounded_number_of_samples(monkeypatch):
    monkeypatch.setattr(timeline, "KEPT", 100)
    line = Timeline()
    for second in range(5000):
        line.add(sample(second, 1000 if second == 17 else second % 7))
    assert len(line.samples) < 100
    assert max(s.used for s in line.samples) == 1000
    assert line.samples[-1].seconds == 4999
    assert [s.seconds for s in line.samples] == sorted(s.seconds for s in line.samples)


# --- sampler ----------------------------------------------------------------------------------


def test_a_sampler_takes_nothing_down_and_remembers_why_it_could_not_read():
    answers = iter([HarnessError("the driver is away"), ValueError("odd"), None, None])
    taken: list[Sample] = []
    enough = threading.Event()

    def read() -> tuple[int, dict[str, int], list[str]]:
        answer = next(answers, None)
        if answer is not None:
            raise answer
        return 5, {"a": 5}, ["GPU-b has fallen off"]

    def take(each: Sample) -> None:
        taken.append(each)
        if len(taken) >= 3:
            enough.set()

    sampler = Sampler(read, take, rate=200).start()
    assert enough.wait(5)
    sampler.stop()
    assert not sampler.alive
    assert sampler.gaps["the driver is away"] == 1
    assert sampler.gaps["ValueError: odd"] == 1
    assert sampler.gaps["GPU-b has fallen off"] >= 3
    assert {s.used for s in taken} == {5}


def test_a_slow_driver_costs_samples_and_they_are_counted():
    taken: list[Sample] = []

    def read() -> tuple[int, dict[str, int], list[str]]:
        time.sleep(0.05)
        return 1, {"a": 1}, []

    sampler = Sampler(read, taken.append, rate=100).start()
    time.sleep(0.5)
    sampler.stop()
    assert 3 <= sampler.taken <= 11
    assert sampler.missed >= 4 * (sampler.taken - 2)
    assert sampler.slowest >= 0.05


def test_a_driver_that_hangs_does_not_keep_whoever_stops_the_sampler():
    hanging = threading.Event()

    def read() -> tuple[int, dict[str, int], list[str]]:
        hanging.wait(10)
        return 1, {"a": 1}, []

    taken: list[Sample] = []
    sampler = Sampler(read, taken.append, rate=10).start()
    began = time.monotonic()
    sampler.stop(timeout=0.1)
    assert time.monotonic() - began < 1
    hanging.set()
    sampler._thread.join(2)
    assert taken == [], "a reading that ended after the stop is not of the server's time"


@pytest.mark.parametrize("rate", [0, -1, 1001])
def test_a_rate_outside_its_bounds_is_refused(rate: float):
    with pytest.raises(ValueError, match="a rate of"):
        Sampler(lambda: (0, {}, []), lambda _: None, rate=rate)


class Rising:
    name = "nvml"
    first_call_only = False

    def __init__(self) -> None:
        self.used = 10

    def read(self) -> tuple[int, dict[str, int]]:
        return self.used, {"GPU-a": self.used}

    def read_partly(self) -> tuple[int, dict[str, int], list[str]]:
        return (*self.read(), [])


def test_a_mark_of_a_watched_source_knows_the_peak_since_the_last():
    source = Rising()
    ledger = MemoryLedger([source])
    (before,) = ledger.mark("before start")
    assert before.peak_bytes is None
    sampler = ledger.watch(source, rate=200)
    ledger.mark("started")
    source.used = 99
    while 99 not in {s.used for s in ledger.timelines["nvml"].samples}:
        time.sleep(0.005)
    source.used = 20
    (ready,) = ledger.mark("ready")
    assert (ready.used_bytes, ready.peak_bytes) == (20, 99)
    # A sample that was taken before the mark does not count after it.
    (later,) = ledger.mark("later")
    assert later.peak_bytes in (20, 99)
    (last,) = ledger.mark("last")
    assert last.peak_bytes == 20
    ledger.close()
    assert not sampler.alive
    assert not ledger.first_call_only
    source.first_call_only = True
    assert ledger.first_call_only
    assert (ready.seconds, "ready") in ledger.timelines["nvml"].marks


def test_a_ledger_knows_its_sources_by_name():
    source = Rising()
    ledger = MemoryLedger([source])
    assert ledger.source("nvml") is source
    with pytest.raises(KeyError, match="container"):
        ledger.source("container")


# --- rest -------------------------------------------------------------------------------------


class Clock:
    """Time that passes only by sleeping; memory as a function of it."""

    def __init__(self, used_at) -> None:
        self.now = 100.0
        self.used_at = used_at

    def read(self) -> tuple[int, dict[str, int]]:
        used = int(self.used_at(self.now - 100.0))
        return used, {"GPU-a": used}

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def settle(self, **options):
        return settle(self.read, clock=lambda: self.now, sleep=self.sleep, since=100.0, **options)


def test_a_release_that_answers_before_the_memory_is_free_is_timed():
    # It stands still for a second, falls for one, and stays.
    clock = Clock(lambda t: 1000 * MIB * max(0.0, min(1.0, 2 - t)))
    seen = clock.settle(reached=lambda parts: parts["GPU-a"] < 100 * MIB)
    assert seen.reached
    assert seen.flat
    assert seen.used == 0
    assert seen.seconds == pytest.approx(2.0, abs=0.1)
    assert seen.waited == pytest.approx(2.5, abs=0.2)


def test_memory_that_never_falls_is_told_after_the_time_is_over():
    seen = Clock(lambda t: 1000 * MIB).settle(reached=lambda p: p["GPU-a"] < MIB, timeout=3)
    assert not seen.reached
    assert seen.flat
    assert seen.waited == pytest.approx(3, abs=0.1)


def test_memory_that_never_rests_is_told_too():
    seen = Clock(lambda t: int(t * 20) % 2 * 100 * MIB).settle(timeout=3)
    assert seen.reached
    assert not seen.flat


def test_noise_within_the_bound_is_rest():
    noise = random.Random(1)
    seen = Clock(lambda t: 500 * MIB + noise.randrange(3 * MIB)).settle()
    assert seen.flat
    assert seen.seconds == 0.0
    assert seen.waited < 1


def test_a_device_that_comes_or_goes_is_no_rest():
    readings = iter([{"a": 1}, {"a": 1, "b": 1}, *[{"a": 1}] * 30])
    clock = Clock(lambda t: 0)

    def read() -> tuple[int, dict[str, int]]:
        return 1, next(readings)

    seen = settle(read, clock=lambda: clock.now, sleep=clock.sleep)
    assert seen.flat
    assert seen.seconds == pytest.approx(0.1, abs=0.01)


# --- creep ------------------------------------------------------------------------------------

NOISE = {
    "gaussian": lambda r, n: [r.gauss(0, 8 * MB) for _ in range(n)],
    "pages of 2 MiB": lambda r, n: [2 * MIB * round(r.gauss(0, 2)) for _ in range(n)],
    "one step": lambda r, n: [
        (64 * MB if i >= 1 + n // 4 else 0) + r.gauss(0, MB) for i in range(n)
    ],
    "spikes": lambda r, n: [512 * MB if r.random() < 0.15 else r.gauss(0, MB) for _ in range(n)],
    "a saw": lambda r, n: [(i % 5) * 8 * MB + r.gauss(0, MB) for i in range(n)],
    "nothing": lambda r, n: [7 * MB] * n,
}


@pytest.mark.parametrize("kind", NOISE)
def test_a_leak_of_2_mb_is_found_in_20_cycles_and_none_in_200_runs_of_noise(kind: str):
    chance = random.Random(f"leak {kind}")
    claimed = [slope(NOISE[kind](chance, 20)) for _ in range(200)]
    assert not [s for s in claimed if s.leaks]
    if kind in ("gaussian", "one step", "spikes", "a saw"):
        return  # louder than the leak over 20 cycles, on purpose
    for _ in range(50):
        used = [y + i * 2 * MB for i, y in enumerate(NOISE[kind](chance, 20))]
        found = slope(used)
        assert found.leaks, str(found)
        assert found.low <= found.mb <= found.high


def test_a_leak_under_ordinary_noise_is_found_with_its_size():
    chance = random.Random(3)
    for _ in range(100):
        found = slope([i * 2 * MB + chance.gauss(0, 3 * MB) for i in range(20)])
        assert found.leaks
        assert found.mb == pytest.approx(2, abs=0.8)


def test_memory_that_falls_is_no_leak():
    found = slope([-i * 5 * MB for i in range(20)])
    assert found.mb == pytest.approx(-5)
    assert found.high < 0
    assert not found.leaks


def test_a_creep_that_nobody_could_meet_is_none():
    assert not slope([i * 0.05 * MB for i in range(40)]).leaks


def test_few_readings_claim_nothing():
    found = slope([0, 5 * MB, 10 * MB, 15 * MB])
    assert found.low == float("-inf")
    assert not found.leaks
    with pytest.raises(ValueError, match="2 readings"):
        slope([1, 2])
    with pytest.raises(ValueError, match="confidence"):
        slope([1, 2, 3], confidence=1)


# --- explained --------------------------------------------------------------------------------


def test_what_the_server_says_is_read_in_both_shapes():
    usage = {"weight": 1.5, "kvcache": 8.0, "graph": {"decode": 0.25, "prefill": 0.125}}
    told = said({"internal_states": [{"memory_usage": usage}]})
    assert told == Said(int(1.5 * GIB), 8 * GIB, int(0.375 * GIB))
    assert told.of(("weights", "kv_cache")) == int(9.5 * GIB)
    assert said({"internal_states": [{"memory_usage": {"graph": 0.5}}]}).graphs == GIB // 2
    where = explain(11 * GIB, told)
    assert (where.weights, where.kv_cache) == (int(1.5 * GIB), 8 * GIB)
    assert where.unexplained == 11 * GIB - int(9.875 * GIB)


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"internal_states": []},
        {"internal_states": None},
        {"internal_states": [None]},
        {"internal_states": [{"memory_usage": None}]},
        {"internal_states": [{"memory_usage": {"weight": "much", "kvcache": True}}]},
    ],
)
def test_what_is_not_said_is_not_zero(info):
    told = said(info)
    assert told == Said(None, None, None)
    assert told.of(("weights",)) is None
    assert told.known == 0
