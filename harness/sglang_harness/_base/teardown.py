"""Tear-down as a set of independent steps: one that fails does not skip the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Teardown:
    """Runs every step at once, each on its own, and keeps what failed.

    ::

        with Teardown() as down:
            down.step("HTTP client", client.close)
            down.collect("peer", peer.end)
        return down.failures

    Ctrl-C or SIGTERM inside a step does not skip the remaining ones: the first is raised again
    when the block is left. Errors are never raised; the caller reports ``failures``.

    Args:
        failures: the list to add to; by default a new one.

    Attributes:
        failures: one line for each step that raised (``WHAT: ERROR TYPE: MESSAGE``), and every
            line that :meth:`collect` was given, in order.
    """

    def __init__(self, failures: list[str] | None = None) -> None:
        self.failures = [] if failures is None else failures
        self._interruption: BaseException | None = None

    def step(self, what: str, do: Callable[[], T]) -> T | None:
        """Runs ``do``; returns its result, or ``None`` where it raised.

        Args:
            what: names the step in ``failures``, such as ``container sglang-harness-1a2b``.
        """
        try:
            return do()
        except Exception as error:
            name, text = type(error).__name__, str(error).strip()
            self.failures.append(f"{what}: {name}: {text}" if text else f"{what}: {name}")
        except BaseException as interruption:
            self._interruption = self._interruption or interruption
            self.failures.append(f"{what}: interrupted ({type(interruption).__name__})")
        return None

    def collect(self, what: str, do: Callable[[], Iterable[str]]) -> None:
        """A :meth:`step` whose result is a list of what it could not remove."""
        self.failures += self.step(what, lambda: list(do())) or []

    def __enter__(self) -> Teardown:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._interruption is not None:
            raise self._interruption
