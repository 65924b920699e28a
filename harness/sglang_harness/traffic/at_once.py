"""The same request with many arguments, at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sglang_harness.errors import HarnessError

A = TypeVar("A")
R = TypeVar("R")


def at_once(ask: Callable[[A], R], arguments: Sequence[A], *, seconds: float = 60.0) -> list[R]:
    """The answers to all ``arguments``, in their order. Each is asked for by a thread of its own,
    and none before all threads run.

    Args:
        seconds: until all threads must run.

    Raises:
        HarnessError: the threads did not all run in time; nothing was sent.
        Exception: what the first that failed, in the order of the arguments, raised.
    """
    together = threading.Barrier(len(arguments))

    def wait_and_ask(argument: A) -> R:
        try:
            together.wait(seconds)
        except threading.BrokenBarrierError:
            raise HarnessError(
                f"{len(arguments)} requests could not be sent at the same time: their threads did "
                f"not all run within {seconds:g} s.",
                advice="This machine is overloaded: stop other work on it.",
            ) from None
        return ask(argument)

    with ThreadPoolExecutor(len(arguments), "at-once") as pool:
        try:
            return list(pool.map(wait_and_ask, arguments))
        finally:
            # A thread that cannot be started must not make the others wait for it.
            together.abort()
