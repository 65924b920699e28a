"""Removes what runs that are dead have left: on the engine by label, on disk by name."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from sglang_harness import held
from sglang_harness.runtime import engine

#: A temporary folder younger than this may belong to a run that is just beginning.
YOUNG = 3600.0


def sweep(*, everything: bool = False) -> tuple[list[str], list[str]]:
    """Removes abandoned things; returns what was removed, and what could not be, with why.

    Things of a process that still lives, and servers that are held, are left alone unless
    ``everything`` is asked for.

    Raises:
        EngineError: no engine answers.
    """
    client = engine.connect()
    try:
        doomed = [t for t in engine.ours(client) if everything or t.is_abandoned()]
        failed = engine.remove(client, doomed)
        alive = {t.name for t in engine.ours(client)}
    finally:
        client.close()
    removed = [f"{t.kind} {t.name}" for t in doomed if t.name not in alive]
    for record in held.held_servers():
        if record.name not in alive:
            record.file.unlink(missing_ok=True)
            if record.folder:
                shutil.rmtree(record.folder, ignore_errors=True)
    in_use = {h.folder for h in held.held_servers()}
    for folder in Path(tempfile.gettempdir()).glob("sglang-harness-*-*"):
        old = time.time() - folder.stat().st_mtime > YOUNG
        if folder.is_dir() and str(folder) not in in_use and (old or everything):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(str(folder))
    return removed, failed
