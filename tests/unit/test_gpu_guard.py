"""Leases and the guard at a GPU's door: who gets one, who does not, and who is told why."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

import nvml_mock
from nvml_mock import GIB, MIB, Scenario
from sglang_harness._base.file_lease import LeaseTaken
from sglang_harness.errors import DeviceNotIdle, HarnessError, SpecError, TelemetryError
from sglang_harness.memory.gpu import guard as guard_module
from sglang_harness.memory.gpu import leases, owners
from sglang_harness.memory.gpu.driver import Gpu, ProcessUse
from sglang_harness.memory.gpu.guard import GIVEN_BACK_WITHIN, Guard

A, B = Gpu(0, "GPU-a", "x", 1), Gpu(1, "GPU-b", "x", 1)
ME = os.getpid()


def guard(run: str = "r1", gpus: str = "all", **options: float) -> Guard:
    return Guard(gpus, run_id=run, **{"patience": 0.3, **options})


# --- leases -----------------------------------------------------------------------------------


def test_two_runs_never_get_the_same_gpu(driver: Scenario):
    first = leases.acquire([A], run_id="r1", purpose="a server with tiny", timeout=0)
    with pytest.raises(LeaseTaken) as caught:
        leases.acquire([B, A], run_id="r2", purpose="x", timeout=0.1)
    words = str(caught.value)
    assert "GPU GPU-a was not free for 0.1 s" in words
    assert f"run r1 (process {ME})" in words
    assert "a server with tiny" in words
    # Whoever did not get all of them holds none.
    leases.acquire([B], run_id="r3", purpose="x", timeout=0).release()
    first.release()
    first.release()
    leases.acquire([A], run_id="r2", purpose="x", timeout=0).release()


def test_servers_of_one_run_share_and_the_last_one_gives_back(driver: Scenario):
    first = leases.acquire([A], run_id="r1", purpose="x", timeout=0)
    second = leases.acquire([A, B], run_id="r1", purpose="y", timeout=0)
    assert first.fresh == ["GPU-a"]
    assert second.fresh == ["GPU-b"]
    first.release()
    with pytest.raises(LeaseTaken):
        leases.acquire([A], run_id="r2", purpose="x", timeout=0)
    second.release()
    leases.acquire([A], run_id="r2", purpose="x", timeout=0).release()


def test_a_lease_waits_for_its_turn(driver: Scenario):
    first = leases.acquire([A], run_id="r1", purpose="x", timeout=0)
    got = threading.Event()

    def wait() -> None:
        second = leases.acquire([A], run_id="r2", purpose="x", timeout=5)
        got.set()
        second.release()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not got.wait(0.2)
    first.release()
    assert got.wait(3)
    waiting.join()


HOLD = """
import sys, time
from sglang_harness.memory.gpu.driver import Gpu
from sglang_harness.memory.gpu import leases
held = leases.acquire([Gpu(0, "GPU-a", "x", 1)], run_id="other", purpose="a soak", timeout=5)
print("held", flush=True)
time.sleep(60)
"""


def test_a_lease_dies_with_its_holder_and_the_next_one_is_told(driver: Scenario):
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LeaseTaken, match=rf"process {holder.pid}\) has it for a soak"):
            leases.acquire([A], run_id="r1", purpose="x", timeout=0.1)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        taken = leases.acquire([A], run_id="r1", purpose="x", timeout=2)
    assert "was held by run other" in taken.warnings[0]
    taken.release()


def test_every_user_of_the_machine_can_lock(driver: Scenario):
    leases.acquire([A], run_id="r1", purpose="x", timeout=0).release()
    place = leases.folder()
    assert place.stat().st_mode & 0o7777 == 0o1777
    assert (place / "GPU-a.lock").stat().st_mode & 0o666 == 0o666


def test_nobody_can_remove_another_users_locks(driver: Scenario):
    """In a folder without the sticky bit everybody could, and a second run got the same GPU."""
    place = leases.folder()
    place.chmod(0o777)
    leases.folder()
    assert place.stat().st_mode & stat.S_ISVTX


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_users_take_turns_with_a_gpu_and_with_what_one_of_them_left(driver: Scenario):
    """As one user after the other: each writes what the one before has left, and removes nothing
    that is not its own."""
    place = leases.folder()
    for parent in [place, *place.parents][:-2]:
        parent.chmod(parent.stat().st_mode | 0o005)

    def turn() -> None:
        lease = leases.acquire([A], run_id=f"of-{os.geteuid()}", purpose="x", timeout=5)
        guard_module._owe(A.uuid, guard_module._Debt(7, "r", 1))
        debt = guard_module._debt(A.uuid)
        assert debt is not None
        assert debt.before == 7
        lease.release()
        guard_module._settled(A.uuid)
        assert guard_module._debt(A.uuid) is None

    def dies_holding_it() -> None:
        leases.acquire([A], run_id="dead", purpose="x", timeout=5)
        guard_module._owe(A.uuid, guard_module._Debt(9, "dead", 1))

    assert as_user(65534, dies_holding_it) == 0
    for user in (65533, 0, 65532):
        assert as_user(user, turn) == 0


def as_user(user: int, do: Callable[[], None]) -> int:
    """Runs it as another user, in a process of its own; returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            do()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_folder_that_is_none_is_refused(driver: Scenario, tmp_path: Path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("SGLANG_HARNESS_GPU_LEASES", str(tmp_path / "link"))
    with pytest.raises(HarnessError, match="is not a folder"):
        leases.folder()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SGLANG_HARNESS_GPU_LEASES", str(tmp_path / "file" / "in"))
    with pytest.raises(HarnessError, match="cannot be leased"):
        leases.folder()


# --- before -----------------------------------------------------------------------------------


def test_an_idle_gpu_is_given_and_given_back(driver: Scenario):
    driver.devices[0].base = 3 * MIB
    driver.write()
    held = guard().open(purpose="x", timeout=0)
    assert held.before == {"GPU-a": 3 * MIB, "GPU-b": 0}
    driver.use("GPU-b", ME, 40 * GIB)
    driver.use("GPU-b", ME, 0)
    returns = held.close()
    assert [(r.uuid, r.after, r.given_back) for r in returns] == [
        ("GPU-a", 3 * MIB, True),
        ("GPU-b", 0, True),
    ]
    assert held.close() is returns
    assert list(leases.folder().glob("*.owed")) == []
    guard("r2").open(purpose="x", timeout=0).close()


def test_a_gpu_in_use_is_refused_by_the_name_of_who_uses_it(driver: Scenario):
    driver.use("GPU-b", ME, 9 * GIB)
    with pytest.raises(DeviceNotIdle) as caught:
        guard().open(purpose="x", timeout=0)
    words = str(caught.value)
    assert "GPU GPU-b has 9216 MiB in use, and is idle with at most 256 MiB" in words
    assert f"process {ME} (" in words
    assert "holds 9216 MiB" in words
    assert "Nothing was started" in words
    assert "GPU-a" not in words
    # It holds no lease on the way out.
    leases.acquire([A, B], run_id="r9", purpose="x", timeout=0).release()
    guard(gpus="0").open(purpose="x", timeout=0).close()


def test_memory_that_is_just_being_freed_is_waited_for(driver: Scenario):
    driver.use("GPU-a", 4, 9 * GIB)
    threading.Timer(0.3, lambda: driver.use("GPU-a", 4, 0)).start()
    held = guard(patience=5).open(purpose="x", timeout=0)
    assert held.before["GPU-a"] == 0
    held.close()


def test_a_desktop_is_no_reason_where_the_machine_says_so(driver: Scenario, monkeypatch):
    driver.use("GPU-a", 4, 700 * MIB)
    monkeypatch.setenv("SGLANG_HARNESS_GPU_IDLE_BELOW", "800")
    guard().open(purpose="x", timeout=0).close()
    monkeypatch.setenv("SGLANG_HARNESS_GPU_IDLE_BELOW", "lots")
    with pytest.raises(SpecError, match="not a number of MiB"):
        guard().open(purpose="x", timeout=0)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (f"fail nvmlInitWithFlags {pynvml.NVML_ERROR_DRIVER_NOT_LOADED}", "not loaded"),
        (f"fail nvmlInitWithFlags {pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}", "reboot"),
        (f"fail nvmlDeviceGetCount_v2 {pynvml.NVML_ERROR_NO_PERMISSION}", "denies"),
        (f"fail nvmlDeviceGetMemoryInfo_v2 {pynvml.NVML_ERROR_GPU_IS_LOST} GPU-b", "fallen off"),
        ("slow nvmlDeviceGetMemoryInfo_v2 1000 GPU-a", "has not answered"),
    ],
)
def test_no_telemetry_no_green_light(driver: Scenario, rule: str, words: str):
    driver.rules = [rule]
    driver.write()
    with pytest.raises(TelemetryError, match=words):
        guard(answers_within=0.3).open(purpose="x", timeout=0)
    driver.rules = []
    driver.write()
    leases.acquire([A, B], run_id="r9", purpose="x", timeout=0).release()


def test_no_gpu_at_all_is_no_green_light(driver: Scenario):
    driver.devices = []
    driver.write()
    with pytest.raises(TelemetryError, match="knows no GPU"):
        guard().open(purpose="x", timeout=0)


# --- after ------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_given_back_is_told_and_not_given_again(driver: Scenario):
    held = guard(gpus="0").open(purpose="x", timeout=0)
    # Less than what would not be idle, and more than a driver's own bits.
    driver.use("GPU-a", ME, 200 * MIB)
    (kept,) = held.close()
    assert not kept.given_back
    assert kept.after == 200 * MIB
    assert f"process {ME}" in kept.holders[0]
    with pytest.raises(DeviceNotIdle) as caught:
        guard("r2", gpus="0").open(purpose="x", timeout=0)
    words = str(caught.value)
    assert "run r1" in words
    assert "did not give the rest back" in words
    file = leases.folder() / "GPU-a.owed"
    assert str(file) in words
    # A process that was killed leaves the same sign, and what comes back settles it.
    driver.use("GPU-a", ME, 0)
    guard("r2", gpus="0").open(purpose="x", timeout=0).close()
    assert not file.exists()


def test_a_debt_is_not_forgotten_by_a_server_that_starts_a_little_higher(driver: Scenario):
    first = guard(gpus="0").open(purpose="x", timeout=0)
    driver.use("GPU-a", 5, GIVEN_BACK_WITHIN + MIB)
    assert not first.close()[0].given_back
    driver.use("GPU-a", 5, GIVEN_BACK_WITHIN - MIB)
    second = guard("r2", gpus="0").open(purpose="x", timeout=0)
    owed = json.loads((leases.folder() / "GPU-a.owed").read_text())
    assert owed["before"] == 0, "the lowest that was seen"
    second.close()


def test_memory_that_comes_back_late_is_given_back(driver: Scenario):
    held = guard(patience=5).open(purpose="x", timeout=0)
    driver.use("GPU-a", 5, GIB)
    threading.Timer(0.4, lambda: driver.use("GPU-a", 5, 0)).start()
    returns = held.close()
    assert all(r.given_back for r in returns)
    assert 0.2 < returns[0].seconds < 3


def test_a_device_that_is_lost_at_the_end_is_unknown_and_not_given_back(driver: Scenario):
    held = guard().open(purpose="x", timeout=0)
    driver.devices[1].lost = True
    driver.write()
    kept, lost = held.close()
    assert kept.given_back
    assert lost.after is None
    assert not lost.given_back
    assert "fallen off the bus" in lost.unknown


def test_a_second_server_of_the_run_is_measured_against_what_the_first_holds(driver: Scenario):
    first = guard().open(purpose="x", timeout=0)
    driver.use("GPU-a", 5, 30 * GIB)
    second = guard().open(purpose="a check's own server", timeout=0)
    assert second.before["GPU-a"] == 30 * GIB
    driver.use("GPU-a", 6, GIB)
    driver.use("GPU-a", 6, 0)
    assert all(r.given_back for r in second.close())
    driver.use("GPU-a", 5, 0)
    assert all(r.given_back for r in first.close())


def test_the_first_call_alone_has_a_wider_bound(tmp_path: Path, monkeypatch):
    if reason := nvml_mock.why_not():
        pytest.skip(reason)
    monkeypatch.setenv("SGLANG_HARNESS_GPU_LEASES", str(tmp_path / "leases"))
    scenario = Scenario(tmp_path / "scenario")
    with nvml_mock.installed(scenario, first_calls_only=True):
        # 500 MiB are the driver's own, and counted as used.
        guard().open(purpose="x", timeout=0).close()
        scenario.use("GPU-a", 3, GIB)
        with pytest.raises(DeviceNotIdle, match="1524 MiB in use"):
            guard().open(purpose="x", timeout=0)


# --- owners -----------------------------------------------------------------------------------

ID = "4f1b" * 16


@pytest.mark.parametrize(
    "line",
    [
        f"0::/system.slice/docker-{ID}.scope",
        f"12:memory:/docker/{ID}\n0::/",
        f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope",
        f"0::/machine.slice/libpod-{ID}.scope/container",
        f"0::/../{ID}",
    ],
)
def test_a_process_is_found_in_its_container(tmp_path: Path, line: str):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(line + "\n")
    assert owners.container_of(7, tmp_path) == ID


def test_a_process_in_no_container_is_in_none(tmp_path: Path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text("0::/user.slice/session-1.scope\n")
    assert owners.container_of(7, tmp_path) == ""
    assert owners.container_of(8, tmp_path) == ""


def test_owners_are_named_the_largest_first():
    uses = [ProcessUse(ME, MIB), ProcessUse(2**22 + 1, None), ProcessUse(3, 5 * MIB)]
    found = owners.owners(uses, {ME: "sglang-harness-1"})
    assert [o.pid for o in found] == [3, ME, 2**22 + 1]
    assert f"process {ME} (" in str(found[1])
    assert "in container sglang-harness-1 holds 1 MiB" in str(found[1])
    assert str(found[2]).endswith("(not of this machine's processes) holds an untold amount")
    assert owners.owners([]) == []
