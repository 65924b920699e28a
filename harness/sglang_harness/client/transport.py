"""Sends calls with ``requests``, without interpreting them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import requests
from requests.adapters import HTTPAdapter

from sglang_harness.client.call import Call, Reply
from sglang_harness.errors import NoAnswerInTime, Unreachable


class Transport(Protocol):
    """Sends one call once. Raises ``Unreachable`` and ``NoAnswerInTime``, nothing else."""

    def send(self, call: Call[Any]) -> Reply: ...

    def stream(self, call: Call[Any]) -> Iterator[bytes]:
        """The lines of the answer as they arrive; the first is the status code in digits."""

    def close(self) -> None: ...


class RequestsTransport:
    """Keeps one ``requests`` session per thread, so that many threads may call at once.

    Args:
        base_url: such as ``http://127.0.0.1:30000``.
        api_key: sent as a bearer token.
        connect_timeout: seconds to establish a connection.
        read_timeout: seconds for a whole answer, or between two events of a stream, where
            the call sets none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 120.0,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._local = threading.local()
        self._sessions: list[requests.Session] = []
        self._lock = threading.Lock()

    def send(self, call: Call[Any]) -> Reply:
        started = time.monotonic()
        try:
            with self._request(call, stream=True) as response:
                body = bytearray()
                for piece in response.iter_content(1 << 16):
                    body += piece
                    # requests bounds the time between two pieces, not that of the whole answer.
                    if time.monotonic() - started > self._timeout(call):
                        raise NoAnswerInTime(
                            str(call), f"no complete answer within {self._timeout(call):g} s"
                        )
                return Reply(response.status_code, bytes(body), time.monotonic() - started)
        except requests.RequestException as error:
            raise _translated(call, error, self._timeout(call)) from None

    def stream(self, call: Call[Any]) -> Iterator[bytes]:
        try:
            with self._request(call, stream=True) as response:
                yield str(response.status_code).encode()
                # Pieces as they arrive, not of a fixed size: a token must not wait for the next.
                yield from response.iter_lines(chunk_size=None)
        except requests.RequestException as error:
            raise _translated(call, error, self._timeout(call)) from None

    def close(self) -> None:
        with self._lock:
            sessions, self._sessions = self._sessions, []
            self._local = threading.local()
        for session in sessions:
            session.close()

    def _timeout(self, call: Call[Any]) -> float:
        return self._read_timeout if call.timeout is None else call.timeout

    def _request(self, call: Call[Any], *, stream: bool) -> requests.Response:
        return self._session().request(
            call.method,
            self._base_url + call.path,
            json=None if call.content is not None else call.body,
            # Its length is known, so it is sent piece by piece with Content-Length, not chunked.
            data=call.content,
            headers={"Content-Type": "application/json"} if call.content is not None else None,
            params=list(call.query),
            timeout=(self._connect_timeout, self._timeout(call)),
            stream=stream,
        )

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = requests.Session()
            # Proxies and .netrc of this machine are not meant for a server under test.
            session.trust_env = False
            session.headers.update(self._headers)
            session.mount("http://", HTTPAdapter(pool_maxsize=4, max_retries=0))
            self._local.session = session
            with self._lock:
                self._sessions.append(session)
        return session


#: What ``requests`` reports, in plain English.
_CAUSES = {
    "Connection refused": "connection refused",
    "Connection reset": "connection reset",
    "RemoteDisconnected": "the connection was closed without an answer",
    "timed out": "timed out",
}


def _translated(
    call: Call[Any], error: requests.RequestException, timeout: float
) -> Unreachable | NoAnswerInTime:
    if isinstance(error, requests.ReadTimeout) or "Read timed out" in str(error):
        return NoAnswerInTime(str(call), f"no answer within {timeout:g} s")
    reason = str(error.args[0] if error.args else error)
    for cause, plain in _CAUSES.items():
        if cause in reason:
            reason = plain
            break
    return Unreachable(str(call), reason)
