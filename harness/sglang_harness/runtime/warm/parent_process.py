"""A preloaded parent as a process of this machine, for servers without a container."""

from __future__ import annotations

import importlib.util
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sglang_harness._base import assets
from sglang_harness._base.living import lives_as
from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import EngineError
from sglang_harness.runtime import cpu_binding
from sglang_harness.runtime.attached import AttachedProcess
from sglang_harness.runtime.path_map import SameMachine
from sglang_harness.runtime.ports import Port, reserve
from sglang_harness.runtime.warm.parents import (
    Folders,
    Parent,
    Say,
    new_name,
    new_root,
    until_it_listens,
)
from sglang_harness.runtime.warm.protocol import Preloaded, Recipe, script


class ProcessParent(Parent):
    """A parent that was started by this process, or a kept one that was found."""

    def __init__(self, *about: Any, **more: Any) -> None:
        super().__init__(*about, **more)
        self._peers: dict[str, list[AttachedProcess]] = {}

    def address_words(self) -> tuple[list[str], Port | None]:
        port = reserve()
        return ["--host", "127.0.0.1", "--port", str(port.number)], port

    def address(self, port: int) -> str:
        return f"http://127.0.0.1:{port}"

    def temporary(self, name: str) -> PurePosixPath:
        return PurePosixPath(self.folders.root / "tmp" / name)

    def cores(self) -> list[int]:
        return cpu_binding.cores_here()

    def share_model(self, model: Path) -> PurePosixPath:
        return PurePosixPath(model.resolve())

    def reach(self, name: str, model: Path, inside: PurePosixPath) -> SameMachine:
        del name, model, inside
        return SameMachine()

    def host_pids(self, pids: Sequence[int]) -> list[int]:
        return list(pids)

    def start_sidecar(self, name: str, script: str, *, run_id: str) -> AttachedProcess:
        del run_id
        peer = AttachedProcess(
            "The peer",
            [self.recipe.runs, "-c", script],
            name=f"{name}-peer-{uuid.uuid4().hex[:6]}",
            environment={
                **dict(self.recipe.environment),
                "TMPDIR": str(self.temporary(name)),
                "GLOO_SOCKET_IFNAME": "lo",
            },
            folder=Path(self.temporary(name)),
        )
        self._peers.setdefault(name, []).append(peer)
        return peer

    def peers_left(self, name: str) -> list[str]:
        return [line for peer in self._peers.get(name, ()) for line in peer.left_behind()]

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "image": None, "python": self.recipe.runs}

    def end_place(self) -> list[str]:
        with Teardown() as down:
            if self.program is not None:
                down.collect(self.name, self.program.end)
            if lost := self.preloaded.lost():
                down.collect("its servers", lambda: _clear_after(lost, since=self.since))
        return down.failures


def _clear_after(lost: list[int], *, since: float) -> list[str]:
    """Ends what is left of servers whose parent was killed, as the parent would have done; returns
    what still runs."""
    spec = importlib.util.spec_from_file_location("preload", assets.root() / "docker/preload.py")
    assert spec is not None
    assert spec.loader is not None
    preload: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preload)
    members: set[int] = set()
    for pid in lost:
        family = preload.family(pid)
        preload.kill(family)
        members |= set(family)
    until = time.monotonic() + 5.0
    while (left := [pid for pid in sorted(members) if lives_as(pid)]) and time.monotonic() < until:
        time.sleep(0.02)
    young = {
        name
        for name, made in preload.segments().items()
        if made >= since and name.startswith(preload.SEGMENTS)
    }
    for name in young - preload.segments_in_use():
        Path("/dev/shm", name).unlink(missing_ok=True)  # noqa: S108
    return [f"process {pid}" for pid in left]


def make(recipe: Recipe, *, say: Say) -> ProcessParent:
    """A parent for this run, ready to fork; it ends with this process.

    Raises:
        EngineError: the Python cannot be run, or SGLang could not be imported.
    """
    name, folders = new_name(), Folders.same(new_root())
    began = time.monotonic()
    say("starting a parent for warm servers; it imports SGLang once")
    process: AttachedProcess | None = None
    try:
        folders.make()
        process = AttachedProcess(
            "The preloaded parent",
            [recipe.runs, "-c", script()],
            name=name,
            environment={**dict(recipe.environment), "TMPDIR": str(folders.root)},
            folder=folders.root,
            # It ends its servers first.
            ends_within=20.0,
        )
        preloaded = Preloaded(process)
        preloaded.wait_until_ready()
    except BaseException:
        with Teardown() as down:
            if process is not None:
                down.step(name, process.kill)  # it imports, and reads no input yet
                down.collect(name, process.end)
            down.step("shared folder", folders.remove)
        raise
    say(f"the parent is ready after {time.monotonic() - began:.1f} s")
    return ProcessParent(name, preloaded, folders, recipe, kept=False, program=process)


def make_kept(recipe: Recipe, *, idle: float) -> tuple[str, Folders]:
    """A parent that outlives this process, and ends by itself after ``idle`` seconds without use.

    Raises:
        EngineError: the Python cannot be run, or SGLang could not be imported.
    """
    name, folders = new_name(), Folders.same(new_root())
    process: subprocess.Popen[bytes] | None = None
    try:
        folders.make()
        try:
            process = subprocess.Popen(
                [
                    *(recipe.runs, "-c", script(), "--listen", str(folders.socket)),
                    *("--idle", f"{idle:g}", "--log", str(folders.log)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folders.root,
                env={**dict(recipe.environment), "TMPDIR": str(folders.root)},
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"{recipe.runs} cannot be run: {error.strerror}.") from None
        until_it_listens(folders, lambda: process.poll() is None)
    except BaseException:
        with Teardown() as down:
            if process is not None:
                down.step(name, process.kill)
                down.step(name, process.wait)
            down.step("shared folder", folders.remove)
        raise
    return name, folders


def find(name: str, root: Path, recipe: Recipe) -> ProcessParent:
    """A kept parent. Raises :class:`EngineError`: it has ended."""
    return ProcessParent.found(name, Folders.same(root), recipe)
