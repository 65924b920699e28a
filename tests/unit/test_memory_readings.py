"""Where memory is read: counters of both cgroup versions, devices, and marks in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_harness.errors import HarnessError
from sglang_harness.memory import MemoryLedger
from sglang_harness.memory.gpu.nvml import NvmlMemory
from sglang_harness.memory.host.container import ContainerMemory, parse
from sglang_harness.runtime.device import gpus

GIB = 1 << 30

#: The engine's stats of a container on cgroup v2, shortened. 'file' includes 'shmem'.
V2 = {
    "memory_stats": {
        "usage": 5 * GIB,
        "stats": {"anon": 2 * GIB, "file": 3 * GIB, "shmem": 1 * GIB, "slab": 7},
        "limit": 24 * GIB,
    }
}

#: The same on cgroup v1, where 'total_' counts sub-groups too and rss holds no shared memory.
V1 = {
    "memory_stats": {
        "usage": 5 * GIB,
        "stats": {
            "rss": 1,
            "total_rss": 2 * GIB,
            "cache": 1,
            "total_cache": 3 * GIB,
            "shmem": 2,
            "total_shmem": 1 * GIB,
        },
    }
}


@pytest.mark.parametrize("stats", [V1, V2], ids=["cgroup v1", "cgroup v2"])
def test_the_same_memory_is_the_same_figure_on_both_cgroups(stats: dict[str, Any]):
    used, parts = parse(stats)
    assert parts == {"anonymous": 2 * GIB, "shared": 1 * GIB, "page_cache": 2 * GIB}
    # Page cache is the kernel's to take back: a server that read its weights owes it to nobody.
    assert used == 3 * GIB


def test_an_old_kernel_that_counts_no_shared_memory_still_gives_a_figure():
    counters = {"total_rss": 10, "total_cache": 4}
    assert parse({"memory_stats": {"stats": counters}}) == (
        10,
        {"anonymous": 10, "shared": 0, "page_cache": 4},
    )


@pytest.mark.parametrize(
    "stats",
    [
        {},
        {"memory_stats": {}},
        {"memory_stats": None},
        {"memory_stats": {"stats": None}},
        {"memory_stats": {"stats": {}}},
        {"memory_stats": {"usage": 0, "stats": {"unevictable": 0}}},
    ],
)
def test_an_ended_container_is_an_error_and_never_a_zero(stats: dict[str, Any]):
    with pytest.raises(HarnessError, match="no memory counters") as caught:
        ContainerMemory(lambda: stats).read()
    assert "ended" in caught.value.advice


ID = "0123456789abcdef" * 4

#: ``memory.stat`` of the same container as ``V1`` and ``V2`` have it, a gigabyte later.
FILE_V1 = f"rss 1\ntotal_rss {3 * GIB}\ntotal_cache {3 * GIB}\ntotal_shmem {GIB}\n"
FILE_V2 = f"anon {3 * GIB}\nfile {3 * GIB}\nshmem {GIB}\n"


class Engine:
    """Counts how often it was asked."""

    def __init__(self, stats: dict[str, Any]) -> None:
        self.stats = stats
        self.asked = 0

    def __call__(self) -> dict[str, Any]:
        self.asked += 1
        return self.stats


@pytest.mark.parametrize(
    ("stats", "folder", "text"),
    [
        (V1, f"memory/docker/{ID}", FILE_V1),
        (V1, f"memory/system.slice/docker-{ID}.scope", FILE_V1),
        (V2, f"docker/{ID}", FILE_V2),
        (V2, f"system.slice/docker-{ID}.scope", FILE_V2),
    ],
)
def test_a_container_of_this_kernel_is_read_without_waiting_for_the_engine(
    stats: dict[str, Any], folder: str, text: str, tmp_path: Path
):
    engine, file = Engine({**stats, "id": ID}), tmp_path / folder / "memory.stat"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    memory = ContainerMemory(engine, cgroups=tmp_path)
    assert memory.read()[0] == 3 * GIB
    assert memory.read() == (
        4 * GIB,
        {"anonymous": 3 * GIB, "shared": 1 * GIB, "page_cache": 2 * GIB},
    )
    assert engine.asked == 1


@pytest.mark.parametrize("left", [None, "", "total_rss 0\ntotal_cache 5\n", "total_rss x\n"])
def test_a_container_that_has_ended_is_not_read_from_what_is_left_of_it(
    left: str | None, tmp_path: Path
):
    engine, file = Engine({**V1, "id": ID}), tmp_path / "memory/docker" / ID / "memory.stat"
    file.parent.mkdir(parents=True)
    file.write_text(FILE_V1)
    memory = ContainerMemory(engine, cgroups=tmp_path)
    memory.read()
    file.unlink()
    if left is not None:
        file.write_text(left)
    engine.stats = {}
    with pytest.raises(HarnessError, match="no memory counters"):
        memory.read()


@pytest.mark.parametrize("told", [None, "", "abc", "../" * 21 + "x", ID.upper()])
def test_where_the_kernel_knows_no_such_container_the_engine_is_asked_each_time(
    told: str | None, tmp_path: Path
):
    engine = Engine({**V2, "id": told})
    memory = ContainerMemory(engine, cgroups=tmp_path)
    assert [memory.read()[0] for _ in range(3)] == [3 * GIB] * 3
    assert engine.asked == 3


class Steps:
    """A source whose figures are given one by one; ``None`` cannot be read."""

    def __init__(self, name: str, *figures: int | None) -> None:
        self.name = name
        self._figures = list(figures)

    def read(self) -> tuple[int, dict[str, int]]:
        figure = self._figures.pop(0)
        if figure is None:
            raise HarnessError("the driver does not answer")
        return figure, {"all": figure}


def test_marks_are_kept_in_their_order_with_every_source_and_a_clock_that_goes_on():
    ledger = MemoryLedger([Steps("nvml", 1, 5, 2), Steps("container", 10, 50, 20)])
    now = [ledger.mark(name) for name in ("before", "loaded", "released")]
    assert ledger.source_names == ["nvml", "container"]
    assert [(r.mark, r.source, r.used_bytes) for r in ledger.readings] == [
        ("before", "nvml", 1),
        ("before", "container", 10),
        ("loaded", "nvml", 5),
        ("loaded", "container", 50),
        ("released", "nvml", 2),
        ("released", "container", 20),
    ]
    assert [reading for readings in now for reading in readings] == ledger.readings
    seconds = [r.seconds for r in ledger.readings]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0


def test_a_mark_that_could_not_be_read_leaves_no_half_of_it():
    # Half a mark would be compared with a whole one.
    ledger = MemoryLedger([Steps("nvml", 1, 2), Steps("container", 10, None)])
    ledger.mark("before")
    with pytest.raises(HarnessError, match="driver"):
        ledger.mark("after")
    assert [(r.mark, r.source) for r in ledger.readings] == [
        ("before", "nvml"),
        ("before", "container"),
    ]


def test_a_ledger_without_sources_marks_nothing():
    ledger = MemoryLedger([])
    assert ledger.mark("before start") == []
    assert ledger.readings == []


def test_without_a_driver_gpu_memory_is_an_error_and_never_a_zero():
    found, why_none = gpus()
    if found:
        pytest.skip(f"this machine has a driver and {len(found)} GPUs")
    assert why_none
    with pytest.raises(HarnessError, match="NVIDIA driver cannot be asked") as caught:
        NvmlMemory().read()
    assert "device=cpu" in caught.value.advice
    assert "\n" not in str(caught.value)
