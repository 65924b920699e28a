"""Servers that are left running for a person: by ``up``, or by ``--keep-on-failure``."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_harness import places
from sglang_harness.runtime import engine
from sglang_harness.server import Server


class Held(BaseModel):
    """What is needed to use a held server and to stop it. Its file is readable by its owner
    alone, because it holds the key."""

    model_config = ConfigDict(extra="forbid")

    name: str
    run_id: str
    address: str
    api_key: str
    folder: str | None
    """The exchange folder on this machine, to be removed with the server."""

    @property
    def file(self) -> Path:
        return _folder() / f"{self.name}.json"


def _folder() -> Path:
    return places.state() / "held"


def hold(server: Server) -> Held:
    """Records ``server`` as held; from now on nothing but :func:`release` removes it."""
    reach_folder = getattr(server.reach, "folder", None)
    held = Held(
        name=str(server.about()["container"]),
        run_id=getattr(server.running, "run_id", ""),
        address=server.address,
        api_key=server.running.api_key or "",
        folder=None if reach_folder is None else str(reach_folder),
    )
    held.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    held.file.touch(mode=0o600)
    held.file.write_text(held.model_dump_json(), encoding="utf-8")
    server.running.watch.expected = True
    return held


def held_servers() -> list[Held]:
    """Every server on record, whether it still runs or not."""
    found = []
    for file in sorted(_folder().glob("*.json")):
        try:
            found.append(Held.model_validate_json(file.read_text(encoding="utf-8")))
        except (OSError, ValidationError):
            continue
    return found


def release(held: Held) -> list[str]:
    """Stops and removes a held server; returns what could not be removed, with why."""
    client = engine.connect()
    try:
        mine = [t for t in engine.ours(client) if t.run_id == held.run_id]
        failed = engine.remove(client, mine)
    finally:
        client.close()
    if held.folder:
        shutil.rmtree(held.folder, ignore_errors=True)
    if not failed:
        held.file.unlink(missing_ok=True)
    return failed
