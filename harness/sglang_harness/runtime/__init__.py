"""How a server comes to be. One module for each way, behind two small protocols.

What a runtime or a server can do is a member here. Nothing outside this package compares a
runtime's name or asks for its class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from sglang_harness.memory import MemorySource
from sglang_harness.runtime.death import Death, DeathWatch, Unknown
from sglang_harness.spec import Argument, ServerSpec

__all__ = [
    "Death",
    "DeathWatch",
    "Introduction",
    "Kind",
    "KindOption",
    "Order",
    "Reach",
    "Running",
    "Runtime",
    "Sidecar",
    "Started",
    "Unknown",
]


@dataclass(frozen=True)
class Started:
    """How a server came to be.

    Attributes:
        how: ``cold`` (its image or Python starts it, as without the harness), ``warm`` (forked
            from a parent that has imported SGLang already) or ``elsewhere`` (not by this run).
        why: why not warm, as a phrase, where a warm start was possible or asked for.
    """

    how: Literal["cold", "warm", "elsewhere"]
    why: str = ""


@dataclass(frozen=True)
class Introduction:
    """What a server that runs already says of itself."""

    version: str
    model_path: str
    device: Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Order:
    """One server to be prepared.

    Attributes:
        model: the model's folder on this machine; ``None``: it is on a hub, or the runtime
            decides which model is served (:attr:`Runtime.decides_model`).
        run_id: the run that the server belongs to.
        held: the server is meant to outlive this process.
        say: is told what happens, a line at a time.
        identify: asks the server at a URL, with a key, what it is; needed by runtimes that start
            nothing. Raises :class:`AttachError`.
    """

    spec: ServerSpec
    model: Path | None
    run_id: str
    held: bool = False
    say: Callable[[str], None] = lambda _: None
    identify: Callable[[str, str | None], Introduction] | None = None


class Reach(Protocol):
    """How a path of this machine looks from where the server runs."""

    def share(self, path: Path) -> PurePosixPath:
        """Makes a local file or folder readable for the server; returns its path there."""

    def unshare(self, inside: PurePosixPath) -> None:
        """Removes the copy that :meth:`share` made and returned as ``inside``. Does nothing where
        no copy was made, because the server reads the original, or where it was removed already.

        Raises:
            EngineError: it could not be removed. The end of the server removes it.
        """


class Sidecar(Protocol):
    """One program beside a server: a sidecar."""

    @property
    def name(self) -> str: ...

    def write(self, line: bytes) -> None:
        """Raises :class:`EngineError`: it no longer reads its input."""

    def read(self, timeout: float) -> bytes | None:
        """Its next line; ``None`` when it has ended.

        Raises:
            TimeoutError: no line within ``timeout`` seconds.
        """

    def words(self) -> str:
        """The end of its error output."""

    def end(self) -> list[str]:
        """Ends it, removes what it left, and returns what could not be removed. Called again, it
        does nothing."""


class Running(Protocol):
    """One server of a runtime. Knows nothing of HTTP beyond an address."""

    @property
    def runtime(self) -> str:
        """Name of the runtime, as the verdict states it."""

    @property
    def started(self) -> Started:
        """Cold or warm, and why."""

    @property
    def owned(self) -> bool:
        """This run started it and ends it. False: it ran before and goes on afterwards; its
        start, log and memory cannot be seen from here."""

    @property
    def may_change(self) -> bool:
        """False: it is only read; calls that would change it are not sent."""

    @property
    def device(self) -> Literal["cpu", "gpu"]:
        """What ``spec.device`` resolved to."""

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
        """Starts it; returns when it runs, long before it answers. Does nothing where it runs
        already."""

    def memory(self) -> list[MemorySource]:
        """Where memory is read beside the GPUs: the host memory of the server."""

    def cores(self) -> list[int]:
        """Numbers of the processor cores that a server of this kind may use; empty where they
        are not known.

        Raises:
            EngineError: no engine answers.
        """

    @property
    def address(self) -> str:
        """Base URL, such as ``http://127.0.0.1:49153``."""

    @property
    def api_key(self) -> str | None:
        """The key that the server was started with."""

    @property
    def watch(self) -> DeathWatch:
        """Tells within a second that the server ended, or that this cannot be observed."""

    @property
    def shared_folder(self) -> Path | None:
        """A folder on this machine that the server reads in place, is this server's alone and is
        removed with it; ``reach.share`` gives the server's path of what is put there, without a
        copy. ``None``: there is none, and ``reach.share`` makes a copy or needs none."""

    def why_no_files(self) -> str | None:
        """Why the server cannot read files of this machine; ``None``: it can."""

    @property
    def reach(self) -> Reach:
        """Raises :class:`EngineError` where :meth:`why_no_files` gives a reason."""

    def why_no_sidecar(self) -> str | None:
        """Why :meth:`start_sidecar` cannot start a sidecar; ``None``: it can."""

    def start_sidecar(self, script: str) -> Sidecar:
        """Starts a program beside the server that shares its user, ``/dev/shm``, ``TMPDIR``,
        loopback and files: a sidecar. It ends with the server, if not before.

        Args:
            script: Python for the server's own interpreter, in one text.

        Raises:
            EngineError: it cannot be started.
        """

    def model_path(self) -> str:
        """The path (or hub name) of the served model as the server knows it."""

    def logs(self, *, tail: int | None = None) -> str:
        """The server's output so far, oldest first, secrets included."""

    def inspect(self) -> dict[str, Any]:
        """What it runs from: image, digest, command, limits; for the verdict."""

    def host_pids(self) -> list[int]:
        """Process ids of the server as this host numbers them; empty where they are not known."""

    def end(self, *, at_once: bool = False) -> int | None:
        """Asks it to end, then kills it; removes what it left. Called again, it returns the same.

        Args:
            at_once: kill it without asking, because how it ends is not judged. SGLang takes
                five seconds or more to end when it is asked (0.5.23).

        Returns:
            the exit code; ``None`` where it is not known.
        """

    def left_behind(self) -> list[str]:
        """What of it is still there after ``end``; empty when all is well."""


class Runtime(Protocol):
    """One way for servers to come to be."""

    @property
    def name(self) -> str:
        """As the command line and the verdict call it."""

    @property
    def starts(self) -> bool:
        """It starts servers. False: it stands for one that runs already, and another cannot be
        had from it."""

    @property
    def decides_gpus(self) -> bool:
        """Its own file, or who started the server, decides which GPUs are used:
        ``CUDA_VISIBLE_DEVICES`` of this process does not apply."""

    @property
    def decides_model(self) -> bool:
        """Its own file, or who started the server, decides which model is served: ``spec.model``
        counts only where it was set."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a verdict on its servers cannot vouch for, a sentence each."""

    def for_another_server(self) -> Runtime:
        """How a second server, with another model, is started in the same image.

        Raises:
            SpecError: it starts none.
        """

    def prepare(self, order: Order) -> Running:
        """Everything up to starting: finds the device, builds or fetches what is missing.

        Raises:
            SpecError, EngineError, ImageError, ModelError: it cannot be had here.
            AttachError: what should run already does not, or is not SGLang.
        """

    def keeping_parents(self) -> AbstractContextManager[None]:
        """Inside, more than one server is expected: what makes the next start faster is made,
        and kept until the end."""


@dataclass(frozen=True)
class KindOption:
    """An option that belongs to one runtime.

    Attributes:
        name: ``python`` is ``--python`` on the command line, ``--sglang-python`` for pytest.
        help: one line, without the runtime's name.
        is_path: its value is a path of this machine.
    """

    name: str
    help: str
    is_path: bool = False


@dataclass(frozen=True)
class Kind:
    """A runtime as the registry lists it.

    Attributes:
        make: makes the runtime from the values of those of its options that were given, by name.
            Raises :class:`SpecError` where these are invalid or contradictory.
    """

    name: str
    make: Callable[[Mapping[str, str | Path]], Runtime]
    options: tuple[KindOption, ...] = ()
