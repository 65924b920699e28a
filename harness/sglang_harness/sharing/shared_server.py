"""One server for a whole session of tests: started once, lent to one test at a time, put back
after each, and replaced only where it cannot be put back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sglang_harness._base.file_lease import Lease
from sglang_harness.errors import HarnessError, ServerDied
from sglang_harness.server import Server
from sglang_harness.server.state import CannotRestore, State, restore

if TYPE_CHECKING:
    from sglang_harness.runtime import Runtime
    from sglang_harness.spec import ServerSpec


@dataclass
class Tally:
    """What a session's server has cost.

    Attributes:
        starts: seconds of each start.
        warm: how many of these were warm.
        restored: seconds of each look at the server after a test, putting back included.
        replaced: why each server but the last had to go.
    """

    starts: list[float] = field(default_factory=list)
    warm: int = 0
    restored: list[float] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)


class Keeper(Protocol):
    """Whoever has the server: this process, or another one that lends it."""

    tally: Tally

    def server(self) -> tuple[Server, State | None]:
        """The server, started where there is none, and how it was at first; ``None`` where
        it is only looked at, and so cannot have changed."""

    def replace(self, server: Server, why: str) -> None:
        """Ends ``server``, unless that was done already; the next one who asks gets another."""


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
        """The server, where there is one; asking starts none."""
        self._first: State | None = None
        self._failed: HarnessError | None = None

    def server(self) -> tuple[Server, State | None]:
        """See :class:`Keeper`. A start that failed is not tried again: fifty tests would each
        wait for its time-out.

        Raises:
            SpecError, EngineError, ImageError, ModelError, ServerDied, StartTimeout, AttachError:
                it could not be started; the same again for everyone who asks later.
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
            except HarnessError as error:
                self._failed = error
                self.close()
                raise
            self.tally.starts.append(time.monotonic() - began)
            self.tally.warm += self.current.running.started.how == "warm"
        return self.current, self._first

    def replace(self, server: Server, why: str) -> None:
        """See :class:`Keeper`.

        Raises:
            CannotRestore: it is somebody else's, and no other can be had.
        """
        if server is not self.current:
            return
        if not self._runtime.starts:
            self._failed = CannotRestore(
                f"{why} It is somebody else's server, so it is not replaced.",
                advice="Restart it, and look at what the test before did to it.",
            )
            raise self._failed
        self.tally.replaced.append(why)
        self.current, self._first = None, None
        server.stop(at_once=True)

    def close(self) -> None:
        """Ends the server, where there is one."""
        if self.current is not None:
            self.current.stop(at_once=True)
            self.current = None


class SessionServer:
    """Lends a keeper's server to one test at a time.

    Args:
        lease: where other processes borrow the same server.
        patience: seconds to wait for the lease.
    """

    def __init__(
        self, keeper: Keeper, *, lease: Lease | None = None, patience: float = 1800.0
    ) -> None:
        self.keeper = keeper
        self._lease = lease
        self._patience = patience
        self.current: Server | None = None
        """The server that is, or was last, lent."""

    @contextmanager
    def lent(self, purpose: str) -> Iterator[Server]:
        """The server, as it was at first; afterwards it is brought back to that.

        Raises:
            LeaseTaken: others have held it for all of ``patience``.
            ServerDied: afterwards, where it has ended meanwhile.
        """
        died_holding = None
        if self._lease is not None:
            died_holding = self._lease.acquire(purpose, timeout=self._patience)
        try:
            server, first = self.keeper.server()
            if died_holding is not None and self._restore(server, first):
                # Whoever had it before was killed with it in hand, and it could not be mended.
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
        """Whether the server had to go."""
        if first is None:
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
        self.keeper.tally.restored.append(time.monotonic() - began)
        return False
