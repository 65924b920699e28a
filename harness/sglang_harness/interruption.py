"""Ctrl-C and SIGTERM become one exception, once; what cleans up is not interrupted again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sglang_harness.errors import Interrupted


@contextmanager
def interruptions() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises :class:`Interrupted` in the main thread.

    Later ones are ignored until the block is left, so that a second Ctrl-C cannot leave a
    container behind. Elsewhere than in the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised = False

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Interrupted(number)

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
