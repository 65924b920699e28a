"""Real SGLang in real containers. One server is shared; whoever changes it puts it back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import COMMAND, COMMAND_LIMIT

from sglang_harness.runtime import engine
from sglang_harness.runtime.engine import Owner
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No test leaves anything on the engine. What others hold or run there is theirs."""
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
def shared_server() -> Iterator[Server]:
    """One real server with the tiny model, for tests that leave it as it was."""
    server = Server.start(ServerSpec(model="tiny"))
    try:
        yield server
    finally:
        server.stop()


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
