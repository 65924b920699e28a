"""Servers as processes of this machine: everything that they started ends, and all of it is told.

Real processes; a shell script stands in for the Python that would run SGLang.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sglang_harness._base import bounded
from sglang_harness._base.descent import adopting_orphans
from sglang_harness._base.living import lives, lives_as, until_gone
from sglang_harness.errors import SpecError
from sglang_harness.runtime import registry, shared_memory
from sglang_harness.runtime.process import NO_CONTAINER, ProcessRuntime, SGLangProcess
from sglang_harness.runtime.process_family import ProcessFamily
from sglang_harness.spec import ServerSpec

#: Seconds for anything that takes a fraction of one.
SOON = 20.0

Start = Callable[[str], SGLangProcess]


def wait_until(what: Callable[[], object], why: str) -> None:
    until = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < until, f"waited {SOON:g} s for {why}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a server whose Python is a shell script; ended with the test."""
    made: list[SGLangProcess] = []

    def start(script: str) -> SGLangProcess:
        python = tmp_path / f"python-{len(made)}"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        spec = ServerSpec.make(model="owner/name", limits={"stop": 1.0})
        made.append(SGLangProcess(spec, python=python, model=None, device="cpu", run_id="r"))
        made[-1].start()
        return made[-1]

    yield start
    for server in made:
        server.end(at_once=True)


@pytest.fixture
def run() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    made: list[subprocess.Popen[bytes]] = []

    def run(code: str) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        return made[-1]

    yield run
    for each in made:
        each.kill()
        each.wait()


#: Starts one child that ends, and is never asked how; then says its number.
KEEPS_A_ZOMBIE = """
import os, sys, time
pid = os.fork()
if not pid:
    os._exit(0)
print(pid, flush=True)
time.sleep(600)
"""

#: Starts children that end at once, one after the other.
COMES_AND_GOES = """
import subprocess
while True:
    subprocess.run(["true"])
"""


# --- families of processes ------------------------------------------------------------------------


def test_a_zombie_is_not_alive_and_not_left_behind(run: Callable[[str], subprocess.Popen[bytes]]):
    parent = run(KEEPS_A_ZOMBIE)
    assert parent.stdout is not None
    zombie = int(parent.stdout.readline())
    wait_until(lambda: psutil.Process(zombie).status() == psutil.STATUS_ZOMBIE, "a zombie")
    family = ProcessFamily(parent.pid)
    assert [p.pid for p in family.living()] == [parent.pid]
    assert set(family.pids()) == {parent.pid, zombie}
    assert not lives_as(zombie)
    assert until_gone([psutil.Process(zombie)], within=0.0) == []


def test_a_program_that_is_ended_keeps_its_exit_code_for_its_starter():
    program = subprocess.Popen(["sleep", "600"], start_new_session=True)
    bounded.end(program)
    assert program.returncode == -signal.SIGTERM


#: Starts a child that is not waited for, says its number, and ends when told to.
LEAVES_AN_ORPHAN = """
import subprocess, sys
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lets a process adopt orphans")
def test_an_orphan_that_became_a_child_of_this_process_is_reaped_and_its_main_process_is_not():
    # As where the harness is process 1 of a container: nobody else reaps.
    with adopting_orphans():
        parent = subprocess.Popen(
            [sys.executable, "-c", LEAVES_AN_ORPHAN],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdin is not None
        orphan = int(parent.stdout.readline())
        family = ProcessFamily(parent.pid)
        assert [p.pid for p in family.living()] == [parent.pid, orphan]
        parent.stdin.close()
        wait_until(lambda: not lives_as(parent.pid), "the end of the main process")
        assert psutil.Process(orphan).ppid() == os.getpid()
        assert family.kill(within=SOON) == []
    assert not psutil.pid_exists(orphan)
    assert parent.wait(timeout=SOON) == 0, "its exit code is its starter's"


def test_many_may_look_while_processes_come_and_go(run: Callable[[str], subprocess.Popen[bytes]]):
    """One thread's look added to what another was reading (RuntimeError), and a process that ended
    between two questions about it aborted the end of the server (NoSuchProcess)."""
    family = ProcessFamily(run(COMES_AND_GOES).pid)
    errors: list[BaseException] = []
    over = threading.Event()

    def look() -> None:
        try:
            while not over.is_set():
                family.living()
                family.pids()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    over.set()
    for thread in threads:
        thread.join(SOON)
    assert errors == []
    assert family.kill(within=SOON) == []


def test_a_process_that_ends_while_it_is_asked_about_is_not_alive(monkeypatch: pytest.MonkeyPatch):
    def ended(process: psutil.Process) -> str:
        raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(psutil.Process, "status", ended)
    assert not lives(psutil.Process())


def test_waiting_for_an_end_leaves_its_exit_code_to_whoever_started_it(
    run: Callable[[str], subprocess.Popen[bytes]],
):
    process = run("import time; time.sleep(600)")
    assert ProcessFamily(process.pid).kill(within=SOON) == []
    assert process.wait(SOON) == -signal.SIGKILL


# --- the end of a server --------------------------------------------------------------------------


def test_a_server_that_does_not_end_is_killed_with_its_children_and_its_exit_code_is_its_own(
    start: Start,
):
    server = start("trap '' TERM; (trap '' TERM; sleep 600) & echo child $!; wait; sleep 600")
    wait_until(lambda: "child" in server.logs(), "its child")
    child = int(server.logs().split("child ")[1].split()[0])
    pids = server.host_pids()
    assert child in pids
    assert server.end() == 128 + signal.SIGKILL
    assert not any(lives_as(pid) for pid in pids)
    assert server.left_behind() == []
    assert "child" in server.logs()
    assert server.end() == 128 + signal.SIGKILL


def test_an_end_that_was_asked_for_has_its_exit_code(start: Start):
    server = start("trap 'exit 3' TERM; echo ready; while true; do sleep 0.05; done")
    wait_until(lambda: "ready" in server.logs(), "its start")
    assert server.end() == 3
    assert server.left_behind() == []


def test_what_cannot_be_reaped_is_told_and_everything_else_is_removed(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    server = start("echo ready; sleep 600")
    wait_until(lambda: "ready" in server.logs(), "its start")
    process = server._process
    assert process is not None

    def never(timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("python", timeout or 0.0)

    with monkeypatch.context() as patched:
        patched.setattr(process, "wait", never)
        assert server.end() is None
    assert not server._folder.exists()
    (told,) = server.left_behind()
    assert told.startswith("exit code: TimeoutExpired")


def test_a_sidecar_that_fails_keeps_the_server_from_nothing(start: Start):
    class Failing:
        name = "peer"

        def end(self) -> list[str]:
            raise OSError("disk full")

    server = start("sleep 600")
    pids = server.host_pids()
    server._beside.append(Failing())  # type: ignore[arg-type]
    server.end(at_once=True)
    assert not any(lives_as(pid) for pid in pids)
    assert server.left_behind() == ["sidecar peer: OSError: disk full"]


def test_shared_memory_of_a_killed_server_is_removed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A folder of its own: in the machine's, a server of another test would remove what nobody has
    # open, such as the older one here.
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(shared_memory, "FOLDER", folder)
    # As SGLang and Python name theirs: nothing in a name says whose it is.
    theirs = [folder / "sglang_loads_87b7a455032c_4c3df8a2.shm", folder / "sem.mp-ekoj4ui8"]
    others, older = (folder / f"sglang_loads_{kind}7b7a455032c.shm" for kind in "ab")
    older.touch()
    wait_until(lambda: time.time() > older.stat().st_ctime + 1.5, "a second to pass")
    server = start(f"exec 8>{theirs[0]} 9>{theirs[1]}; echo ready; sleep 600")
    wait_until(lambda: "ready" in server.logs(), "its start")
    with others.open("w"):
        server.end(at_once=True)
        assert not [each for each in theirs if each.exists()]
        assert others.exists(), "another process has it open"
        assert older.exists(), "it was there before this server"


# --- what a Python's maker says of it -------------------------------------------------------------


def test_what_a_python_cannot_vouch_for_is_in_every_verdict_on_its_servers(tmp_path: Path):
    python = tmp_path / "python-0.5.15"
    (tmp_path / "python-0.5.15.caveats").write_text(
        "IPython is a stand-in.\n\nKernels of sm90 only.\n", encoding="utf-8"
    )
    runtime = registry.choose("process", {"python": python})
    assert runtime.caveats == (NO_CONTAINER, "IPython is a stand-in.", "Kernels of sm90 only.")


def test_a_python_of_which_nothing_is_said_has_no_more_than_the_runtimes_own(tmp_path: Path):
    assert ProcessRuntime(tmp_path / "python").caveats == (NO_CONTAINER,)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda file: file.mkdir(), "Is a directory"),
        (lambda file: file.symlink_to(file), "Too many levels of symbolic links"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "it is not UTF-8 text"),
    ],
)
def test_caveats_that_cannot_be_read_are_an_error_before_anything_starts(
    make: Callable[[Path], object], why: str, tmp_path: Path
):
    make(tmp_path / "python.caveats")
    with pytest.raises(SpecError, match=rf"python\.caveats cannot be read \({why}\)"):
        ProcessRuntime(tmp_path / "python")
