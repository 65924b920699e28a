"""Requests in the background while something changes, each with its times and its outcome.

A mark is set where the change begins and where it ends. Afterwards requests are asked for by
slice: those that ended before it, those that ran across it, those that began after it. A slice
that is empty is an error: nothing can be concluded from requests that were never sent.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict

from sglang_harness.client import Client
from sglang_harness.errors import HarnessError, RequestFailed, ServerDied


class EmptySlice(HarnessError):
    """A question about requests of which there were none."""


class Request(BaseModel):
    """One request of the traffic. Times in seconds since the traffic began.

    Attributes:
        ended: when its answer was whole, or its error came; ``None``: it never ended.
        finish: SGLang's reason, such as ``length`` or ``abort``; empty without an answer.
        error: what came in place of an answer.
        weight_version: the label on the answer.
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
    """Which tokens which label generated, where the server states it: label, first, end."""
    cached_tokens: int = 0


class Mark(BaseModel):
    """A moment with a name, in seconds since the traffic began."""

    model_config = ConfigDict(extra="forbid")

    name: str
    at: float


class TrafficRecord(BaseModel):
    """All of it, in the order of sending. Written into evidence as it is."""

    model_config = ConfigDict(extra="forbid")

    requests: list[Request]
    marks: list[Mark]

    def at(self, mark: str) -> float:
        """Raises :class:`KeyError` for a mark that was not set."""
        for each in self.marks:
            if each.name == mark:
                return each.at
        raise KeyError(f"no mark {mark!r} was set")

    def before(self, mark: str) -> list[Request]:
        """Those that had ended by then."""
        at = self.at(mark)
        return self._some(
            f"before {mark!r}", [r for r in self.requests if r.ended is not None and r.ended <= at]
        )

    def across(self, mark: str) -> list[Request]:
        """Those that were under way at that moment."""
        at = self.at(mark)
        return self._some(
            f"across {mark!r}",
            [r for r in self.requests if r.sent < at and (r.ended is None or r.ended > at)],
        )

    def after(self, mark: str) -> list[Request]:
        """Those that were sent later."""
        at = self.at(mark)
        return self._some(f"after {mark!r}", [r for r in self.requests if r.sent >= at])

    def lost(self) -> list[Request]:
        """Those that never ended."""
        return [r for r in self.requests if r.ended is None]

    @staticmethod
    def _some(words: str, found: list[Request]) -> list[Request]:
        if not found:
            raise EmptySlice(
                f"No request of the traffic lies {words}, so nothing can be said of them.",
                advice="Let it run longer around the change.",
            )
        return found


class Traffic:
    """Sends prompts in turn, ``workers`` at a time, until it is stopped.

    ::

        with Traffic(client, prompts, sampling=greedy(24), workers=4) as traffic:
            traffic.wait_for_answers(8, seconds=60)
            traffic.mark("push starts")
            ...
            traffic.mark("push ends")
            traffic.wait_for_answers(8, seconds=60)
        record = traffic.record()

    Args:
        patience: seconds that requests under way are given when it is stopped.
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
        self._client = client
        self._prompts = [list(prompt) for prompt in prompts]
        self._sampling = sampling
        self._patience = patience
        self._began = time.monotonic()
        self._numbers = itertools.count()
        self._news = threading.Condition()
        self._stopping = threading.Event()
        self._requests: list[Request] = []
        self._marks: list[Mark] = []
        self._dead: ServerDied | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"traffic-{n}", daemon=True)
            for n in range(workers)
        ]

    def __enter__(self) -> Traffic:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def mark(self, name: str) -> float:
        """Sets a mark now; returns its time."""
        with self._news:
            at = self._now()
            self._marks.append(Mark(name=name, at=at))
            return at

    def under_way(self) -> int:
        """How many requests run now."""
        with self._news:
            return sum(r.ended is None for r in self._requests)

    def wait_for_answers(self, count: int, *, seconds: float) -> None:
        """Waits until ``count`` more requests have ended.

        Raises:
            ServerDied: the server ended.
            HarnessError: they did not end in time.
        """
        with self._news:
            wanted = self._ended() + count
            self._news.wait_for(lambda: self._dead or self._ended() >= wanted, seconds)
            if self._dead is not None:
                raise self._dead
            if self._ended() < wanted:
                raise HarnessError(
                    f"Of {count} answers to background requests "
                    f"{count - (wanted - self._ended())} came within {seconds:g} s."
                )

    def stop(self) -> None:
        """Sends no more, and waits for what is under way. Again: nothing."""
        self._stopping.set()
        until = time.monotonic() + self._patience
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))

    def record(self) -> TrafficRecord:
        """What has happened so far."""
        with self._news:
            return TrafficRecord(
                requests=[r.model_copy() for r in self._requests], marks=list(self._marks)
            )

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _ended(self) -> int:
        return sum(r.ended is not None for r in self._requests)

    def _work(self) -> None:
        while not self._stopping.is_set() and self._dead is None:
            with self._news:
                number = next(self._numbers)
                prompt = self._prompts[number % len(self._prompts)]
                request = Request(number=number, prompt=prompt, sent=self._now())
                self._requests.append(request)
            found: dict[str, Any] = {}
            try:
                answer = self._client.generate(prompt, sampling=self._sampling, logprobs=True)
                found = {
                    "ids": list(answer.output_ids),
                    "logprobs": list(answer.logprobs),
                    "finish": answer.finish,
                    "weight_version": answer.weight_version,
                    "weight_spans": [tuple(span) for span in answer.weight_spans],
                    "cached_tokens": answer.cached_tokens,
                }
            except ServerDied as error:
                self._dead = error
                found = {"error": error.message}
            except RequestFailed as error:
                found = {"error": error.message}
            with self._news:
                for name, value in found.items():
                    setattr(request, name, value)
                request.ended = self._now()
                self._news.notify_all()
