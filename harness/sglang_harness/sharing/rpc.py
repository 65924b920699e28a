"""Questions from one process of this user to another, over a Unix socket in a private folder.

The standard library's ``multiprocessing.managers`` does the same without a time-out, and hands on
exceptions by pickling them, which those of this package do not survive.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from sglang_harness.errors import HarnessError

#: Seconds for an answer that needs no server to be started, ended or copied to.
ANSWERS_WITHIN = 60.0


@dataclass(frozen=True)
class RpcClient:
    """Where questions are answered.

    Attributes:
        socket: path of the socket.
        key: in hexadecimal digits; each side proves to the other that it has it.
    """

    socket: str
    key: str = field(repr=False)

    def ask(self, question: str, *arguments: Any, timeout: float | None = ANSWERS_WITHIN) -> Any:
        """The answer to a question. It and the arguments have to be picklable.

        Args:
            timeout: seconds to wait for the answer; ``None`` waits for as long as the other
                process lives.

        Raises:
            HarnessError: the other side's own error, that it has ended, or that it did not answer
                in time.
        """
        key = bytes.fromhex(self.key)
        try:
            with _connected(self.socket) as connection:
                # Its challenge comes first, so that a process that is stuck is noticed here.
                if not connection.poll(timeout):
                    raise TimeoutError
                answer_challenge(connection, key)
                deliver_challenge(connection, key)
                connection.send((question, arguments))
                if not connection.poll(timeout):
                    raise TimeoutError
                succeeded, answer = connection.recv()
        except TimeoutError:
            raise HarnessError(
                f"The process that owns the shared server did not answer {question!r} within "
                f"{timeout:g} s.",
                advice="It may be stuck; interrupt the run and start it again.",
            ) from None
        except (OSError, EOFError, AuthenticationError) as error:
            raise HarnessError(
                f"The process that owns the shared server does not answer ({_reason(error)}).",
                advice="It has ended or was killed; start the tests again.",
            ) from None
        if not succeeded:
            message, advice, log = answer
            raise HarnessError(message, advice=advice, log=log)
        return answer


def listener(path: str) -> socket.socket:
    """A new socket at ``path`` that listens."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(path) as address:
        made.bind(address)
    made.listen(128)
    return made


def _connected(path: str) -> Connection:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made, _short(path) as address:
        made.connect(address)
        return Connection(made.detach())


@contextmanager
def _short(path: str) -> Iterator[str]:
    """The same socket by a path that the kernel takes: at most 107 bytes (unix(7))."""
    if len(os.fsencode(path)) <= 100:
        yield path
        return
    folder = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{Path(path).name}"
    finally:
        os.close(folder)


def _reason(error: BaseException) -> str:
    return str(error) or "it closed the connection"


class RpcServer:
    """Answers each connection in a thread of its own, its authentication included: a client that
    connects and says nothing holds up nobody else.

    Args:
        listener: a Unix socket that listens; closed by :meth:`close`.
        answers: what can be asked, with the function that answers it.
    """

    def __init__(
        self, listener: socket.socket, key: str, answers: Mapping[str, Callable[..., Any]]
    ) -> None:
        self._listener = listener
        self._key = bytes.fromhex(key)
        self._answers = answers
        threading.Thread(target=self._accept, name="sglang-rpc", daemon=True).start()

    def close(self) -> None:
        """New connections are refused."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            connection = Connection(accepted.detach())
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with connection, suppress(OSError, EOFError, AuthenticationError):
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            question, arguments = connection.recv()
            try:
                connection.send((True, self._answers[question](*arguments)))
            except HarnessError as error:
                connection.send((False, (error.message, error.advice, error.log)))
            except Exception as error:
                connection.send((False, (f"{type(error).__name__}: {error}", "", "")))
