"""Servers that are left running for a person: by ``up``, or by ``--keep-on-failure``."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_harness._base import paths, temporary
from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import EngineError
from sglang_harness.runtime import engine
from sglang_harness.server import Server


class Held(BaseModel):
    """What is needed to use a kept server and to stop it. Its file is readable by its owner
    alone, because it holds the key."""

    model_config = ConfigDict(extra="forbid")

    name: str
    run_id: str
    address: str
    api_key: str
    folder: str | None
    """The exchange folder on this machine, to be removed with the server."""
    model: str | None = None
    """The served checkpoint's folder on this machine."""
    engine: str | None = None
    """``DOCKER_HOST`` of the engine that runs it, empty for the default; ``None`` where the record
    does not say."""

    @property
    def file(self) -> Path:
        return _folder() / f"{self.name}.json"

    def is_of_this_engine(self) -> bool:
        """False where ``DOCKER_HOST`` names another engine than the one that runs it."""
        return self.engine in (None, _engine())


def _folder() -> Path:
    return paths.state() / "held"


def _engine() -> str:
    return os.environ.get("DOCKER_HOST", "")


def hold(server: Server) -> Held:
    """Records ``server`` as kept for a person; from now on only :func:`release` removes it.

    Interrupted, it leaves no record, and the server is still the caller's to stop.
    """
    shared = server.running.shared_folder
    held = Held(
        name=str(server.about()["container"]),
        run_id=server.running.run_id,
        address=server.address,
        api_key=server.running.api_key or "",
        folder=None if shared is None else str(shared),
        model=None if server.model is None else str(server.model),
        engine=_engine(),
    )
    try:
        held.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(held.file, held.model_dump_json(), mode=0o600)
        if shared is not None:
            temporary.keep(shared, held.run_id)
    except BaseException:
        held.file.unlink(missing_ok=True)
        raise
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


def held_at(url: str) -> Held | None:
    """The server on record with this base URL."""
    return next((h for h in held_servers() if h.address.rstrip("/") == url.rstrip("/")), None)


def release(held: Held) -> list[str]:
    """Stops and removes a kept server; returns what could not be removed, with why.

    Raises:
        EngineError: no engine answers, or ``DOCKER_HOST`` names another than the server's.
    """
    if not held.is_of_this_engine():
        raise EngineError(
            f"{held.name} runs on the Docker engine at {held.engine or 'the default socket'}, and "
            f"DOCKER_HOST names {_engine() or 'the default socket'}.",
            advice="Set DOCKER_HOST to what it was when the server was started.",
        )
    client = engine.connect()
    try:
        mine = [t for t in engine.ours(client) if t.run_id == held.run_id]
        failed = engine.remove(client, mine)
    finally:
        client.close()
    if held.folder:
        failed += temporary.remove(Path(held.folder))
    if not failed:
        held.file.unlink(missing_ok=True)
    return failed
