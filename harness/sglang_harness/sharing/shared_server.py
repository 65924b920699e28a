"""One server for a whole session of tests: started once, used by one test at a time, restored
after each, and replaced only where it cannot be restored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from sglang_harness._base.file_lease import Lease
from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import HarnessError, ServerDied
from sglang_harness.server import Server
from sglang_harness.server.state import CannotRestore, State, restore
from sglang_harness.sharing.tally import Tally

if TYPE_CHECKING:
    from sglang_harness.runtime import Runtime
    from sglang_harness.spec import ServerSpec


class Keeper(Protocol):
    """Starts and replaces the server: in this process, or by asking the one that owns it."""

    tally: Tally

    def server(self) -> tuple[Server, State | None]:
        """The server, started where there is none, and its first state; ``None`` where it is only
        read, and so cannot have changed."""

    def replace(self, server: Server, why: str) -> None:
        """Ends ``server``, unless that was done already; the next test gets another."""


class LocalKeeper:
    """A server of this process.

    Args:
        runtime: an attachment is asked, and never replaced.
        run_id: servers of one run may share a GPU; those of others wait for it.
    """

    def __init__(
        self,
        spec: ServerSpec,
        runtime: Runtime,
        say: Callable[[str], None] = lambda _: None,
        *,
        run_id: str | None = None,
    ) -> None:
        self._run_id = run_id
        self.tally = Tally()
        self._spec = spec
        self._runtime = runtime
        self._say = say
        self.current: Server | None = None
        """The server, where there is one; reading this starts none."""
        self._first: State | None = None
        self._failed: HarnessError | None = None

    def server(self) -> tuple[Server, State | None]:
        """See :class:`Keeper`. A start that failed is not tried again: fifty tests would each
        wait for its time-out.

        Raises:
            SpecError, EngineError, ImageError, ModelError, ServerDied, StartTimeout, AttachError:
                it could not be started; the same again for each later call.
        """
        if self._failed is not None:
            raise self._failed
        if self.current is None:
            began = time.monotonic()
            try:
                self.current = Server.start(
                    self._spec, runtime=self._runtime, say=self._say, run_id=self._run_id
                )
                self._first = State.of(self.current) if self.current.may_change else None
            except BaseException as error:
                if isinstance(error, HarnessError):
                    self._failed = error
                if self.tally.replaced:
                    told = error.message if isinstance(error, HarnessError) else repr(error)
                    self.tally.no_replacement.append(told)
                self.tally.left += self.close()
                raise
            self.tally.starts.append(time.monotonic() - began)
            self.tally.warm += self.current.running.started.how == "warm"
        return self.current, self._first

    def replace(self, server: Server, why: str) -> None:
        """See :class:`Keeper`.

        Raises:
            CannotRestore: this run did not start it, so that it is not replaced.
        """
        if server is not self.current:
            return
        if not self._runtime.starts:
            self._failed = CannotRestore(
                f"{why} This run did not start the server, so it is not replaced.",
                advice="Restart it, and check what the previous test did to it.",
            )
            raise self._failed
        self.tally.replaced.append(why)
        self.tally.left += self.close()

    def close(self) -> list[str]:
        """Ends the server, where there is one; returns what could not be removed, with why."""
        server, self.current, self._first = self.current, None, None
        if server is None:
            return []
        with Teardown() as down:
            down.collect(
                f"server at {server.address}", lambda: server.stop(at_once=True).left_behind
            )
        return down.failures


class SessionServer:
    """Gives a keeper's server to one test at a time.

    Args:
        lease: where other processes use the same server.
        patience: seconds to wait for the lease.
    """

    def __init__(
        self, keeper: Keeper, *, lease: Lease | None = None, patience: float = 1800.0
    ) -> None:
        self.keeper = keeper
        self._lease = lease
        self._patience = patience
        self.current: Server | None = None
        """The server of the current test, or of the last one."""
        self.ending = False
        """The run was interrupted: a server that it started is ended and no longer restored,
        which could take as long as its weights take to load."""

    @contextmanager
    def lent(self, purpose: str) -> Iterator[Server]:
        """Yields the server in its first state and restores that afterwards.

        Raises:
            LeaseTaken: other processes have held it for all of ``patience``.
            ServerDied: afterwards, where it has ended meanwhile.
        """
        died_holding = None
        if self._lease is not None:
            died_holding = self._lease.acquire(purpose, timeout=self._patience)
        try:
            server, first = self.keeper.server()
            if died_holding is not None and self._restore(server, first):
                # Its last holder was killed, and what that one had changed could not be restored.
                server, first = self.keeper.server()
            self.current = server
            try:
                yield server
            finally:
                self._restore(server, first)
        finally:
            if self._lease is not None:
                self._lease.release()

    def _restore(self, server: Server, first: State | None) -> bool:
        """Whether the server had to be replaced."""
        if first is None or (self.ending and server.running.owned):
            return False
        began = time.monotonic()
        try:
            restore(server, first)
        except ServerDied as error:
            self.keeper.replace(server, error.message)
            raise
        except HarnessError as error:
            self.keeper.replace(server, error.message)
            return True
        except Exception as error:
            self.keeper.replace(server, f"Restoring failed: {type(error).__name__}: {error}.")
            raise
        self.keeper.tally.restored.append(time.monotonic() - began)
        return False
