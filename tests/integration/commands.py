"""The command line as the tests run it, and what it has left on the engine."""

from __future__ import annotations

import sys

from sglang_harness.runtime import engine

#: Seconds for a whole command: a server start on two slow cores, and some checks.
COMMAND_LIMIT = 400

COMMAND = [sys.executable, "-c", "from sglang_harness.cli import main; main()"]


def names_on_engine(run_id: str | None = None) -> list[str]:
    """What carries our label, of one run or of all."""
    client = engine.connect()
    try:
        return [t.name for t in engine.ours(client) if run_id in (None, t.run_id)]
    finally:
        client.close()
