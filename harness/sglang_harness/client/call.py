"""A call as data, and the pure functions that read its reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sglang_harness.errors import BadAnswer, Refused

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """What came back over HTTP, not yet interpreted; of a stream, the data of one event."""

    status: int
    body: bytes
    seconds: float
    """From the first byte sent to the last byte received; for an event, to its arrival."""

    def json(self) -> Any:
        return json.loads(self.body)


class Content(Protocol):
    """A JSON body that is too large to be held in memory as a whole: sent piece by piece."""

    def __len__(self) -> int:
        """Size of all pieces together, in bytes."""

    def __iter__(self) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request to a server, and how to read its answer. It is sent once, never again.

    Attributes:
        read: turns a successful reply into the answer; raises ``ValueError``, ``KeyError``,
            ``TypeError`` or ``IndexError`` for a reply that is not a valid answer to this call.
            For a streamed call it reads one event.
        timeout: seconds for the answer, or between two events of a stream; ``None``: the
            client's.
        changes: modifies the server for everyone who uses it.
        content: the body where it is not a dictionary; then ``body`` is not sent.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    body: dict[str, Any] | None = None
    query: tuple[tuple[str, str], ...] = ()
    timeout: float | None = None
    changes: bool = False
    content: Content | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


#: What reading an answer raises that is none: also a list in place of an object, an infinite
#: number, and brackets a hundred thousand deep.
UNREADABLE = (
    *(ValueError, KeyError, TypeError, IndexError),
    *(AttributeError, OverflowError, RecursionError),
)


def understand(call: Call[T], reply: Reply) -> T:
    """The answer to ``call``.

    Raises:
        Refused: the server answered with an error status.
        BadAnswer: the status is a success, but the reply cannot be read.
    """
    if not 200 <= reply.status < 300:
        raise refusal(call, reply.status, reply.body)
    try:
        return call.read(reply)
    except UNREADABLE as error:
        shown = reply.body[:300].decode(errors="replace")
        raise BadAnswer(str(call), f"the answer cannot be read ({error!r}): {shown}") from error


def refusal(call: Call[Any], status: int, body: bytes) -> Refused:
    """The error for an answer with an error in ``body``."""
    reason, kind = _reason(body)
    return Refused(str(call), status, reason, kind)


def _reason(body: bytes) -> tuple[str, str]:
    """The server's message and its type of error, from any of SGLang's shapes.

    SGLang 0.5.23 answers errors as ``{"error": {"message"}}``, ``{"error": "message"}``,
    ``{"object": "error", "message"}``, ``{"success": false, "message"}`` (of adapters:
    ``"error_message"``) and as plain text.
    """
    text = body.decode(errors="replace").strip()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return text[:1000] or "(empty body)", ""
    if isinstance(data, dict):
        inner = data.get("error", data)
        if isinstance(inner, str):
            return inner[:1000], ""
        if isinstance(inner, dict):
            named = (inner.get(key) for key in ("message", "error_message", "detail"))
            message = next(filter(None, named), inner)
            return str(message)[:1000], str(inner.get("type") or inner.get("code") or "")
    return text[:1000], ""
