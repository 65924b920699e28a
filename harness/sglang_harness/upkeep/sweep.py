"""Removes what runs that are dead have left: on the engine by label, on disk by name."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from sglang_harness.runtime import engine
from sglang_harness.runtime.engine import Owner
from sglang_harness.runtime.warm import kept_parents
from sglang_harness.runtime.warm.parents import OWNER
from sglang_harness.upkeep import kept_servers

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
    for record in kept_servers.held_servers():
        if record.name not in alive:
            record.file.unlink(missing_ok=True)
            if record.folder:
                shutil.rmtree(record.folder, ignore_errors=True)
    removed += [f"parent {name}" for name in kept_parents.sweep(everything=everything)]
    in_use = {h.folder for h in kept_servers.held_servers()}
    in_use |= {kept.folder for kept in kept_parents.on_record()}
    for folder in Path(tempfile.gettempdir()).glob("sglang-harness-*-*"):
        if folder.is_dir() and str(folder) not in in_use and (everything or _is_abandoned(folder)):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(str(folder))
    return removed, failed


def _is_abandoned(folder: Path) -> bool:
    """By the process that it belongs to, where it says so; else by its age."""
    try:
        owner = Owner.parse((folder / OWNER).read_text(encoding="utf-8"))
    except OSError:
        return time.time() - folder.stat().st_mtime > YOUNG
    return owner is None or owner.is_gone()
