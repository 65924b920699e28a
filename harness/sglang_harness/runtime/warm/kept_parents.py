"""Preloaded parents that are kept between runs: recorded, found again, and ended."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_harness._base import paths, temporary
from sglang_harness._base.living import until_gone
from sglang_harness._base.teardown import Teardown
from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import EngineError
from sglang_harness.runtime.warm import parent_container, parent_process
from sglang_harness.runtime.warm.parents import Folders, Parent, Say
from sglang_harness.runtime.warm.protocol import Preloaded, Recipe, SocketLink

#: Seconds without use after which a kept parent ends by itself.
IDLE = 3600.0


class KeptParent(BaseModel):
    """The record of a kept parent: what is needed to find it and to end it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    run_id: str
    runtime: Literal["docker", "process"]
    version: str
    """Of SGLang."""
    runs: str
    """The image's id, or the path of the Python."""
    recipe: str
    """:meth:`Recipe.digest` of its recipe."""
    folder: str

    @property
    def file(self) -> Path:
        return _folder() / f"{self.name}.json"

    def answers(self) -> bool:
        """Whether it is still there."""
        try:
            SocketLink(Path(self.folder) / "control" / "socket").end()
        except EngineError:
            return False
        return True


def _folder() -> Path:
    return paths.state() / "parents"


def on_record() -> list[KeptParent]:
    """Every kept parent, whether it still runs or not."""
    found = []
    for file in sorted(_folder().glob("*.json")):
        try:
            found.append(KeptParent.model_validate_json(file.read_text(encoding="utf-8")))
        except (OSError, ValidationError):
            continue
    return found


def find(runtime: str, recipe: Recipe) -> Parent | None:
    """A kept parent of this recipe that answers and has a free port; ``None`` if there is none."""
    wanted = recipe.digest()
    for kept in on_record():
        if kept.runtime != runtime or kept.recipe != wanted:
            continue
        try:
            where = parent_container if runtime == "docker" else parent_process
            parent: Parent = where.find(kept.name, Path(kept.folder), recipe)
        except EngineError:
            continue
        try:
            if runtime != "docker" or parent.preloaded.ask("ports")["free"]:
                return parent
        except EngineError:
            pass
        parent.end()
    return None


def keep(runtime: Literal["docker", "process"], recipe: Recipe, image: str, say: Say) -> KeptParent:
    """Starts a parent and records it, or returns the one of this recipe that is kept already.

    A kept one of the same version with another recipe is ended.

    Raises:
        EngineError: it could not be started.
    """
    for kept in on_record():
        if kept.runtime != runtime or kept.version != recipe.version:
            continue
        if kept.recipe == recipe.digest() and kept.answers():
            return kept
        say(f"{kept.name} has ended, or its image or environment has changed: removing it")
        end(kept)
    say(f"starting a parent; it imports SGLang {recipe.version}".rstrip())
    run_id = uuid.uuid4().hex[:12]
    if runtime == "docker":
        made = parent_container.make_kept(recipe, image, run_id=run_id, idle=IDLE)
    else:
        made = parent_process.make_kept(recipe, idle=IDLE)
    return _record(runtime, recipe, run_id, *made)


def _record(
    runtime: Literal["docker", "process"], recipe: Recipe, run_id: str, name: str, folders: Folders
) -> KeptParent:
    kept = KeptParent(
        name=name,
        run_id=run_id,
        runtime=runtime,
        version=recipe.version,
        runs=recipe.runs,
        recipe=recipe.digest(),
        folder=str(folders.root),
    )
    try:
        kept.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(kept.file, kept.model_dump_json(), mode=0o600)
        temporary.keep(folders.root, run_id)
    except BaseException:
        end(kept)  # nothing else would ever find it
        raise
    return kept


def end(kept: KeptParent) -> list[str]:
    """Ends a kept parent with every server that it has; returns what could not be removed."""
    with Teardown() as down:
        down.collect(kept.name, lambda: _quit(kept))
        if kept.runtime == "docker":
            down.collect(kept.name, lambda: parent_container.remove(kept.name))
        down.collect(kept.folder, lambda: temporary.remove(Path(kept.folder)))
        if not down.failures:
            down.step(str(kept.file), lambda: kept.file.unlink(missing_ok=True))
    return down.failures


def _quit(kept: KeptParent) -> list[str]:
    """Asks it to end; returns what still runs. One in a container is removed with that."""
    try:
        preloaded = Preloaded(SocketLink(Path(kept.folder) / "control" / "socket"))
    except EngineError:
        return []  # it has ended
    with Teardown() as down:
        try:
            preloaded.wait_until_ready(10.0)
            preloaded.ask("quit")
        except EngineError:
            pass  # it has ended, or ends before it answers
        down.collect(f"connection to {kept.name}", preloaded.close)
        if kept.runtime == "process" and "pid" in preloaded.about:
            down.collect(kept.name, lambda: _until_gone(int(preloaded.about["pid"])))
    return down.failures


def _until_gone(pid: int) -> list[str]:
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return []
    if until_gone([process], 20.0):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return [f"process {each.pid}" for each in until_gone([process], 5.0)]


def sweep(*, everything: bool = False) -> tuple[list[str], list[str]]:
    """Removes the records and folders of kept parents that have ended, or ends all.

    Returns:
        the names of those that are gone, and what could not be removed, with why.
    """
    gone: list[str] = []
    failed: list[str] = []
    for kept in on_record():
        if not everything and kept.answers():
            continue
        try:
            left = end(kept)
        except EngineError as error:
            left = [f"parent {kept.name}: {error}"]
        failed += left
        if not left:
            gone.append(kept.name)
    return gone, failed
