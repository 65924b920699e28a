"""The trainer's side of the routes that need a sidecar: what the harness sees of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import PeerFailed
from sglang_harness.runtime import Running, Sidecar

__all__ = ["Peer"]

#: Seconds for a Python to start on a busy machine.
STARTS_WITHIN = 120.0


def script() -> str:
    """The sender's program as text, for any Python with torch."""
    return (Path(__file__).parent / "sender.py").read_text(encoding="utf-8")


class Peer:
    """One sender in a sidecar of a server. One order at a time.

    Raises:
        EngineError: this server cannot have a sidecar.
        PeerFailed: it did not start.
    """

    def __init__(self, running: Running) -> None:
        self._sidecar: Sidecar = running.start_sidecar(script())
        self.name = self._sidecar.name
        self.ended = False
        self._owed: str | None = None
        try:
            self._owed = "start"
            self.about = self.answer(STARTS_WITHIN)
        except BaseException:
            self.end()
            raise

    @property
    def busy(self) -> bool:
        """Whether an order has no answer yet. Then no other can be given."""
        return self._owed is not None

    def tell(self, do: str, **order: Any) -> None:
        """Gives an order; :meth:`answer` waits for its result."""
        if self._owed is not None:
            raise PeerFailed(f"'{do}' was not sent, because '{self._owed}' has no answer yet")
        self._owed = do
        self._sidecar.write(json.dumps({"do": do, **order}).encode())

    def answer(self, timeout: float) -> dict[str, Any]:
        """The answer to the last order.

        Raises:
            PeerFailed: the order failed, the peer ended, its answer cannot be read, or it took
                longer than ``timeout`` seconds; after the last it can be used no more.
        """
        started, do = time.monotonic(), self._owed
        try:
            line = self._sidecar.read(timeout)
        except TimeoutError:
            raise PeerFailed(f"'{do}' took longer than {timeout:g} s", self.words()) from None
        if line is None:
            seconds = time.monotonic() - started
            raise PeerFailed(f"it ended after {seconds:.1f} s of '{do}'", self.words())
        self._owed = None
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            said = line[:100].decode(errors="replace")
            raise PeerFailed(
                f"'{do}' was answered with {said!r}, expected a JSON object", self.words()
            )
        if "error" in answer:
            raise PeerFailed(f"'{do}' failed: {answer['error']}", self.words())
        return answer

    def ask(self, do: str, *, timeout: float, **order: Any) -> dict[str, Any]:
        """:meth:`tell` and :meth:`answer`."""
        self.tell(do, **order)
        return self.answer(timeout)

    def peak_bytes(self) -> int:
        """The most that it held since it imported something, above what the imports hold.

        Raises:
            PeerFailed: it does not answer.
        """
        answer = self.ask("memory", timeout=10.0)
        try:
            return int(answer["peak_bytes"])
        except (KeyError, TypeError, ValueError):
            raise PeerFailed(f"'memory' was answered without peak_bytes: {answer}") from None

    def words(self) -> str:
        """The end of its error output."""
        return self._sidecar.words()

    def end(self) -> list[str]:
        """Ends it; returns what of it could not be removed. Again: nothing."""
        if self.ended:
            return []
        self.ended = True
        with Teardown() as down:
            if self._owed is None:
                down.collect("closing the peer", self._close)
            down.collect(f"peer {self.name}", self._sidecar.end)
        return down.failures

    def _close(self) -> list[str]:
        names = self.ask("close", timeout=10.0)["left"]
        return [f"/dev/shm/{name}" for name in names]  # noqa: S108
