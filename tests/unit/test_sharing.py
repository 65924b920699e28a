"""One server for the workers of a run: questions between processes, and how a run ends while the
first start goes on."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from scripted_runtime import ScriptedRuntime
from scripted_server import BOUND

from sglang_harness._base.file_lease import Lease
from sglang_harness.errors import EngineError, HarnessError, SpecError
from sglang_harness.sharing import rpc, shared_server
from sglang_harness.sharing.owner_process import OwnerProcess
from sglang_harness.sharing.rpc import RpcClient, RpcServer
from sglang_harness.sharing.shared_server import LocalKeeper, SessionServer
from sglang_harness.sharing.tally import Tally
from sglang_harness.spec import ServerSpec

pytest_plugins = ["pytester"]

#: Seconds for what takes two or three where the machine has nothing else to do, and would take an
#: hour by itself.
COMES_WITHIN = 60.0

# --- questions ------------------------------------------------------------------------------------


def refuses() -> None:
    raise SpecError("Wrong.", advice="Mend it.")


def breaks() -> None:
    raise ZeroDivisionError("by zero")


ANSWERS: dict[str, Callable[..., Any]] = {
    "double": lambda number: 2 * number,
    "refuses": refuses,
    "breaks": breaks,
    "unpicklable": threading.Lock,
    "silent": lambda: time.sleep(BOUND),
}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[RpcClient]:
    # Longer than the kernel takes as the address of a socket: as a CI job's TMPDIR may be.
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    client = RpcClient(str(folder / "socket"), secrets.token_hex(32))
    server = RpcServer(rpc.listener(client.socket), client.key, ANSWERS)
    yield client
    server.close()


def test_questions_are_answered(served: RpcClient) -> None:
    assert served.ask("double", 21) == 42


def test_a_connection_that_says_nothing_holds_up_nobody(served: RpcClient) -> None:
    with rpc._connected(served.socket):
        assert served.ask("double", 21, timeout=BOUND) == 42


def test_without_the_key_nothing_is_answered(served: RpcClient) -> None:
    stranger = RpcClient(served.socket, secrets.token_hex(32))
    with pytest.raises(HarnessError, match="does not answer"):
        stranger.ask("double", 21)
    assert served.ask("double", 1) == 2


def test_an_answer_that_does_not_come_is_an_error_in_time(served: RpcClient) -> None:
    with pytest.raises(HarnessError, match=r"did not answer 'silent' within 0\.1 s"):
        served.ask("silent", timeout=0.1)


def test_a_process_that_accepts_nothing_is_an_error_in_time(tmp_path: Path) -> None:
    stuck = RpcClient(str(tmp_path / "socket"), "00")
    with rpc.listener(stuck.socket), pytest.raises(HarnessError, match=r"within 0\.1 s"):
        stuck.ask("double", 1, timeout=0.1)


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("refuses", "Wrong. Mend it."),
        ("breaks", "ZeroDivisionError: by zero"),
        ("unpicklable", "TypeError: "),
        ("__class__", "KeyError: "),
    ],
)
def test_what_fails_there_is_an_error_here(served: RpcClient, question: str, told: str) -> None:
    with pytest.raises(HarnessError) as caught:
        served.ask(question)
    assert str(caught.value).startswith(told)


def test_who_has_ended_is_told(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="It has ended or was killed"):
        RpcClient(str(tmp_path / "nowhere"), "00").ask("double", 1)


# --- the process that owns the server -------------------------------------------------------------


def test_nothing_is_started_where_nobody_asks() -> None:
    owner = OwnerProcess()
    assert owner.close() == Tally()
    assert owner.remove() == []
    assert not owner.folder.exists()


def test_it_starts_with_the_first_question_and_reports_at_its_end() -> None:
    owner = OwnerProcess()
    with pytest.raises(HarnessError, match="AssertionError"):
        owner.client.ask("handle")
    assert owner.close() == Tally()
    assert owner.close() == Tally()
    assert owner.remove() == []
    assert not owner.folder.exists()


def test_one_that_was_killed_is_told_to_workers_and_at_the_end() -> None:
    owner = OwnerProcess()
    with pytest.raises(HarnessError):
        owner.client.ask("handle")
    assert owner._process is not None
    owner._process.kill()
    owner._process.wait(BOUND)
    with pytest.raises(HarnessError, match="does not answer"):
        owner.client.ask("handle")
    (told,) = owner.close().left
    assert owner.remove() == []
    assert "crashed, was killed" in told
    assert "exit code -9" in told


# --- the end of a run while the first start goes on -----------------------------------------------


class Started:
    """A pytest run that is in its first start."""

    def __init__(self, pytester: pytest.Pytester, stage: Path, *words: str) -> None:
        self.stage = stage
        (stage / "tmp").mkdir(parents=True)
        environment = {
            **os.environ,
            "STAGE": str(stage),
            "TMPDIR": str(stage / "tmp"),
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words],
            cwd=pytester.path,
            env=environment,
            start_new_session=True,
            stdout=(stage / "output").open("w"),
            stderr=subprocess.STDOUT,
        )

    @property
    def output(self) -> str:
        return (self.stage / "output").read_text()

    def wait_for(self, name: str) -> None:
        until = time.monotonic() + COMES_WITHIN
        while not (self.stage / name).exists():
            assert self.process.poll() is None or name == "ended", self.output
            assert time.monotonic() < until, f"{name}: {self.output}"
            time.sleep(0.05)

    def left(self) -> list[str]:
        return [p.name for p in (self.stage / "tmp").glob("sglang-harness-*")]


def a_run(pytester: pytest.Pytester, tmp_path: Path, *words: str, building: bool) -> Started:
    pytester.makeconftest(
        f"""
        import pytest
        from blocking_runtime import BlockingRuntime

        @pytest.fixture(scope="session")
        def sglang_runtime():
            return BlockingRuntime(building={building})
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_x(sglang_server, number):
            raise AssertionError("never runs")
        """
    )
    run = Started(pytester, tmp_path / "stage", *words)
    run.wait_for("starting")
    if building:
        run.wait_for("build")
    return run


def runs(pid: int) -> bool:
    """Whether a process still runs. One that has ended may have its number until it is reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("number", "workers", "building"),
    [
        pytest.param(signal.SIGINT, ("-n", "2"), False, id="Ctrl-C-xdist-start"),
        pytest.param(signal.SIGTERM, ("-n", "2"), True, id="SIGTERM-xdist-build"),
        pytest.param(signal.SIGINT, (), True, id="Ctrl-C-alone-build"),
        pytest.param(signal.SIGTERM, (), False, id="SIGTERM-alone-start"),
    ],
)
def test_an_interruption_ends_the_first_start_within_seconds(
    pytester: pytest.Pytester,
    tmp_path: Path,
    number: signal.Signals,
    workers: tuple[str, ...],
    building: bool,
) -> None:
    run = a_run(pytester, tmp_path, *workers, building=building)
    if number is signal.SIGINT:
        os.killpg(run.process.pid, number)  # as a terminal does
    else:
        run.process.send_signal(number)
    code = run.process.wait(COMES_WITHIN)
    assert code == (2 if number is signal.SIGINT else 128 + 15), run.output
    assert (run.stage / "ended").exists(), run.output
    assert run.left() == []
    assert "could not be removed" not in run.output
    if building:
        for pid in (run.stage / "build").read_text().split():
            assert not runs(int(pid)), "the build goes on"


def test_an_impatient_second_interruption_leaves_nothing(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    run = a_run(pytester, tmp_path, "-n", "2", building=False)
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(0.3)  # somewhere in the clean-up
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait_for("ended")
    assert run.process.wait(COMES_WITHIN) != 0
    until = time.monotonic() + COMES_WITHIN
    while run.left() and time.monotonic() < until:
        time.sleep(0.05)
    assert run.left() == [], run.output


def test_a_controller_that_is_killed_takes_the_first_start_along(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    run = a_run(pytester, tmp_path, "-n", "2", building=False)
    run.process.kill()
    run.wait_for("ended")
    until = time.monotonic() + COMES_WITHIN
    while run.left() and time.monotonic() < until:
        time.sleep(0.05)
    assert run.left() == []


# --- one test at a time ---------------------------------------------------------------------------


def test_a_replacement_that_does_not_come_up_is_told_beside_why_it_was_needed() -> None:
    keeper = LocalKeeper(
        ServerSpec.make(model="tiny"),
        ScriptedRuntime(lambda _: None, EngineError("no port is free")),
    )
    first, _ = keeper.server()
    keeper.replace(first, "It died.")
    assert keeper.tally.no_replacement == []
    for _ in range(2):  # it is tried once
        with pytest.raises(EngineError, match="no port is free"):
            keeper.server()
    assert keeper.tally.replaced == ["It died."]
    assert keeper.tally.no_replacement == ["no port is free"]


class OneServer:
    """A keeper whose server is never restored for real."""

    def __init__(self, *, owned: bool = True) -> None:
        self.tally = Tally()
        self.replaced: list[str] = []
        self._server: Any = SimpleNamespace(running=SimpleNamespace(owned=owned))

    def server(self) -> tuple[Any, Any]:
        return self._server, "first"

    def replace(self, server: Any, why: str) -> None:
        assert server is self._server
        self.replaced.append(why)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(shared_server, "restore", lambda _, first: found.append(first))
    return found


@pytest.mark.parametrize(("owned", "expected"), [(True, []), (False, ["first"])])
def test_a_run_that_is_ending_restores_only_what_it_did_not_start(
    restored: list[Any], owned: bool, expected: list[str]
) -> None:
    session = SessionServer(OneServer(owned=owned))
    with session.lent("a test"):
        session.ending = True
    assert restored == expected


def test_a_server_whose_restoring_breaks_is_not_given_to_the_next_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("zip() argument 2 is shorter")

    monkeypatch.setattr(shared_server, "restore", broken)
    keeper = OneServer()
    lease = Lease(tmp_path / "lease", "gw0")
    with pytest.raises(ValueError, match="shorter"), SessionServer(keeper, lease=lease).lent("a"):
        pass
    assert keeper.replaced == ["Restoring failed: ValueError: zip() argument 2 is shorter."]
    assert not lease.held
