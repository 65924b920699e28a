"""Parents and children of processes, as Linux counts them. Elsewhere these calls do nothing."""

from __future__ import annotations

import ctypes
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if platform.system() == "Linux" else None


def ending_with_parent() -> Callable[[], None]:
    """A function to be called in a child before it becomes another program: it gets SIGTERM when
    the thread that started it ends. The library is loaded here, in the parent: after a fork that
    would not be safe."""
    libc = _libc()

    def end_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return end_with_parent


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """For the block, a descendant whose own parent ends becomes this process's child: it stays
    below this process in the tree, whatever it does to get away."""
    libc = _libc()
    if libc is None:
        yield
        return
    before = ctypes.c_int(0)
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value)
