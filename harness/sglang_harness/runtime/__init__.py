"""How a server comes to be. One module for each way, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from sglang_harness.memory import MemorySource
from sglang_harness.runtime.death import Death, DeathWatch
from sglang_harness.spec import Argument, ServerSpec

__all__ = ["Beside", "Death", "DeathWatch", "Reach", "Running", "Runtime", "Started"]


@dataclass(frozen=True)
class Started:
    """How a server came to be.

    Attributes:
        how: ``cold`` (its image or Python starts it, as anybody would), ``warm`` (forked from a
            parent that has imported SGLang already) or ``elsewhere`` (not by this run).
        why: why not warm, in words, where that had been possible or was asked for.
    """

    how: Literal["cold", "warm", "elsewhere"]
    why: str = ""


class Reach(Protocol):
    """How something on this machine looks from where the server runs."""

    def share(self, path: Path) -> PurePosixPath:
        """Makes a local file or folder readable for the server; returns its path there."""

    def unshare(self, inside: PurePosixPath) -> None:
        """Removes the copy that :meth:`share` made and returned as ``inside``. Does nothing where
        no copy was made, because the server reads the original, or where it was removed already.

        Raises:
            EngineError: it could not be removed. The end of the server removes it.
        """


class Beside(Protocol):
    """One program beside a server."""

    @property
    def name(self) -> str: ...

    def write(self, line: bytes) -> None:
        """Raises :class:`EngineError`: it does not listen any more."""

    def read(self, timeout: float) -> bytes | None:
        """Its next line; ``None`` when it has ended.

        Raises:
            TimeoutError: no line within ``timeout`` seconds.
        """

    def words(self) -> str:
        """The end of its error output."""

    def end(self) -> list[str]:
        """Ends it, removes what it left, and says what could not be removed. Again: nothing."""


class Running(Protocol):
    """One server of a runtime. Knows nothing of HTTP beyond an address."""

    @property
    def runtime(self) -> str:
        """Name of the runtime, as the verdict states it."""

    @property
    def started(self) -> Started:
        """Cold or warm, and why."""

    @property
    def device(self) -> Literal["cpu", "gpu"]:
        """What ``spec.device`` turned out to mean."""

    @property
    def run_id(self) -> str:
        """The run that it belongs to."""

    @property
    def model(self) -> Path | None:
        """The served model's folder on this machine; ``None`` where it is not here."""

    @property
    def arguments(self) -> dict[str, Argument]:
        """SGLang's flags that it is started with, beside model, address and device."""

    def start(self) -> object:
        """Sets it going; returns when it runs, long before it answers."""

    def memory(self) -> list[MemorySource]:
        """Where memory is read beside the GPUs: the host memory of the server."""

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

    def beside(self, script: str) -> Beside:
        """Starts a program beside the server that shares its user, ``/dev/shm``, ``TMPDIR``,
        loopback and files. It goes when the server ends, if not before.

        Args:
            script: Python for the server's own interpreter, in one text.

        Raises:
            EngineError: nothing can be put beside this server.
        """

    def model_path(self) -> str:
        """The path (or hub name) of the served model as the server knows it."""

    def logs(self, *, tail: int | None = None) -> str:
        """The server's output so far, oldest first, secrets included."""

    def inspect(self) -> dict[str, Any]:
        """What it runs from: image, digest, command, limits; for the verdict."""

    def host_pids(self) -> list[int]:
        """Process ids of the server as this host sees them; empty where it cannot."""

    def end(self, *, at_once: bool = False) -> int | None:
        """Asks it to end, then makes it; removes what it left. Again: the same.

        Args:
            at_once: nobody judges how it ends: it is made to, without being asked. SGLang takes
                five seconds or more to end when it is asked (0.5.23).

        Returns:
            the exit code; ``None`` where nobody could tell.
        """

    def left_behind(self) -> list[str]:
        """What of it is still there after ``end``; empty when all is well."""


class Runtime(Protocol):
    """One way for servers to come to be."""

    @property
    def name(self) -> str:
        """As the command line and the verdict call it."""

    def prepare(
        self,
        spec: ServerSpec,
        *,
        run_id: str,
        held: bool,
        say: Callable[[str], None],
    ) -> Running:
        """Everything up to starting: finds the device, builds or fetches what is missing.

        Args:
            held: the server is meant to outlive this process.

        Raises:
            SpecError, EngineError, ImageError, ModelError: it cannot be had here.
        """

    def keeping_parents(self) -> AbstractContextManager[None]:
        """Inside, more than one server is to be expected: what makes the next start faster is
        made, and kept until the end."""
