"""Requests in the background while something changes, each with its times and its outcome.

A mark is set where the change begins and where it ends. Afterwards the requests are read in
slices: those that ended before a mark, those that ran across it, those that were sent after it.
An empty slice is an error: nothing can be concluded from requests that were never sent.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict

from sglang_harness.client import Client, Generation
from sglang_harness.errors import HarnessError, RequestFailed, ServerDied, TimeIsOver
from sglang_harness.traffic.base import Background


class EmptySlice(HarnessError):
    """A slice of the traffic that contains no requests."""


class SentRequest(BaseModel):
    """One request of the traffic. Times in seconds since the traffic began.

    Attributes:
        ended: when its answer was whole, or its error came; ``None``: it never ended.
        finish: SGLang's reason, such as ``length`` or ``abort``; empty without an answer.
        error: what came instead of an answer.
        weight_version: the label of the weights, as the answer states it.
    """

    model_config = ConfigDict(extra="forbid")

    number: int
    prompt: list[int]
    sent: float
    ended: float | None = None
    ids: list[int] = []
    logprobs: list[float] = []
    finish: str = ""
    error: str = ""
    weight_version: str | None = None
    weight_spans: list[tuple[str, int, int]] = []
    """Label of the weights, first token and one past the last, where the server states them."""
    cached_tokens: int = 0


class Mark(BaseModel):
    """A named moment, in seconds since the traffic began."""

    model_config = ConfigDict(extra="forbid")

    name: str
    at: float


class TrafficRecord(BaseModel):
    """All requests, in the order of sending. Written into evidence as it is."""

    model_config = ConfigDict(extra="forbid")

    requests: list[SentRequest]
    marks: list[Mark]

    def at(self, mark: str) -> float:
        """Raises :class:`KeyError` for a mark that was not set."""
        for each in self.marks:
            if each.name == mark:
                return each.at
        raise KeyError(f"no mark {mark!r} was set")

    def before(self, mark: str) -> list[SentRequest]:
        """Requests that had ended by then. Raises :class:`EmptySlice` if there are none."""
        at = self.at(mark)
        return self._some(
            f"before {mark!r}", [r for r in self.requests if r.ended is not None and r.ended <= at]
        )

    def across(self, mark: str) -> list[SentRequest]:
        """Requests that were running at that moment. Raises :class:`EmptySlice` if there are
        none."""
        at = self.at(mark)
        return self._some(
            f"across {mark!r}",
            [r for r in self.requests if r.sent < at and (r.ended is None or r.ended > at)],
        )

    def after(self, mark: str) -> list[SentRequest]:
        """Requests that were sent later. Raises :class:`EmptySlice` if there are none."""
        at = self.at(mark)
        return self._some(f"after {mark!r}", [r for r in self.requests if r.sent >= at])

    def lost(self) -> list[SentRequest]:
        """Requests that never ended."""
        return [r for r in self.requests if r.ended is None]

    @staticmethod
    def _some(slice_: str, found: list[SentRequest]) -> list[SentRequest]:
        if not found:
            raise EmptySlice(
                f"No request of the traffic ran {slice_}, so nothing can be concluded.",
                advice="Let the traffic run longer before and after the change.",
            )
        return found


class Traffic(Background):
    """Sends prompts in turn, ``workers`` at a time, until it is stopped.

    ::

        with Traffic(client, prompts, sampling=greedy(24), workers=4) as traffic:
            traffic.wait_for_answers(8, seconds=60)
            traffic.mark("push starts")
            ...
            traffic.mark("push ends")
            traffic.wait_for_answers(8, seconds=60)
        record = traffic.record()

    Whatever the server answers is an outcome of a request. An error of the harness itself, or the
    caller's own time limit, is none: it ends the traffic, and is raised by
    :meth:`wait_for_answers` and :meth:`record`.

    Args:
        patience: seconds that running requests are given to end when the block is left.

    Raises:
        ValueError: no prompts.
    """

    def __init__(
        self,
        client: Client,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: dict[str, Any],
        workers: int = 4,
        patience: float = 60.0,
    ) -> None:
        if not prompts:
            raise ValueError("traffic needs at least one prompt")
        super().__init__(client, threads=workers, name="traffic")
        self._prompts = [list(prompt) for prompt in prompts]
        self._sampling = sampling
        self._patience = patience
        self._began = time.monotonic()
        self._tag = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._requests: list[SentRequest] = []
        self._marks: list[Mark] = []
        self._is_closed = False

    def start(self) -> Traffic:
        self._began = time.monotonic()
        return super().start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.cancel()

    def mark(self, name: str) -> float:
        """Sets a mark now; returns its time."""
        with self._news:
            at = self._now()
            self._marks.append(Mark(name=name, at=at))
            return at

    def under_way(self) -> int:
        """How many requests have not ended."""
        with self._news:
            return sum(r.ended is None for r in self._requests)

    def wait_for_answers(self, count: int, *, seconds: float) -> None:
        """Waits until ``count`` more requests have ended.

        Raises:
            ServerDied: the server ended.
            HarnessError: they did not end in time.
            Exception: an error of the harness itself that ended the traffic.
        """
        with self._news:
            wanted = self._ended() + count
        came = self._wait_for(lambda: self._ended() >= wanted, seconds)
        self._raise_failure()
        if not came:
            raise HarnessError(
                f"Only {count - (wanted - self._ended())} of {count} background requests were "
                f"answered within {seconds:g} s."
            )

    def stop(self) -> None:
        """Sends no more, waits ``patience`` seconds for running requests, and aborts those that
        still run then: they count as lost. A second call does nothing."""
        if self._is_closed:
            return
        self._stopping.set()
        self._join(self._patience)
        with self._news:
            self._is_closed = True
        self.cancel()

    def record(self) -> TrafficRecord:
        """What has happened so far.

        Raises:
            Exception: an error of the harness itself, or its time limit, ended the traffic: then
                the record is not evidence about the server.
        """
        if not isinstance(self._failure, ServerDied):
            self._raise_failure()
        with self._news:
            return TrafficRecord(
                requests=[r.model_copy() for r in self._requests], marks=list(self._marks)
            )

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _ended(self) -> int:
        return sum(r.ended is not None for r in self._requests)

    def _id(self, request: SentRequest) -> str:
        return f"{self._tag}-{request.number}"

    def _under_way(self) -> list[str]:
        with self._news:
            return [self._id(r) for r in self._requests if r.ended is None]

    def _work(self) -> None:
        while not self._stopping.is_set():
            with self._news:
                number = next(self._numbers)
                prompt = self._prompts[number % len(self._prompts)]
                request = SentRequest(number=number, prompt=prompt, sent=self._now())
                self._requests.append(request)
            failure: BaseException | None = None
            try:
                answer = self._client.generate(
                    prompt,
                    sampling=self._sampling,
                    logprobs=True,
                    request_id=self._id(request),
                )
                found = _seen(answer)
            except BaseException as error:
                found = {"error": error.message if isinstance(error, HarnessError) else repr(error)}
                if isinstance(error, TimeIsOver) or not isinstance(error, RequestFailed):
                    failure = error
            # Under one lock: who sees that the request has ended also sees what ended the traffic.
            with self._news:
                self._end(request, found)
                if failure is not None:
                    self._fail(failure)

    def _end(self, request: SentRequest, found: dict[str, Any]) -> None:
        if self._is_closed:
            return
        for name, value in found.items():
            setattr(request, name, value)
        request.ended = self._now()
        self._news.notify_all()


def _seen(answer: Generation) -> dict[str, Any]:
    """What a request keeps of its answer."""
    return {
        "ids": list(answer.output_ids),
        "logprobs": list(answer.logprobs),
        "finish": answer.finish,
        "weight_version": answer.weight_version,
        "weight_spans": list(answer.weight_spans),
        "cached_tokens": answer.cached_tokens,
    }
