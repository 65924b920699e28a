"""Memory and disk that are left, by the limits of containers too."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sglang_harness._base import headroom

GB = 1_000_000_000


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GB available, whatever the machine of the tests has."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GB))


def group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    (folder / "memory.stat").write_text(stat)


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
CACHED = f"anon 5\ninactive_file {GB}\nactive_file {GB}\n"


def looked(tmp_path: Path, groups: str) -> headroom.Memory:
    listed = tmp_path / "groups"
    listed.write_text(groups)
    return headroom.memory(groups=listed, mount=tmp_path / "cgroup")


def test_without_control_groups_the_machine_is_the_bound(tmp_path: Path):
    assert headroom.memory(groups=tmp_path / "none", mount=tmp_path) == headroom.Memory(
        64 * GB, "this machine"
    )


def test_a_containers_limit_counts_and_file_caches_are_not_in_use(tmp_path: Path):
    """8 GB of limit, 5 in use, 2 of them caches: 5 left, not 64 and not 3."""
    group(tmp_path / "cgroup", V2, str(8 * GB), 5 * GB, CACHED)
    assert looked(tmp_path, "0::/\n") == headroom.Memory(
        5 * GB, "a memory limit of 8.0 GB (control group)"
    )


def test_the_limit_of_a_group_further_out_counts_too(tmp_path: Path):
    group(tmp_path / "cgroup" / "a" / "b", V2, "max", GB, "")
    group(tmp_path / "cgroup" / "a", V2, str(4 * GB), GB, "")
    group(tmp_path / "cgroup", V2, str(32 * GB), GB, "")
    assert looked(tmp_path, "0::/a/b\n").available == 3 * GB


def test_a_group_by_its_name_on_the_host_is_found_at_the_containers_root(tmp_path: Path):
    group(tmp_path / "cgroup" / "memory", V1, str(2 * GB), GB, "total_inactive_file 7\n")
    found = looked(tmp_path, "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n")
    assert found.available == GB + 7


def test_version_1_has_a_number_for_no_limit(tmp_path: Path):
    group(tmp_path / "cgroup" / "memory" / "a", V1, "9223372036854771712", GB, "")
    assert looked(tmp_path, "4:memory:/a\n").limited_by == "this machine"


def test_a_group_that_uses_more_than_its_limit_leaves_nothing(tmp_path: Path):
    group(tmp_path / "cgroup", V2, str(GB), 2 * GB, "")
    assert looked(tmp_path, "0::/\n").available == 0


@pytest.mark.parametrize("limit", ["", "some"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, limit: str):
    group(tmp_path / "cgroup", V2, limit, 0, "")
    assert looked(tmp_path, "0::/\n").available == 64 * GB


def test_this_process_has_memory_and_this_folder_a_disk(tmp_path: Path):
    assert headroom.memory().available > 0
    found = headroom.disk(tmp_path / "not" / "there" / "yet")
    assert found.free > 0
    assert found.folder == tmp_path / "not" / "there" / "yet"


@pytest.mark.parametrize(("kind", "expected"), [("tmpfs", True), ("ext4", False)])
def test_a_folder_in_a_tmpfs_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: bool
):
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(tmp_path.resolve()), fstype=kind),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert headroom.disk(tmp_path / "a").in_memory is expected


# --- computing time -------------------------------------------------------------------------------


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def quota(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")).write_text(text)


def cores(tmp_path: Path, groups: str) -> int:
    (tmp_path / "groups").write_text(groups)
    return headroom.cores(groups=tmp_path / "groups", mount=tmp_path / "cgroup")


@pytest.mark.usefixtures("sixteen_cores")
def test_cores_are_those_that_the_process_is_bound_to_where_no_group_limits_its_time(
    tmp_path: Path,
):
    assert headroom.cores(groups=tmp_path / "none", mount=tmp_path) == 16
    quota(tmp_path / "cgroup" / "job", cpu_max="max 100000\n")
    assert cores(tmp_path, "0::/job\n") == 16
    quota(tmp_path / "cgroup" / "job", cpu_max="what\n")
    assert cores(tmp_path, "0::/job\n") == 16


@pytest.mark.usefixtures("sixteen_cores")
def test_a_containers_share_of_a_large_machine_counts_and_is_rounded_up(tmp_path: Path):
    quota(tmp_path / "cgroup" / "job", cpu_max="250000 100000\n")
    quota(tmp_path / "cgroup" / "job" / "step", cpu_max="max 100000\n")
    assert cores(tmp_path, "0::/job/step\n") == 3
    quota(tmp_path / "cgroup" / "job" / "step", cpu_max="50000 100000\n")
    assert cores(tmp_path, "0::/job/step\n") == 1


@pytest.mark.usefixtures("sixteen_cores")
def test_the_first_version_of_control_groups_limits_time_in_two_files(tmp_path: Path):
    folder = tmp_path / "cgroup" / "cpu" / "job"
    quota(folder, cpu_cfs_quota_us="400000\n", cpu_cfs_period_us="100000\n")
    assert cores(tmp_path, "2:cpu,cpuacct:/job\n9:memory:/job\n") == 4
    quota(folder, cpu_cfs_quota_us="-1\n")
    assert cores(tmp_path, "2:cpu,cpuacct:/job\n") == 16
