"""A call as data, and the pure functions around it: errors, retries, time-outs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sglang_harness.errors import BadAnswer, NoAnswerInTime, Refused, RequestFailed, Unreachable

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """What came back over HTTP, before anybody has understood it."""

    status: int
    body: bytes
    seconds: float
    """From the first byte sent to the last byte received."""

    def json(self) -> Any:
        return json.loads(self.body)


class Content(Protocol):
    """A body of JSON that is too large to be held whole: sent piece by piece."""

    def __len__(self) -> int:
        """Bytes of all pieces."""

    def __iter__(self) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request to a server, and how to read its answer.

    Attributes:
        read: turns a successful reply into the answer; raises ``ValueError``, ``KeyError`` or
            ``TypeError`` for an answer that the call cannot mean.
        repeatable: sending it twice does no more than sending it once, so that a lost reply
            may be answered by sending it again.
        timeout: seconds for the answer; ``None``: the client's.
        changes: leaves the server other than it was, for those who use it too.
        content: the body where it is no dictionary; then ``body`` is not sent.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    body: dict[str, Any] | None = None
    query: tuple[tuple[str, str], ...] = ()
    repeatable: bool = False
    timeout: float | None = None
    changes: bool = False
    content: Content | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def understand(call: Call[T], reply: Reply) -> T:
    """The answer to ``call``.

    Raises:
        Refused: the server said no.
        BadAnswer: it said yes with something that cannot be read.
    """
    if not 200 <= reply.status < 300:
        reason, kind = error_words(reply.body)
        raise Refused(str(call), reply.status, reason, kind)
    try:
        return call.read(reply)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        shown = reply.body[:300].decode(errors="replace")
        raise BadAnswer(str(call), f"an answer that cannot be read ({error!r}): {shown}") from error


def error_words(body: bytes) -> tuple[str, str]:
    """The server's reason and its type of error, from any of SGLang's shapes.

    SGLang 0.5.23 answers errors as ``{"error": {"message"}}``, ``{"error": "words"}``,
    ``{"object": "error", "message"}``, ``{"success": false, "message"}`` (of adapters:
    ``"error_message"``) and as plain text.
    """
    text = body.decode(errors="replace").strip()
    try:
        data = json.loads(text)
    except ValueError:
        return text[:1000] or "no words", ""
    if isinstance(data, dict):
        inner = data.get("error", data)
        if isinstance(inner, str):
            return inner[:1000], ""
        if isinstance(inner, dict):
            named = (inner.get(key) for key in ("message", "error_message", "detail"))
            words = next(filter(None, named), inner)
            return str(words)[:1000], str(inner.get("type") or inner.get("code") or "")
    return text[:1000], ""


@dataclass(frozen=True)
class Attempt:
    """One try that failed and was followed by another; kept as evidence."""

    call: str
    number: int
    reason: str


@dataclass(frozen=True)
class RetryPolicy:
    """When a failed call is sent again. Off (``attempts=1``) wherever checks look.

    Only repeatable calls, and only where no answer came: an answer, even an error, is an
    answer. Delays double from ``first_delay`` seconds, up to ``longest_delay``.
    """

    attempts: int = 1
    first_delay: float = 0.2
    longest_delay: float = 5.0

    def delay(self, call: Call[Any], failed: int, error: RequestFailed) -> float | None:
        """Seconds to wait after the ``failed``-th try, ``None`` to give up."""
        if failed >= self.attempts or not call.repeatable:
            return None
        busy = isinstance(error, Refused) and error.status == 503
        if not busy and not isinstance(error, Unreachable | NoAnswerInTime):
            return None
        return float(min(self.longest_delay, self.first_delay * 2.0 ** (failed - 1)))
