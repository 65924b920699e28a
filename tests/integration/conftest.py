"""Real SGLang in real containers. One server is lent to each test that gives it back; what needs
another is forked from one parent."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import COMMAND, COMMAND_LIMIT
from secret_watch import SecretWatch

from sglang_harness._base.owner import Owner
from sglang_harness.errors import EngineError
from sglang_harness.runtime import engine
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.server import Server
from sglang_harness.sharing.shared_server import LocalKeeper, SessionServer
from sglang_harness.spec import ServerSpec


def _why_no_engine() -> str:
    try:
        engine.connect().close()
    except EngineError as error:
        return error.message
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without an engine the rest still runs; each test that is left out says why."""
    if reason := _why_no_engine():
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No test leaves anything on the engine. What others hold or run there is theirs."""
    if _why_no_engine():
        yield
        return
    client = engine.connect()
    before = {t.name for t in engine.ours(client)}
    yield
    mine = Owner.this_process()
    after = [
        f"{t.kind} {t.name}"
        for t in engine.ours(client)
        if t.name not in before and (t.is_abandoned() or t.owner == mine)
    ]
    client.close()
    assert after == [], f"left on the engine: {after}"


@pytest.fixture(scope="session")
def _leased() -> Iterator[SessionServer]:
    """A server with the tiny model in a container of its own, started as its image starts it."""
    keeper = LocalKeeper(ServerSpec(model="tiny", start="cold"), DockerRuntime())
    yield SessionServer(keeper)
    server = keeper.current
    keeper.close()
    assert keeper.tally.replaced == [], "a test left it as nobody could put it back"
    if server is not None:
        assert server.stop().left_behind == []


@pytest.fixture
def shared_server(request: pytest.FixtureRequest, _leased: SessionServer) -> Iterator[Server]:
    """The one real server that every test shares, as it was at first; afterwards the package
    itself puts back what the test changed."""
    with _leased.lent(request.node.nodeid) as server:
        yield server


@pytest.fixture(scope="session")
def warm_runtime() -> Iterator[DockerRuntime]:
    """Its parents stay for all tests: each further server costs some two seconds."""
    runtime = DockerRuntime()
    with runtime.keeping_parents():
        yield runtime


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``sglang-harness`` as a person would, with a state folder of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words],
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT,
            cwd=tmp_path,
            env={**os.environ, **options.get("env", {})},  # type: ignore[dict-item]
        )

    return run


@pytest.fixture
def no_secret_in_sight() -> Iterator[SecretWatch]:
    """Hands over a token to pass on, and looks for it and for every server's key."""
    watch = SecretWatch()
    yield watch
    watch.stop()
