"""The HTTP remote control of one SGLang server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

from sglang_harness.client import calls
from sglang_harness.client.answers import (
    AdapterUpdate,
    ChatAnswer,
    Checksums,
    Chunk,
    Generation,
    Update,
)
from sglang_harness.client.call import Attempt, Call, Reply, RetryPolicy, error_words, understand
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
    "Attempt",
    "Call",
    "ChatAnswer",
    "Checksums",
    "Chunk",
    "Client",
    "Generation",
    "Reply",
    "RequestsTransport",
    "RetryPolicy",
    "Transport",
    "Update",
]

T = TypeVar("T")


class Client:
    """Calls one server. May be used from many threads.

    Args:
        transport: what sends.
        watch: says whether the server still lives; a call that fails because it died raises
            :class:`ServerDied` with the reason instead of a broken connection.
        retry: when a failed call is sent again; by default never.
        timeout: seconds for an answer where neither the call nor :meth:`within` says less.
        cleanup: seconds for all calls of one :meth:`cleanup`.
        read_only: a call that changes the server is not sent, and raises :class:`ReadOnly`.

    Raises, for every call: :class:`Refused`, :class:`BadAnswer`, :class:`Unreachable`,
    :class:`NoAnswerInTime`, and :class:`ServerDied`; inside :meth:`within` also
    :class:`TimeIsOver`.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        watch: DeathWatch | None = None,
        retry: RetryPolicy | None = None,
        timeout: float = 120.0,
        cleanup: float = 300.0,
        read_only: bool = False,
    ) -> None:
        self.read_only = read_only
        self._timeout = timeout
        self._cleanup = cleanup
        self._transport = transport
        self._watch = watch
        self._retry = retry or RetryPolicy()
        self.retries: list[Attempt] = []
        self._deadline: float | None = None
        self._own = threading.local()
        self._routes: frozenset[tuple[str, str]] | None = None
        self._lock = threading.Lock()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Bounds everything inside, whichever thread it is called from.

        A call that is still without its answer after ``seconds`` raises :class:`TimeIsOver`, and
        none is sent after that, except inside :meth:`cleanup`. Of nested bounds the earlier holds.
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
        """Calls of this thread that restore the server: exempt from every :meth:`within` around
        them, and bounded on their own.

        Args:
            seconds: for all of them; by default what the client was made with.
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
        failed = 0
        while True:
            bounded = self._bounded(call)
            try:
                return understand(call, self._transport.send(bounded))
            except RequestFailed as error:
                self._raise_if_dead(error)
                failed += 1
                delay = self._retry.delay(call, failed, error)
                if delay is None:
                    raise self._blamed(call, error) from None
                with self._lock:
                    self.retries.append(Attempt(str(call), failed, str(error)))
                self._pause(delay)

    def events(self, call: Call[dict[str, Any]]) -> Iterator[tuple[float, dict[str, Any]]]:
        """The events of a stream with the seconds since the request was sent.

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
                reason, kind = error_words(b"\n".join(lines))
                raise Refused(str(call), status, reason, kind)
            for line in lines:
                self._bounded(call)
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip()
                if text == b"[DONE]":
                    finished = True
                    continue
                data = json.loads(text)
                if not isinstance(data, dict):
                    raise ValueError(f"{type(data).__name__} instead of an object")
                if "error" in data:
                    reason, kind = error_words(text)
                    raise Refused(str(call), status, reason, kind)
                yield time.monotonic() - started, data
        except ValueError as error:
            raise BadAnswer(str(call), f"an event that is no JSON object ({error})") from None
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
            raise TimeIsOver(str(call), "not sent: the time for this was over")
        return replace(call, timeout=min(left, timeout))

    def _left(self) -> float | None:
        """Seconds until the bound that holds for this thread; ``None``: there is none."""
        own: float | None = getattr(self._own, "deadline", None)
        ends = own if own is not None else self._deadline
        return None if ends is None else ends - time.monotonic()

    def _blamed(self, call: Call[Any], error: RequestFailed) -> RequestFailed:
        """``error``, told apart from one that only a bound of the caller's made."""
        left = self._left()
        if isinstance(error, NoAnswerInTime) and left is not None and left <= 0:
            return TimeIsOver(str(call), "no answer when the time for this was over")
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

    def _pause(self, seconds: float) -> None:
        if self._watch is None:
            time.sleep(seconds)
        elif death := self._watch.wait(seconds):
            raise ServerDied(death)

    def close(self) -> None:
        self._transport.close()

    # --- what the server can do, asked of it --------------------------------------------

    def has_route(self, method: str, path: str) -> bool:
        """Whether the server offers a route, by its ``/openapi.json``, asked once."""
        if self._routes is None:
            self._routes = self.send(calls.routes())
        return (method.upper(), path) in self._routes

    def generate(self, prompt: calls.Prompt, **options: Any) -> Generation:
        """See :func:`calls.generate`."""
        return self.send(calls.generate(prompt, **options))

    def generate_batch(self, prompts: Sequence[calls.Prompt], **options: Any) -> list[Generation]:
        """See :func:`calls.generate_batch`."""
        return self.send(calls.generate_batch(prompts, **options))

    def stream(self, prompt: calls.Prompt, **options: Any) -> Iterator[Chunk]:
        """Events of a streamed generation; see :func:`calls.generate_stream`."""
        call = calls.generate_stream(prompt, **options)
        for seconds, data in self.events(call):
            ids = tuple(int(i) for i in data.get("output_ids") or ())
            yield Chunk(data.get("text", ""), ids, seconds, data)

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> ChatAnswer:
        """See :func:`calls.chat`."""
        return self.send(calls.chat(messages, **options))

    def chat_streamed(self, messages: Sequence[dict[str, str]], **options: Any) -> ChatAnswer:
        """The same answer, put together from its events (deltas, unlike ``stream``)."""
        text, finish, chunks = "", "", 0
        usage: dict[str, int] = {}
        options = {"stream_options": {"include_usage": True}, **options}
        for _, data in self.events(calls.chat_stream(messages, **options)):
            chunks += 1
            usage = data.get("usage") or usage
            for choice in data.get("choices") or ():
                text += choice["delta"].get("content") or ""
                finish = choice.get("finish_reason") or finish
        return ChatAnswer(
            text, finish, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), chunks
        )

    def completions(self, prompt: str, **options: Any) -> ChatAnswer:
        return self.send(calls.completions(prompt, **options))

    def abort(self, request_id: str) -> None:
        self.send(calls.abort(request_id))

    def abort_all(self) -> None:
        self.send(calls.abort_all())

    def model_info(self) -> dict[str, Any]:
        return self.send(calls.model_info())

    def server_info(self) -> dict[str, Any]:
        return self.send(calls.server_info())

    def models(self) -> list[str]:
        return self.send(calls.models())

    def update_weights_from_disk(self, path: str, **options: Any) -> Update:
        """See :func:`calls.update_weights_from_disk`. An answer is no evidence."""
        return self.send(calls.update_weights_from_disk(path, **options))

    def begin_weight_update(self, **options: Any) -> Update:
        """See :func:`calls.begin_weight_update`."""
        return self.send(calls.begin_weight_update(**options))

    def end_weight_update(self, **options: Any) -> Update:
        """See :func:`calls.end_weight_update`."""
        return self.send(calls.end_weight_update(**options))

    def update_weight_version(self, version: str) -> Update:
        """See :func:`calls.update_weight_version`."""
        return self.send(calls.update_weight_version(version))

    def check_weights(self, action: Literal["snapshot", "reset_tensors", "compare"]) -> Update:
        """See :func:`calls.check_weights`."""
        return self.send(calls.check_weights(action))

    def checksums(self) -> Checksums:
        return self.send(calls.checksums())

    def load_lora_adapter(self, name: str, path: str, **options: Any) -> AdapterUpdate:
        """See :func:`calls.load_lora_adapter`. An answer is no evidence."""
        return self.send(calls.load_lora_adapter(name, path, **options))

    def load_lora_adapter_from_tensors(
        self, name: str, config: dict[str, Any], tensors: Sequence[str], **options: Any
    ) -> AdapterUpdate:
        """See :func:`calls.load_lora_adapter_from_tensors`. An answer is no evidence."""
        return self.send(calls.load_lora_adapter_from_tensors(name, config, tensors, **options))

    def unload_lora_adapter(self, name: str) -> AdapterUpdate:
        """See :func:`calls.unload_lora_adapter`."""
        return self.send(calls.unload_lora_adapter(name))

    def flush_cache(self) -> None:
        self.send(calls.flush_cache())

    def pause(self, mode: str = "abort") -> None:
        self.send(calls.pause(mode))

    def resume(self) -> None:
        self.send(calls.resume())

    def release_memory(self, tags: Sequence[str] | None = None) -> None:
        self.send(calls.release_memory(tags))

    def resume_memory(self, tags: Sequence[str] | None = None) -> None:
        self.send(calls.resume_memory(tags))
