"""The process that owns the server of xdist's workers, and the controller's end of it.

A process of its own, because a start takes minutes, and only a main thread can be interrupted
wherever it waits: the controller's own waits for its workers. One signal ends the process with
everything that it started; so does the end of the controller, however that came.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from sglang_harness._base import temporary
from sglang_harness._base.temporary import temporary_folder
from sglang_harness.sharing.rpc import RpcClient, listener
from sglang_harness.sharing.tally import Tally

#: Seconds for the end of the server. One on a GPU is asked to end and gets time for it.
ENDS_WITHIN = 120.0

#: The modules of a test project are where the controller finds them: what workers send is made
#: of them.
_PROGRAM = """
import json, sys
told = json.loads(sys.stdin.readline())
sys.path[:] = told.pop("path")
from sglang_harness.sharing.owner_process import main
main(**told)
"""


class OwnerProcess:
    """The controller's end: starts the process when a worker connects for the first time.

    Attributes:
        client: for the workers.
        folder: a private one of this run, which all its processes see.
    """

    def __init__(self) -> None:
        self.folder = temporary_folder("xdist")
        self.client = RpcClient(str(self.folder / "socket"), secrets.token_hex(32))
        self._listener = listener(self.client.socket)
        self._closing, self._close = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting = threading.Thread(target=self._wait, name="sglang-owner", daemon=True)
        self._waiting.start()

    def _wait(self) -> None:
        """Starts the process at the first connection, which that one then accepts."""
        try:
            if self._listener in wait([self._listener, self._closing]):
                self._start()
        finally:
            # The process has its own copy: where it has ended, connections are refused.
            self._listener.close()

    def _start(self) -> None:
        with (self.folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[self._listener.fileno()],
                # Ctrl-C reaches the controller, which ends this in its own time.
                start_new_session=True,
            )
        told = {
            # Python itself passes over anything else in it.
            "path": [each for each in sys.path if isinstance(each, str)],
            "descriptor": self._listener.fileno(),
            "key": self.client.key,
            "folder": str(self.folder),
        }
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> Tally:
        """Ends the server and the process; returns what the server has cost. Called again, it does
        nothing."""
        self._close.close()
        self._waiting.join()
        process, self._process = self._process, None
        return Tally() if process is None else self._end(process)

    def remove(self) -> list[str]:
        """Removes the folder, once no worker uses it any more: one that waits for its lease would
        make it again. Returns what could not be removed, with why."""
        return temporary.remove(self.folder)

    def _end(self, process: subprocess.Popen[bytes]) -> Tally:
        process.terminate()
        try:
            process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        if process.returncode == -signal.SIGTERM:
            return Tally()  # before it could start anything
        try:
            return Tally(**json.loads((self.folder / "result").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            output = (self.folder / "output").read_text(encoding="utf-8", errors="replace")
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            said = f" Its last output: {lines[-1][:300]}" if lines else ""
            told = (
                "The process that owned the shared server crashed, was killed, or did not end "
                f"within {ENDS_WITHIN:g} s (exit code {process.returncode}); 'sglang-harness "
                f"sweep' removes what it left.{said}"
            )
            return Tally(left=[told])


def main(*, descriptor: int, key: str, folder: str) -> None:
    """The process itself. Ends by SIGTERM, or with the controller."""
    from sglang_harness._base.signals import interruptions
    from sglang_harness.errors import Interrupted
    from sglang_harness.sharing.rpc import RpcServer
    from sglang_harness.sharing.xdist import ServerOwner

    orphaned = threading.Event()

    def until_the_controller_ends() -> None:
        while os.read(0, 1):
            pass
        orphaned.set()
        os.kill(os.getpid(), signal.SIGTERM)

    owner = ServerOwner()
    with interruptions() as signals:
        threading.Thread(target=until_the_controller_ends, daemon=True).start()
        server = RpcServer(socket.socket(fileno=descriptor), key, owner.answers())
        try:
            owner.work()
        except Interrupted:
            pass
        finally:
            signals.calm()
            server.close()
            owner.tally.left += owner.close()
            new = Path(folder) / "result.new"
            with suppress(OSError):
                new.write_text(json.dumps(vars(owner.tally)), encoding="utf-8")
                new.replace(Path(folder) / "result")
    if orphaned.is_set():
        temporary.remove(Path(folder))
