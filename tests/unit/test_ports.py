"""Is a port one server's alone, from the moment that it is chosen?"""

from __future__ import annotations

import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harness.errors import EngineError, SpecError
from sglang_harness.runtime import ports
from sglang_harness.runtime.ports import CANDIDATES, reserve
from sglang_harness.runtime.process import SGLangProcess
from sglang_harness.spec import ServerSpec

OTHER = """
import sys
from sglang_harness.runtime import ports
ports.NAMES = sys.argv[1]
port = ports.reserve()
print(port.number, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this machine reserve ports too."""
    monkeypatch.setattr(ports, "NAMES", f"sglang-harness/test/{uuid.uuid4().hex}")


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another process, which has reserved a port and says which."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, ports.NAMES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="names of abstract sockets are Linux's")
def test_a_port_is_no_other_processes_until_it_is_released_or_its_process_has_gone(
    other: subprocess.Popen[str],
) -> None:
    # Workers that each start a server chose a port minutes before anything listened there.
    assert other.stdout is not None
    theirs = int(other.stdout.readline())
    with pytest.raises(EngineError, match="is in use"):
        reserve(theirs)
    other.kill()
    other.wait()
    mine = reserve(theirs)
    with pytest.raises(EngineError):
        reserve(mine.number)
    mine.release()
    mine.release()
    reserve(mine.number).release()


def test_no_port_is_given_twice_or_beyond_what_an_sglang_derives_from_it() -> None:
    given = [reserve() for _ in range(20)]
    assert len({port.number for port in given}) == 20
    for port in given:
        port.release()
    # 0.5.11 to 0.5.15 listen at +10000 too; clients are given ports from 32768 on.
    assert max(CANDIDATES) + 233 < 32768
    assert max(CANDIDATES) <= 55535


def test_a_port_that_something_listens_at_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listens:
        listens.bind(("127.0.0.1", 0))
        listens.listen()
        number = listens.getsockname()[1]
        with pytest.raises(EngineError, match="is in use"):
            reserve(number)
        monkeypatch.setattr(ports, "CANDIDATES", range(number, number + 1))
        with pytest.raises(EngineError, match="None of 1 ports"):
            reserve()
    reserve().release()


def process(tmp_path: Path, port: int | None, command: str = "exec sleep 30") -> SGLangProcess:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{command}\n")
    fake.chmod(0o755)
    spec = ServerSpec.make(model="tiny", port=port)
    return SGLangProcess(spec, python=fake, model=None, device="cpu", run_id="r")


def test_two_servers_that_do_not_listen_yet_have_two_ports_and_give_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [reserve(), reserve()]
    monkeypatch.setattr(ports, "CANDIDATES", [port.number for port in two])
    for port in two:
        port.release()
    servers = [process(tmp_path, None) for _ in range(2)]
    for server in servers:
        server.start()
    assert len({server.address for server in servers}) == 2
    third = process(tmp_path, None)
    with pytest.raises(EngineError, match="ports from"):
        third.start()
    assert third.left_behind() == []
    for server in servers:
        server.end(at_once=True)
    third = process(tmp_path, None)
    third.start()
    third.end(at_once=True)


def test_a_port_that_was_asked_for_and_is_anothers_is_a_mistake_in_the_spec(tmp_path: Path) -> None:
    mine = reserve()
    server = process(tmp_path, mine.number)
    with pytest.raises(SpecError, match=f"Port {mine.number} on 127.0.0.1 is in use"):
        server.start()
    assert server.left_behind() == []
    mine.release()


def test_a_server_that_cannot_be_run_gives_its_port_back(tmp_path: Path) -> None:
    mine = reserve()
    mine.release()
    server = process(tmp_path, mine.number)
    (tmp_path / "python").chmod(0o644)
    with pytest.raises(EngineError, match="cannot be run"):
        server.start()
    reserve(mine.number).release()
