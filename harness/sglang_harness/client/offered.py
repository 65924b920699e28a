"""Which routes a server offers: asked of it, never guessed from its version."""

from __future__ import annotations

from sglang_harness.client import calls
from sglang_harness.client.call import Call
from sglang_harness.client.methods import Sender
from sglang_harness.errors import BadAnswer, Refused

#: Methods that HTTP defines as safe and that no route of SGLang has. FastAPI and axum answer 405
#: where the path is known and 404 where it is not, and run nothing (seen with FastAPI 0.165;
#: SGLang's own server and its Rust server use these two). OPTIONS needs no API key in SGLang
#: 0.5.23; PROPFIND is for servers that answer every OPTIONS themselves, as CORS layers do.
SAFE = ("OPTIONS", "PROPFIND")

#: What a server answers to this shows whether its answers tell anything.
UNKNOWN_PATH = "/sglang-harness/no-such-route"

#: Statuses that say nothing about a route: a wrong key, too many requests, a gateway without its
#: server, a server that is starting or shutting down.
SAY_NOTHING = frozenset({401, 429, 502, 503, 504})


class OfferedRoutes:
    """The routes of one server, each asked for once.

    They are read from ``/openapi.json``. A server that does not serve it (see
    :func:`calls.routes`) is asked for each path with a method that runs nothing. Then a path
    counts with all its methods: a list of methods in a 405 can be incomplete, as FastAPI names
    those of one function alone. Where the server's answers tell nothing, every route counts as
    offered: the check asks, and the server's own refusal is judged.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._is_read = False
        self._listed: frozenset[tuple[str, str]] | None = None
        self._method: str | None = None
        self._has_method = False
        self._paths: dict[str, bool] = {}

    def has(self, method: str, path: str) -> bool:
        """Raises what :meth:`Client.send` raises, but for a list that is not there."""
        listed = self._list()
        if listed is not None:
            return (method.upper(), path) in listed
        if path not in self._paths:
            safe = self._safe_method()
            self._paths[path] = safe is None or self._status(safe, path) != 404
        return self._paths[path]

    def _list(self) -> frozenset[tuple[str, str]] | None:
        if not self._is_read:
            try:
                self._listed = self._sender.send(calls.routes())
            except Refused as error:
                if error.status in SAY_NOTHING:
                    raise
            except BadAnswer:
                # A proxy's own page, say.
                pass
            self._is_read = True
        return self._listed

    def _safe_method(self) -> str | None:
        """A method whose answer tells an unknown path from a known one; ``None``: there is
        none."""
        if not self._has_method:
            telling = (safe for safe in SAFE if self._status(safe, UNKNOWN_PATH) == 404)
            self._method = next(telling, None)
            self._has_method = True
        return self._method

    def _status(self, method: str, path: str) -> int:
        try:
            self._sender.send(Call(method, path, lambda _: None, timeout=10.0))
        except Refused as error:
            if error.status in SAY_NOTHING:
                raise
            return error.status
        return 200
