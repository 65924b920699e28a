"""Removes what dead runs have left: on the engine by label, on disk by the record in the folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sglang_harness._base import temporary
from sglang_harness.errors import EngineError
from sglang_harness.runtime import engine
from sglang_harness.runtime.warm import kept_parents
from sglang_harness.upkeep import kept_servers


@dataclass
class Swept:
    """What became of each thing, one line for each.

    Attributes:
        removed: looked for afterwards, and not there any more.
        failed: it could not be removed, with the reason.
        left: folders without a record of their owner. Nobody can tell whether it lives.
    """

    removed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def sweep(*, everything: bool = False) -> Swept:
    """Removes abandoned things.

    Things of a process that still lives, and what a record keeps for a person, are left alone
    unless ``everything`` is asked for. Without an engine the disk is swept all the same, and the
    engine is a failure.
    """
    swept = Swept()
    # Read first: a record is written after its container was made, so that none of these is of a
    # container that is too young to be listed below.
    records = kept_servers.held_servers()
    try:
        _sweep_engine(swept, records, everything=everything)
    except EngineError as error:
        swept.failed.append(str(error))
    ended, failed = kept_parents.sweep(everything=everything)
    swept.removed += [f"parent {name}" for name in ended]
    swept.failed += failed
    for folder in temporary.found():
        if everything or folder.state == "abandoned":
            _remove(folder.path, swept)
        elif folder.state == "unknown":
            swept.left.append(f"{folder.path}: it has no record of its owner")
    return swept


def _sweep_engine(swept: Swept, records: list[kept_servers.Held], *, everything: bool) -> None:
    client = engine.connect()
    try:
        doomed = [t for t in engine.ours(client) if everything or t.is_abandoned()]
        swept.failed += engine.remove(client, doomed)
        there = {(t.kind, t.name) for t in engine.ours(client)}
    finally:
        client.close()
    for thing in doomed:
        name = f"{thing.kind} {thing.name}"
        if (thing.kind, thing.name) not in there:
            swept.removed.append(name)
        elif not any(line.startswith(f"{name}:") for line in swept.failed):
            swept.failed.append(f"{name}: the engine still lists it")
    for record in records:
        if ("container", record.name) in there or not record.is_of_this_engine():
            continue
        if record.folder:
            _remove(Path(record.folder), swept)
        record.file.unlink(missing_ok=True)


def _remove(folder: Path, swept: Swept) -> None:
    if not folder.exists():
        return
    if failed := temporary.remove(folder):
        swept.failed += failed
    else:
        swept.removed.append(str(folder))
