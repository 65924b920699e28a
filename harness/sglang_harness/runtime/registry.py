"""The runtimes there are, which options belong to which, and what 'auto' turns out to be.

A new runtime is a module with a ``KIND`` and its name in :data:`KINDS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sglang_harness.errors import EngineError, SpecError
from sglang_harness.runtime import (
    Kind,
    KindOption,
    Order,
    Running,
    Runtime,
    compose,
    docker,
    engine,
    process,
)
from sglang_harness.spec import ServerSpec


class AutoRuntime:
    """Containers where an engine answers; else processes, which is said.

    Decided when the first server is prepared, and then kept for the run.
    """

    starts = True
    decides_gpus = False
    decides_model = False

    def __init__(self) -> None:
        self._chosen: Runtime | None = None
        self._kept: ExitStack | None = None

    @property
    def name(self) -> str:
        return "auto" if self._chosen is None else self._chosen.name

    @property
    def caveats(self) -> tuple[str, ...]:
        return () if self._chosen is None else self._chosen.caveats

    def for_another_server(self) -> AutoRuntime:
        return self

    @contextmanager
    def keeping_parents(self) -> Iterator[None]:
        """See :class:`sglang_harness.runtime.Runtime`."""
        # Which runtime it will be is not known yet: that one is told when it is chosen.
        with ExitStack() as self._kept:
            if self._chosen is not None:
                self._kept.enter_context(self._chosen.keeping_parents())
            yield
        self._kept = None

    def prepare(self, order: Order) -> Running:
        """See :class:`sglang_harness.runtime.Runtime`.

        Raises:
            EngineError: no engine answers, and the spec, DOCKER_HOST or ``held`` asks for one.
        """
        if self._chosen is None:
            self._chosen = self._decide(order.spec, order.held, order.say)
            if self._kept is not None:
                self._kept.enter_context(self._chosen.keeping_parents())
        return self._chosen.prepare(order)

    @staticmethod
    def _decide(spec: ServerSpec, held: bool, say: Callable[[str], None]) -> Runtime:
        try:
            engine.connect().close()
        except EngineError as error:
            # An image, a GPU or an engine's address means a container.
            if spec.image or held or spec.device == "gpu" or os.environ.get("DOCKER_HOST"):
                raise
            say(f"{error.message} Continuing without a container (--runtime docker forbids it)")
            return process.ProcessRuntime()
        return docker.DockerRuntime()


#: Every runtime that starts servers, in the order in which help texts list them.
KINDS: tuple[Kind, ...] = (
    Kind("auto", lambda _: AutoRuntime()),
    docker.KIND,
    compose.KIND,
    process.KIND,
)

NAMES = tuple(kind.name for kind in KINDS)

#: Every option that belongs to one runtime. Each says how to start a server, so each contradicts
#: the address of one that runs already.
OPTIONS: tuple[KindOption, ...] = tuple(option for kind in KINDS for option in kind.options)


def choose(
    name: str,
    given: Mapping[str, str | Path | None] | None = None,
    *,
    prefix: str = "--",
) -> Runtime:
    """The runtime ``name``; for ``auto`` the one that the options in ``given`` belong to.

    Args:
        given: values of :data:`OPTIONS` by name; ``None`` and missing ones were not given.
        prefix: what options begin with where they were given, for messages.

    Raises:
        SpecError: there is no such runtime, or the options contradict each other.
    """
    kinds = {kind.name: kind for kind in KINDS}
    if name not in kinds:
        raise SpecError(f"{prefix}runtime {name!r} is unknown. It can be {', '.join(NAMES)}.")
    values = {option: value for option, value in (given or {}).items() if value is not None}
    owners = {option.name: kind for kind in KINDS for option in kind.options}
    chosen = kinds[name]
    for option in values:
        if chosen.name == "auto":
            chosen = owners[option]
        elif owners[option] is not chosen:
            raise SpecError(
                f"{prefix}{option} belongs to the runtime {owners[option].name!r}, and the "
                f"runtime is {chosen.name!r}.",
                advice="Give one of the two.",
            )
    return chosen.make(values)
