"""Is a port one server's alone, from the moment that it is chosen?"""

from __future__ import annotations

import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_harness.errors import EngineError, SpecError
from sglang_harness.runtime import Order, ports
from sglang_harness.runtime.ports import BESIDE, CANDIDATES, reserve, why_unusable
from sglang_harness.runtime.process import ProcessRuntime, SGLangProcess
from sglang_harness.runtime.warm.parent_container import PORTS
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


def test_no_port_is_given_twice() -> None:
    given = [reserve() for _ in range(20)]
    assert len({port.number for port in given}) == 20
    for port in given:
        port.release()


def all_of(port: int) -> set[int]:
    """A server's port and those that SGLang may take beside it."""
    return {port, *(port + distance for distance in BESIDE)}


@pytest.mark.parametrize("places", [CANDIDATES, PORTS], ids=["on-this-machine", "in-a-container"])
@given(data=st.data())
def test_no_two_servers_have_a_port_in_common_and_none_is_one_that_the_kernel_gives_to_clients(
    places: Sequence[int], data: st.DataObject
) -> None:
    # 0.5.11 to 0.5.15 want +10000, data-parallel attention +233 and on.
    one = data.draw(st.sampled_from(places))
    other = data.draw(st.sampled_from([port for port in places if port != one]))
    assert not all_of(one) & all_of(other)
    assert min(all_of(one)) > 1023
    assert max(all_of(one)) < 32768


def test_a_port_is_not_given_where_one_that_sglang_takes_beside_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for distance in (1, 233, 10000):
        monkeypatch.setattr(ports, "CANDIDATES", CANDIDATES)
        free = reserve()
        free.release()
        monkeypatch.setattr(ports, "CANDIDATES", [free.number])
        with socket.socket() as listens:
            listens.bind(("127.0.0.1", free.number + distance))
            listens.listen()
            with pytest.raises(EngineError, match="None of 1 ports"):
                reserve()
            # Who asks for it knows which of them are needed.
            reserve(free.number).release()


VERSIONS = {"0.5.10": True, "0.5.11": False, "0.5.15.post1": False, "0.5.16": True, "odd": True}


@given(port=st.integers(1, 65535), version=st.sampled_from(sorted(VERSIONS)))
def test_a_port_is_refused_only_where_that_version_would_end_of_it(port: int, version: str) -> None:
    why = why_unusable(port, version, {})
    assert (why is None) == (VERSIONS[version] or port <= 55535)
    assert why_unusable(port, version, {"SGLANG_GRPC_PORT": "9000"}) is None
    assert why_unusable(port, None, {}) is None


A_PYTHON_WITH = """
case "$*" in
    *metadata*) {metadata} ;;
    *) exec sleep 30 ;;
esac
"""


def prepared(tmp_path: Path, metadata: str, **fields: Any) -> tuple[SGLangProcess, list[str]]:
    """A server of a Python whose SGLang says its version by running ``metadata``."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\n" + A_PYTHON_WITH.format(metadata=metadata))
    fake.chmod(0o755)
    said: list[str] = []
    spec = ServerSpec.make(model="tiny", device="cpu", start="cold", **fields)
    made = ProcessRuntime(fake).prepare(Order(spec, model=None, run_id="r", say=said.append))
    assert isinstance(made, SGLangProcess)
    made.end()
    return made, said


def test_a_high_port_that_this_sglang_cannot_start_at_is_a_mistake_in_the_spec(
    tmp_path: Path,
) -> None:
    with pytest.raises(SpecError, match="Port 60000 cannot be used: SGLang 0") as told:
        prepared(tmp_path, "echo 0.5.15", port=60000)
    assert "70000" in told.value.message
    assert "\n" not in told.value.message
    assert "55535" in told.value.advice
    for port, environment in ((55535, {}), (60000, {"SGLANG_GRPC_PORT": "9000"})):
        _, said = prepared(tmp_path, "echo 0.5.15", port=port, environment=environment)
        assert not any("0.5.11" in line for line in said)


def test_a_high_port_is_served_by_other_versions_and_told_where_the_version_is_not_known(
    tmp_path: Path,
) -> None:
    made, said = prepared(tmp_path, "echo 0.5.23", port=60000)
    assert made.spec.port == 60000
    assert not any("0.5.11" in line for line in said)
    _, said = prepared(tmp_path, "exit 1", port=60000)
    assert any("0.5.11 to 0.5.15 cannot start at a port above 55535" in line for line in said)


def test_a_port_that_something_listens_at_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = reserve()
    number = chosen.number
    with socket.socket() as listens:
        listens.bind(("127.0.0.1", number))
        listens.listen()
        chosen.release()
        with pytest.raises(EngineError, match="is in use"):
            reserve(number)
        monkeypatch.setattr(ports, "CANDIDATES", range(number, number + 1))
        with pytest.raises(EngineError, match="None of 1 ports"):
            reserve()


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
