"""A lease between real processes: one at a time, and the dead hold nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_harness._base.file_lease import HEARTBEAT, Holder, Lease, LeaseTaken

HOLD = """
import sys, time
from pathlib import Path
from sglang_harness._base.file_lease import Lease

lease = Lease(Path(sys.argv[1]), sys.argv[2])
lease.acquire("a long test", timeout=10)
print("held", flush=True)
sys.stdin.readline()
lease.release()
print("released", flush=True)
"""


def holder(path: Path, name: str = "gw1") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_whoever_waits_too_long_is_told_who_has_it_and_for_what(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with holder(path) as other:
        with pytest.raises(LeaseTaken) as taken:
            Lease(path, "gw0").acquire("mine", timeout=0.1)
        words = str(taken.value)
        assert f"gw1 (process {other.pid})" in words
        assert "for a long test" in words
        assert "last heartbeat 0 s ago" in words or "last heartbeat 1 s ago" in words
        assert "Traceback" not in words
        other.communicate("\n", timeout=10)


def test_it_passes_on_as_soon_as_it_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with holder(path) as other:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        lease = Lease(path, "gw0")
        assert lease.acquire("mine", timeout=10) is None, "nobody died holding it"
        assert lease.held
        now = lease.holder()
        assert now is not None
        assert (now.name, now.purpose, now.pid) == ("gw0", "mine", os.getpid())
        lease.release()
        lease.release()
        assert not lease.held
        assert lease.holder() is None


def test_the_lease_of_a_dead_holder_is_free_at_once_and_says_who_died(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    other = holder(path)
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    lease = Lease(path, "gw0")
    died = lease.acquire("mine", timeout=5)
    assert died is not None
    assert (died.name, died.purpose, died.pid) == ("gw1", "a long test", other.pid)
    assert not died.is_alive()
    lease.release()


def test_a_holder_shows_signs_of_life(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    lease = Lease(path, "gw0")
    lease.acquire("mine", timeout=1)
    record = path.with_name("lease.holder")
    os.utime(record, (0, 0))
    until = time.monotonic() + 10 * HEARTBEAT
    while record.stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.05)
    assert record.stat().st_mtime > 0
    lease.release()


def test_a_record_that_is_half_written_is_no_holder(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    path.with_name("lease.holder").write_text('{"name": "gw1", "pur')
    lease = Lease(path, "gw0")
    assert lease.holder() is None
    assert lease.acquire("mine", timeout=1) is None
    lease.release()


def test_a_process_id_that_was_given_to_another_is_not_the_holder() -> None:
    me = Holder.this_process("gw0", "mine")
    assert me.is_alive()
    assert not Holder(me.name, me.purpose, me.pid, me.started - 100, me.since).is_alive()


def test_a_lock_whose_file_was_removed_is_not_taken_for_one(tmp_path: Path) -> None:
    """The next one makes another file, and both would hold the lease."""
    path = tmp_path / "lease"
    first = Lease(path, "gw0")
    first.acquire("mine", timeout=1)
    path.unlink()
    second = Lease(path, "gw1")
    second.acquire("mine", timeout=1)
    assert path.exists()
    with pytest.raises(LeaseTaken):
        Lease(path, "gw2").acquire("mine", timeout=0)
    first.release()
    second.release()


def test_a_link_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lease").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        Lease(tmp_path / "lease", "gw0").acquire("mine", timeout=0)
    assert not (tmp_path / "elsewhere").exists()


def test_a_lease_is_released_though_a_forked_child_lives(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease", "gw0")
    lease.acquire("mine", timeout=1)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        lease.release()
        other = Lease(tmp_path / "lease", "gw1")
        other.acquire("mine", timeout=0)
        other.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
