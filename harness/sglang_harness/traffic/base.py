"""Threads that send requests while their owner does something else to the server."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from sglang_harness.client import Client
from sglang_harness.errors import RequestFailed, ServerDied, ServerLost

#: Seconds for what is cancelled to end.
CANCELLED_WITHIN = 5.0

B = TypeVar("B", bound="Background")


class Background(ABC):
    """Requests in threads, whose owner reads the results.

    An exception that ends a thread is recorded and raised to the reader of the results, so that
    an error of the harness is never mistaken for a request that the server lost. Leaving the
    ``with`` block ends the threads and aborts the requests, also when a check raises inside it:
    they must not go on while the next check runs.
    """

    def __init__(self, client: Client, *, threads: int, name: str) -> None:
        self._client = client
        self._news = threading.Condition()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._working = threads
        # A thread that hangs in a read must not hold the process: it ends at the read's time-out.
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True)
            for n in range(threads)
        ]

    @abstractmethod
    def _work(self) -> None:
        """What each thread does, until it is done or ``_stopping`` is set."""

    @abstractmethod
    def _under_way(self) -> list[str]:
        """Ids of the requests that the server may still work on."""

    def start(self: B) -> B:
        """Starts the threads; does nothing where they were started."""
        try:
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()
        except BaseException:
            self.cancel()  # no block is entered that would end those that run
            raise
        return self

    def __enter__(self: B) -> B:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Aborts what is under way, and waits up to 5 s for the threads to end. Does nothing if
        all is over.

        Raises nothing for a server that is dead or does not answer; a thread that still waits for
        such a one ends when its call times out.
        """
        cancel([self])

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._fail(error)
        finally:
            with self._news:
                self._working -= 1
                self._news.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Ends all threads; ``error`` is raised to the reader of the results."""
        with self._news:
            if self._failure is None:
                self._failure = error
            self._stopping.set()
            self._news.notify_all()

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether ``condition`` holds within ``seconds``. Raises what ended a thread before it
        held."""
        with self._news:
            self._news.wait_for(lambda: self._failure is not None or condition(), seconds)
            if condition():
                return True
        self._raise_failure()
        return False

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _is_alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _abort(self, seconds: float) -> None:
        try:
            with self._client.cleanup(seconds):
                for request_id in self._under_way():
                    self._client.abort(request_id)
        except (RequestFailed, ServerDied, ServerLost):
            return

    def _join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))


def cancel(backgrounds: Sequence[Background]) -> None:
    """Cancels all of them within the time that one takes; see :meth:`Background.cancel`."""
    for each in backgrounds:
        each._stopping.set()
    until = time.monotonic() + CANCELLED_WITHIN
    running = [each for each in backgrounds if each._is_alive()]
    while running and (left := until - time.monotonic()) > 0:
        # Again and again: an abort does nothing where it arrives before its request.
        for each in running:
            each._abort(left)
        joined_by = time.monotonic() + 0.5
        for each in running:
            each._join(joined_by - time.monotonic())
        running = [each for each in running if each._is_alive()]


@contextmanager
def together(backgrounds: Iterable[B]) -> Iterator[Sequence[B]]:
    """Starts all of them, and cancels what still runs at the end of the ``with`` block, or where
    making or starting one of them fails."""
    started: list[B] = []
    try:
        for each in backgrounds:
            started.append(each)
            each.start()
        yield started
    finally:
        cancel(started)
