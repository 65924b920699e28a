"""Ctrl-C and SIGTERM raise one exception, once; the clean-up is not interrupted again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sglang_harness.errors import Interrupted


class Interruptions:
    """The signals of one block of work.

    Attributes:
        seen: the first of them; ``None`` where none came.
    """

    def __init__(self) -> None:
        self.seen: Interrupted | None = None
        self._calm = False

    def calm(self) -> None:
        """From now on a signal is recorded and raises nothing: the clean-up has begun."""
        self._calm = True

    def handle(self, number: int, _frame: FrameType | None) -> None:
        first, self.seen = self.seen is None, self.seen or Interrupted(number)
        if first and not self._calm:
            self._calm = True
            raise self.seen


@contextmanager
def interruptions() -> Iterator[Interruptions]:
    """Inside, the first SIGINT or SIGTERM raises :class:`Interrupted` in the main thread.

    Later ones are ignored until the block is left, so that a second Ctrl-C cannot leave a
    container behind. In other threads than the main one this does nothing.
    """
    state = Interruptions()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    before = {n: signal.signal(n, state.handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
