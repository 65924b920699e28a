"""Servers that are left running for a person: by ``up``, or by ``--keep-on-failure``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_harness._base import paths
from sglang_harness.errors import SpecError
from sglang_harness.runtime import engine
from sglang_harness.runtime.attach import Attachment, SharedFolder
from sglang_harness.runtime.path_map import EXCHANGE
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
    model: str | None = None
    """The served checkpoint's folder on this machine."""

    @property
    def file(self) -> Path:
        return _folder() / f"{self.name}.json"


def _folder() -> Path:
    return paths.state() / "held"


def hold(server: Server) -> Held:
    """Records ``server`` as held; from now on nothing but :func:`release` removes it."""
    shared = server.running.shared_folder
    held = Held(
        name=str(server.about()["container"]),
        run_id=server.running.run_id,
        address=server.address,
        api_key=server.running.api_key or "",
        folder=None if shared is None else str(shared),
        model=None if server.model is None else str(server.model),
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


def attachment(
    url: str | None,
    *,
    allow_changes: bool = False,
    share: str | None = None,
    contradicting: Mapping[str, object] | None = None,
    prefix: str = "--",
) -> Attachment | None:
    """What ``--url`` and the options beside it mean; ``None`` where no URL was given.

    The key comes from ``SGLANG_API_KEY``. Of a server that this user holds everything is on
    record: key, model, and the folder that both sides see.

    Args:
        contradicting: options that say how to start a server, with what they were given.
        prefix: what the options begin with where they were given.

    Raises:
        SpecError: options contradict each other, or cannot be meant.
    """
    if url is None:
        for option, given in (("allow-changes", allow_changes), ("share", share)):
            if given:
                raise SpecError(
                    f"{prefix}{option} is for a server that runs already: {prefix}url is missing."
                )
        if (contradicting or {}).get(f"{prefix}runtime") == "attach":
            raise SpecError(f"The runtime 'attach' needs the address of a server: {prefix}url.")
        return None
    if both := [name for name, given in (contradicting or {}).items() if given is not None]:
        raise SpecError(
            f"{prefix}url names a server that runs already, and {both[0]} says how to start one.",
            advice="Give one of the two.",
        )
    known = next((h for h in held_servers() if h.address.rstrip("/") == url.rstrip("/")), None)
    shared = SharedFolder.parse(share) if share else None
    if shared is None and known and known.folder and Path(known.folder).is_dir():
        shared = SharedFolder(Path(known.folder), EXCHANGE)
    return Attachment(
        url,
        api_key=os.environ.get("SGLANG_API_KEY") or (known.api_key if known else None),
        allow_changes=allow_changes,
        shared=shared,
        model=Path(known.model) if known and known.model and Path(known.model).is_dir() else None,
    )


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
