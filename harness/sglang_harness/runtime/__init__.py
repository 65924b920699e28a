"""How a server comes to be. One module for each way, behind one small protocol."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from sglang_harness.runtime.death import Death, DeathWatch

__all__ = ["Death", "DeathWatch", "Reach", "Running"]


class Reach(Protocol):
    """How something on this machine looks from where the server runs."""

    def share(self, path: Path) -> PurePosixPath:
        """Makes a local file or folder readable for the server; returns its path there."""


class Running(Protocol):
    """A server that a runtime has started. Knows nothing of HTTP beyond an address."""

    @property
    def runtime(self) -> str:
        """Name of the runtime, as the verdict states it."""

    @property
    def address(self) -> str:
        """Base URL, such as ``http://127.0.0.1:49153``."""

    @property
    def api_key(self) -> str | None:
        """The key that the server was started with."""

    @property
    def watch(self) -> DeathWatch:
        """Tells within a second that the server ended."""

    @property
    def reach(self) -> Reach: ...

    def model_path(self) -> str:
        """The path (or hub name) of the served model as the server knows it."""

    def logs(self, *, tail: int | None = None) -> str:
        """The server's output so far, oldest first, secrets included."""

    def inspect(self) -> dict[str, Any]:
        """What it runs from: image, digest, command, limits; for the verdict."""

    def host_pids(self) -> list[int]:
        """Process ids of the server as this host sees them; empty where it cannot."""

    def end(self) -> int | None:
        """Asks it to end, then makes it; removes what it left. Returns the exit code."""

    def left_behind(self) -> list[str]:
        """What of it is still there after ``end``; empty when all is well."""
