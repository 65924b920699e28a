"""Which runtime a name means, and which one 'auto' turns out to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sglang_harness import checkpoint
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.runtime import Running, Runtime, engine
from sglang_harness.runtime.compose import ComposeRuntime
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.runtime.process import ProcessRuntime
from sglang_harness.spec import ServerSpec

NAMES = ("auto", "docker", "compose", "process")


def choose(
    name: str,
    *,
    python: Path | None = None,
    compose_file: Path | None = None,
    compose_service: str | None = None,
) -> Runtime:
    """The runtime ``name``; ``python`` is for ``process``, and means it, as a compose file does
    ``compose``.

    Raises:
        SpecError: there is no such runtime, or the options contradict each other.
    """
    if name not in NAMES:
        raise SpecError(f"--runtime {name!r} is none of {', '.join(NAMES)}.")
    compose = compose_file or compose_service
    if python is not None and (name in ("docker", "compose") or compose):
        raise SpecError("--python belongs to the runtime 'process' alone.")
    if compose and name in ("docker", "process"):
        raise SpecError(f"A compose file belongs to the runtime 'compose', not to {name!r}.")
    if name == "compose" or compose:
        return ComposeRuntime(compose_file, compose_service)
    if name == "process" or python is not None:
        return ProcessRuntime(python)
    if name == "docker":
        return DockerRuntime()
    return AutoRuntime()


class AutoRuntime:
    """Containers where an engine answers; else processes, which is said.

    Decided when the first server is prepared, and then kept for the run.
    """

    def __init__(self) -> None:
        self._chosen: Runtime | None = None
        self._kept: ExitStack | None = None

    @property
    def name(self) -> str:
        return "auto" if self._chosen is None else self._chosen.name

    @contextmanager
    def keeping_parents(self) -> Iterator[None]:
        """See :class:`sglang_harness.runtime.Runtime`."""
        # Which one it will be is not known yet: the one that it becomes is told then.
        with ExitStack() as self._kept:
            if self._chosen is not None:
                self._kept.enter_context(self._chosen.keeping_parents())
            yield
        self._kept = None

    def prepare(
        self,
        spec: ServerSpec,
        *,
        run_id: str,
        held: bool,
        say: Callable[[str], None],
    ) -> Running:
        """See :class:`sglang_harness.runtime.Runtime`.

        Raises:
            EngineError: no engine answers, and the spec, DOCKER_HOST or ``held`` asks for one.
        """
        if self._chosen is None:
            # A slip in the model's name is told before anything is said of engines.
            checkpoint.locate(spec.model, say)
            self._chosen = self._decide(spec, held, say)
            if self._kept is not None:
                self._kept.enter_context(self._chosen.keeping_parents())
        return self._chosen.prepare(spec, run_id=run_id, held=held, say=say)

    @staticmethod
    def _decide(spec: ServerSpec, held: bool, say: Callable[[str], None]) -> Runtime:
        try:
            engine.connect().close()
        except EngineError as error:
            # Somebody who names an image or an engine means a container.
            if spec.image or held or spec.device == "gpu" or os.environ.get("DOCKER_HOST"):
                raise
            say(f"{error.message} Going on without a container (--runtime docker forbids it)")
            return ProcessRuntime()
        return DockerRuntime()
