"""Questions from one process of this user to another, over a socket in a private folder.

Nothing heavy is imported here: the answering object is made when the first question comes.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from sglang_harness.errors import HarnessError


@dataclass(frozen=True)
class Counter:
    """Where questions are answered."""

    socket: str
    key: str = field(repr=False)

    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer to a question, which must be one that can be pickled, as its arguments.

        Raises:
            HarnessError: the other side's own error, or that it has gone.
        """
        try:
            with Client(self.socket, "AF_UNIX", authkey=bytes.fromhex(self.key)) as connection:
                connection.send((question, arguments))
                well, answer = connection.recv()
        except (OSError, EOFError, AuthenticationError) as error:
            raise HarnessError(
                f"The process that keeps the shared server does not answer ({error}).",
                advice="It has ended, or was killed; start the tests again.",
            ) from None
        if not well:
            message, advice, log = answer
            raise HarnessError(message, advice=advice, log=log)
        return answer


class OpenCounter:
    """Answers questions, each in a thread of its own, with the method of that name.

    Args:
        make: makes the object that answers; called once, at the first question.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make
        self._folder = Path(tempfile.mkdtemp(prefix="sglang-harness-counter-"))
        key = secrets.token_hex(32)
        self.counter = Counter(str(self._folder / "socket"), key)
        self._listener = Listener(self.counter.socket, "AF_UNIX", authkey=bytes.fromhex(key))
        self._lock = threading.Lock()
        self._answering: object | None = None
        self._closed = False
        threading.Thread(target=self._serve, name="sglang-counter", daemon=True).start()

    @property
    def answering(self) -> object | None:
        """Whoever answers; ``None`` where nothing was ever asked."""
        return self._answering

    def close(self) -> None:
        """From now on nobody is answered."""
        self._closed = True
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # somebody without the key, or who went away
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with connection, suppress(OSError, EOFError):
            question, arguments = connection.recv()
            try:
                with self._lock:
                    if self._answering is None:
                        self._answering = self._make()
                answer = getattr(self._answering, question)(*arguments)
            except HarnessError as error:
                connection.send((False, (error.message, error.advice, error.log)))
            except Exception as error:
                connection.send((False, (f"{type(error).__name__}: {error}", "", "")))
            else:
                connection.send((True, answer))
