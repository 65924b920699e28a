"""The HTTP client of one SGLang server."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from sglang_harness.client import calls
from sglang_harness.client.answers import (
    AdapterUpdate,
    ChatAnswer,
    ChatChunk,
    Checksums,
    Chunk,
    Generation,
    Update,
)
from sglang_harness.client.call import Call, Reply, refusal, understand
from sglang_harness.client.methods import gathers, sends, streams
from sglang_harness.client.offered import OfferedRoutes
from sglang_harness.client.transport import RequestsTransport, Transport
from sglang_harness.errors import (
    BadAnswer,
    NoAnswerInTime,
    ReadOnly,
    Refused,
    RequestFailed,
    ServerDied,
    TimeIsOver,
    Unreachable,
)
from sglang_harness.runtime.death import DeathWatch

__all__ = [
    "AdapterUpdate",
    "Call",
    "ChatAnswer",
    "ChatChunk",
    "Checksums",
    "Chunk",
    "Client",
    "Generation",
    "Reply",
    "RequestsTransport",
    "Transport",
    "Update",
]

T = TypeVar("T")


class Client:
    """Calls one server. May be used from many threads. Each call is sent once, never again.

    Args:
        transport: what sends.
        watch: tells whether the server process is still running; a call that fails because the
            server died raises :class:`ServerDied` with the reason instead of a broken connection.
        timeout: seconds for an answer where neither the call nor :meth:`within` sets less.
        cleanup: seconds for all calls of one :meth:`cleanup`.
        read_only: a call that changes the server is not sent, and raises :class:`ReadOnly`.

    Raises, for every call: :class:`Refused`, :class:`BadAnswer`, :class:`Unreachable`,
    :class:`NoAnswerInTime`, :class:`ServerDied` and :class:`ServerLost`; inside :meth:`within`
    also :class:`TimeIsOver`.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        watch: DeathWatch | None = None,
        timeout: float = 120.0,
        cleanup: float = 300.0,
        read_only: bool = False,
    ) -> None:
        self.read_only = read_only
        self._timeout = timeout
        self._cleanup = cleanup
        self._transport = transport
        self._watch = watch
        self._deadline: float | None = None
        self._own = threading.local()
        self._routes = OfferedRoutes(self)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Bounds every call inside, from any thread.

        A call that is still unanswered after ``seconds`` raises :class:`TimeIsOver`, and none is
        sent after that, except inside :meth:`cleanup`. Of nested bounds the earlier one holds.
        """
        before = self._deadline
        ends = time.monotonic() + seconds
        self._deadline = ends if before is None else min(before, ends)
        try:
            yield
        finally:
            self._deadline = before

    @contextmanager
    def cleanup(self, seconds: float | None = None) -> Iterator[None]:
        """For calls that restore the server: those of this thread are exempt from every
        :meth:`within` around them, and have a bound of their own.

        Args:
            seconds: for all of them together; by default what the client was made with.
        """
        before: float | None = getattr(self._own, "deadline", None)
        self._own.deadline = time.monotonic() + (self._cleanup if seconds is None else seconds)
        try:
            yield
        finally:
            self._own.deadline = before

    def send(self, call: Call[T]) -> T:
        """The answer to ``call``; see the class for what it raises."""
        if self.read_only and call.changes:
            raise ReadOnly(str(call))
        try:
            return understand(call, self._transport.send(self._bounded(call)))
        except RequestFailed as error:
            self._raise_if_dead(error)
            raise self._blamed(call, error) from None

    def events(self, call: Call[T]) -> Generator[T, None, None]:
        """The events of a streamed answer, each as ``call.read`` reads it.

        Raises what :meth:`send` raises; :class:`Refused` also for an error inside the
        stream, which SGLang sends as an event after 200, and :class:`BadAnswer` for a
        stream that ends without ``[DONE]``.
        """
        started = time.monotonic()
        finished = False
        try:
            lines = self._transport.stream(self._bounded(call))
            status = int(next(lines))
            if not 200 <= status < 300:
                raise refusal(call, status, b"\n".join(lines))
            for line in lines:
                self._bounded(call)
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip()
                if text == b"[DONE]":
                    finished = True
                    continue
                event = Reply(status, text, time.monotonic() - started)
                if b'"error"' in text and _is_error(event):
                    raise refusal(call, status, text)
                yield understand(call, event)
        except RequestFailed as error:
            self._raise_if_dead(error)
            raise self._blamed(call, error) from None
        if not finished:
            self._raise_if_dead(Unreachable(str(call), "the stream ended"))
            raise BadAnswer(str(call), "the stream ended without [DONE]")

    def _bounded(self, call: Call[T]) -> Call[T]:
        """The call with no more time than is left; raises :class:`TimeIsOver` when none is."""
        timeout = call.timeout or self._timeout
        left = self._left()
        if left is None:
            return replace(call, timeout=timeout)
        if left <= 0:
            raise TimeIsOver(str(call), "not sent: the caller's time limit had passed")
        return replace(call, timeout=min(left, timeout))

    def _left(self) -> float | None:
        """Seconds until the bound that holds for this thread; ``None``: unbounded."""
        own: float | None = getattr(self._own, "deadline", None)
        ends = own if own is not None else self._deadline
        return None if ends is None else ends - time.monotonic()

    def _blamed(self, call: Call[Any], error: RequestFailed) -> RequestFailed:
        """``error``, or :class:`TimeIsOver` where only a bound of the caller's ended the wait."""
        left = self._left()
        if isinstance(error, NoAnswerInTime) and left is not None and left <= 0:
            return TimeIsOver(str(call), "no answer before the caller's time limit")
        return error

    def _raise_if_dead(self, error: RequestFailed) -> None:
        if self._watch is None or not isinstance(error, Unreachable | BadAnswer | Refused):
            return
        # A dying server breaks connections a moment before its process is gone; and one
        # whose scheduler died answers 500 first (SGLang 0.5.23).
        settles = 2.0 if isinstance(error, Unreachable) else 0.0
        if isinstance(error, Refused) and error.status >= 500 and error.status != 503:
            settles = 1.0
        if death := self._watch.wait(settles):
            raise ServerDied(death) from error

    def close(self) -> None:
        """Closes the connections. The client must not be used afterwards."""
        self._transport.close()

    def has_route(self, method: str, path: str) -> bool:
        """Whether the server offers a route; see :class:`OfferedRoutes`. Asked once."""
        return self._routes.has(method, path)

    # --- the calls: signatures and descriptions are those of the module `calls` -----------

    model_info = sends(calls.model_info)
    server_info = sends(calls.server_info)
    models = sends(calls.models)

    generate = sends(calls.generate)
    generate_batch = sends(calls.generate_batch)
    stream = streams(calls.generate_stream)
    chat = sends(calls.chat)
    chat_streamed = gathers(calls.chat_stream, ChatAnswer.joined, ChatAnswer)
    completions = sends(calls.completions)
    abort = sends(calls.abort)
    abort_all = sends(calls.abort_all)

    update_weights_from_disk = sends(calls.update_weights_from_disk)
    begin_weight_update = sends(calls.begin_weight_update)
    end_weight_update = sends(calls.end_weight_update)
    update_weight_version = sends(calls.update_weight_version)
    check_weights = sends(calls.check_weights)
    checksums = sends(calls.checksums)

    load_lora_adapter = sends(calls.load_lora_adapter)
    load_lora_adapter_from_tensors = sends(calls.load_lora_adapter_from_tensors)
    unload_lora_adapter = sends(calls.unload_lora_adapter)

    flush_cache = sends(calls.flush_cache)
    pause = sends(calls.pause)
    resume = sends(calls.resume)
    release_memory = sends(calls.release_memory)
    resume_memory = sends(calls.resume_memory)


def _is_error(event: Reply) -> bool:
    """Whether an event has an error in place of an answer; not where the text merely mentions
    one."""
    try:
        data = event.json()
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "error" in data
