"""A real HTTP server on loopback that answers as a test tells it to.

No double of ``requests`` or of the client: what is tested sends over a socket, and everything
that can go wrong on one can be written down here, one :class:`Answer` a request.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any, Literal

from sglang_harness.runtime.death import Death, DeathWatch, Unknown

#: No wait in a test is longer than this, whatever goes wrong.
BOUND = 10.0


Piece = bytes | float | threading.Event


@dataclass(frozen=True)
class Answer:
    """What is done with one request.

    Attributes:
        body: bytes and text are sent as they are, anything else as JSON.
        pieces: sent one by one as chunks of a stream, in place of ``body``; an event in the
            list is waited for, a number is a pause in seconds.
        delay: seconds before the answer; over at once when the server is closed.
        hold: an event that is waited for before the answer.
        before: called when the request has been read, before anything else is done.
        after: called when the answer has been sent.
        ending: ``whole``; ``silence`` closes the connection in place of an answer; ``cut``
            and ``reset`` break it before the end of the body that was promised (``reset``
            as a killed process does); ``hang up`` closes it after the whole answer, without
            having said so.
    """

    status: int = 200
    body: Any = b""
    content_type: str = "application/json"
    pieces: tuple[Piece, ...] | None = None
    delay: float = 0.0
    hold: threading.Event | None = None
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    ending: Literal["whole", "silence", "cut", "reset", "hang up"] = "whole"

    def payload(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, str):
            return self.body.encode()
        return json.dumps(self.body, ensure_ascii=False).encode()


def event(data: Any) -> bytes:
    """One server-sent event as SGLang writes it."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


DONE = event("[DONE]")


@dataclass(frozen=True)
class Seen:
    """A request that arrived."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes
    at: float
    connection: int
    """Which connection it came over: equal for requests that shared one."""

    def json(self) -> Any:
        return json.loads(self.body)


Script = dict[str, "Answer | list[Answer] | Callable[[Seen], Answer]"]

NOT_FOUND = Answer(404, {"detail": "Not Found"})


class _Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    owner: ScriptedServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the play; the rest must not go unseen."""
        import sys

        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.owner.disconnected.set()
        elif error is not None:
            self.owner.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written apart: with it, each answer would wait 40 ms for the client.
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.owner = self.server.owner
        self.number = self.owner._opened(self.connection)

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        path, _, query = self.path.partition("?")
        seen = Seen(
            self.command,
            path,
            query,
            {name.lower(): value for name, value in self.headers.items()},
            self.rfile.read(length),
            time.monotonic(),
            self.number,
        )
        self._play(self.owner._next(seen))

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PROPFIND = _any  # noqa: N815

    def _play(self, answer: Answer) -> None:
        if answer.before is not None:
            answer.before()
        if answer.hold is not None:
            self._wait_for(answer.hold)
        if answer.delay:
            self.owner.closing.wait(answer.delay)
        if answer.ending == "silence" or self.owner.closing.is_set():
            self._hang_up()
            return
        if answer.pieces is not None:
            self._stream(answer, answer.pieces)
        else:
            self._whole(answer)
        if answer.ending != "whole":
            self._hang_up(reset=answer.ending == "reset")
        if answer.after is not None:
            answer.after()

    def _whole(self, answer: Answer) -> None:
        payload = answer.payload()
        missing = 100 if answer.ending in ("cut", "reset") else 0
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(payload) + missing))
        self.end_headers()
        self.wfile.write(payload)

    def _stream(self, answer: Answer, pieces: tuple[Piece, ...]) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            if isinstance(piece, threading.Event):
                self._wait_for(piece)
            elif isinstance(piece, float):
                self.owner.closing.wait(piece)
            else:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if answer.ending == "whole":
            self.wfile.write(b"0\r\n\r\n")

    def _wait_for(self, awaited: threading.Event) -> None:
        end = time.monotonic() + BOUND
        while not self.owner.closing.is_set() and time.monotonic() < end:
            if awaited.wait(0.02):
                return

    def _hang_up(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


class ScriptedServer:
    """Answers each route with its next :class:`Answer`; the last one is given for ever.

    ::

        with ScriptedServer({"GET /ready": [Answer(503), Answer(200)]}) as server:
            ...
            assert [r.path for r in server.seen] == [...]

    Args:
        script: answers by ``METHOD /path``, or what makes one from a request; a route that
            is not there is answered 404.
        listening: ``False``: the port is taken, and connections to it are refused until
            :meth:`listen`.

    Attributes:
        seen: the requests, in the order of their arrival.
        disconnected: set when a client went away under an answer.
    """

    def __init__(self, script: Script, *, listening: bool = True) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.errors: list[BaseException] = []
        self.closing = threading.Event()
        self.disconnected = threading.Event()
        self._lock = threading.Lock()
        self._given: dict[str, int] = {}
        self._connections: list[socket.socket] = []
        self._thread: threading.Thread | None = None
        self._server = _Server(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self._server.owner = self
        self._server.server_bind()
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        if listening:
            self.listen()

    def listen(self) -> None:
        self._server.server_activate()
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def asked(self, route: str) -> list[Seen]:
        """The requests for ``METHOD /path``."""
        with self._lock:
            return [s for s in self.seen if f"{s.method} {s.path}" == route]

    @property
    def connections(self) -> int:
        """How many connections were opened so far."""
        with self._lock:
            return len(self._connections)

    def _opened(self, connection: socket.socket) -> int:
        with self._lock:
            self._connections.append(connection)
            return len(self._connections)

    def _next(self, seen: Seen) -> Answer:
        route = f"{seen.method} {seen.path}"
        with self._lock:
            self.seen.append(seen)
            scripted = self.script.get(route, NOT_FOUND)
            number = self._given.get(route, 0)
            self._given[route] = number + 1
        if isinstance(scripted, Answer):
            return scripted
        if callable(scripted):
            return scripted(seen)
        return scripted[min(number, len(scripted) - 1)]

    def close(self) -> None:
        self.closing.set()
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join(BOUND)
        self._server.server_close()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        assert not self.errors, f"the scripted server itself failed: {self.errors}"

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


A_DEATH = Death(
    exit_code=137,
    out_of_memory=False,
    cause="",
    exception="IndexError: index out of range in self",
    last_words=("Scheduler hit an exception", "IndexError: index out of range in self"),
)


@dataclass
class Mortal:
    """Something that lives until :meth:`die` is called, and the watch that notices."""

    death: Death | Unknown = A_DEATH
    _end: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.watch = DeathWatch(self._wait)

    def _wait(self) -> Death | Unknown:
        self._end.wait(6 * BOUND)
        return self.death

    def die(self) -> None:
        self._end.set()
