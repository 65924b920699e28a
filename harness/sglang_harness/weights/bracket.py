"""The bracket around the buckets of a push: pause, flush, begin ... end, flush, continue.

What was opened is closed, in the reverse order, whatever happened in between and whatever bound the
caller set (``client.within``). Trainers leave a server paused with the session open when one
bucket is refused, and then every request hangs (SGLang 0.5.23).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

from sglang_harness.client import Client, calls
from sglang_harness.client.call import Call
from sglang_harness.errors import (
    HarnessError,
    NoAnswerInTime,
    Refused,
    ServerDied,
    TimeIsOver,
)
from sglang_harness.weights.report import Step

Pause = Literal["abort", "retract", "in_place"]

#: Seconds that each closing call may take where the server has already left one unanswered.
CLOSES_WITHIN = 10.0

#: Seconds from a pause until no request runs any more.
DRAINS_WITHIN = 5.0


class Session:
    """One bracket, as a context. Entering raises what the first refused call raised, after
    closing what was open by then; leaving never hides an error and never raises one of its own.

    Args:
        pause: how generation is stopped; ``None``: it is not, and requests may be answered by
            weights that are half old and half new.
        flush: empty the prefix cache before and after: what was computed with old weights may
            not be served with new ones.
        bracket: the server has SGLang's weight-update session, and the route needs it.
        timeout: seconds for each call.

    Attributes:
        steps: every call with its time and outcome.
        left_open: what could not be closed; empty when the server is as it was.
        closing_errors: what the closing calls raised.
    """

    def __init__(
        self,
        client: Client,
        *,
        pause: Pause | None,
        flush: bool,
        bracket: bool,
        timeout: float,
    ) -> None:
        self._client = client
        self._pause = pause
        self._flush = flush
        self._bracket = bracket
        self._timeout = timeout
        self._started = time.monotonic()
        self._paused = False
        self._begun = False
        self._silent = False
        self._dead = False
        self.steps: list[Step] = []
        self.left_open: list[str] = []
        self.closing_errors: list[HarnessError] = []

    def restart_clock(self, now: float) -> None:
        """From when on the times of steps are counted (``time.monotonic()``)."""
        self._started = now

    def __enter__(self) -> Session:
        try:
            if self._pause is None:
                self._leave_out("pause", "not asked for")
            else:
                # Set before the answer: a lost one may have been obeyed.
                self._paused = True
                mode = self._pause
                self.step("pause", lambda: self._send(calls.pause(mode)))
            if self._flush:
                self.step("flush", self._empty_cache)
            else:
                self._leave_out("flush", "not asked for")
            if self._bracket:
                self.step("begin", self._begin)
            else:
                self._leave_out("begin", "the route or the server has no session")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def step(self, name: str, do: Callable[[], object]) -> None:
        """One call, recorded; raises what it raises."""
        at = time.monotonic()
        try:
            do()
        except BaseException as error:
            # The caller's own bound says nothing of the server: it may be slow, and need its time.
            if isinstance(error, NoAnswerInTime) and not isinstance(error, TimeIsOver):
                self._silent = True
            if isinstance(error, ServerDied):
                self._dead = True
            self._record(name, at, "failed", str(error) or type(error).__name__)
            raise
        self._record(name, at, "done")

    def _record(
        self, name: str, at: float, outcome: Literal["done", "failed"], detail: str = ""
    ) -> None:
        self.steps.append(
            Step(
                name=name,
                at=at - self._started,
                seconds=time.monotonic() - at,
                outcome=outcome,
                detail=detail,
            )
        )

    def _leave_out(self, name: str, why: str) -> None:
        at = time.monotonic() - self._started
        self.steps.append(Step(name=name, at=at, seconds=0.0, outcome="left out", detail=why))

    def _send(self, call: Call[Any]) -> None:
        timeout = min(self._timeout, CLOSES_WITHIN) if self._silent else self._timeout
        self._client.send(replace(call, timeout=timeout))

    def _begin(self) -> None:
        # A lost answer may have opened it: then it is ended. A refusal has not, and a session
        # that is open then belongs to another client.
        self._begun = True
        try:
            self._send(calls.begin_weight_update())
        except HarnessError as error:
            self._begun = isinstance(error, NoAnswerInTime)
            raise

    def _close(self) -> None:
        with self._client.cleanup():
            if self._begun:
                self._begun = False
                end = calls.end_weight_update()
                self._try("end", lambda: self._send(end), "a weight-update session is open")
            if self._flush and not self._dead and not self._silent:
                # Not paused, a request may have filled the cache in between.
                self._try("flush again", self._empty_cache, "")
            if self._paused:
                self._paused = False
                self._try("continue", lambda: self._send(calls.resume()), "generation is paused")

    def _empty_cache(self) -> None:
        if not self._paused or self._pause != "retract":
            self._send(calls.flush_cache())
            return
        # Retracted requests never end while it is paused, so the server is not asked to wait
        # for them; what still ends is the batch that ran when the pause came.
        until = time.monotonic() + DRAINS_WITHIN
        while True:
            try:
                self._send(calls.flush_cache(wait=0))
                return
            except Refused:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def _try(self, name: str, do: Callable[[], object], otherwise: str) -> None:
        if self._dead:
            self._leave_out(name, "the server is dead")
            return
        try:
            self.step(name, do)
        except HarnessError as error:
            self.closing_errors.append(error)
            if otherwise:
                self.left_open.append(otherwise)
