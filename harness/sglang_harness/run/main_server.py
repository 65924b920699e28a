"""The server that most checks share, kept fit to be judged: compared with its baseline after each
check that modifies it, restored where it differs, replaced where that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import (
    HarnessError,
    Interrupted,
    MissingExtra,
    ModelError,
    ServerDied,
    SpecError,
    StartTimeout,
)
from sglang_harness.runtime import Runtime
from sglang_harness.runtime.death import Death
from sglang_harness.server import Server
from sglang_harness.server.state import State, restore
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.blame import place
from sglang_harness.suite.check import Check
from sglang_harness.verdict import CheckResult, Outcome

#: How often a server that died under a check, or could not be restored, is replaced.
REPLACEMENTS = 2

#: After these a server is compared with its baseline even if the check does not modify it: what
#: went wrong may have left something behind.
SUSPICIOUS = (Outcome.FAIL, Outcome.KNOWN, Outcome.ERROR)


class MainServer:
    """Starts, keeps fit and ends the server of a run.

    Args:
        keep: it may be left running for a person afterwards.
        started: told of each server that came up, with a name for it.
        left: seconds that are left of the run.

    Attributes:
        current: the one that checks are asked of; ``None`` before the first came up.
        servers: all of them, in the order of their starts.
        unusable: why no more checks can be asked; empty while they can.
        because: the check under which it became so, where that is the server's failure.
        caveats: what the verdict has to say about them.
        logs: of those that have ended, and of one that never came up.
        deaths: how one ended that nobody asked to end, by the check after which it was noticed.
    """

    def __init__(
        self,
        spec: ServerSpec,
        runtime: Runtime,
        *,
        run_id: str,
        keep: bool,
        say: Callable[[str], None],
        started: Callable[[Server, str], None],
        left: Callable[[], float],
    ) -> None:
        self._spec = spec
        self._runtime = runtime
        self._run_id = run_id
        self._keep = keep
        self._say = say
        self._started = started
        self._left = left
        self._baseline: State | None = None
        self._replaced = 0
        self.current: Server | None = None
        self.servers: list[Server] = []
        self.unusable = ""
        self.because: str | None = None
        self.caveats: list[str] = []
        self.logs: list[str] = []
        self.left_behind: list[str] = []
        self.deaths: dict[str, str] = {}

    @property
    def _ours(self) -> bool:
        return self._runtime.starts

    def start(self) -> Server:
        """The first one. Its start is judged, so it is cold, as anybody's is."""
        spec = self._spec
        return self._start(spec.model_copy(update={"start": "cold"}) if self._ours else spec)

    def _start(self, spec: ServerSpec, *, replaces: bool = False) -> Server:
        try:
            server = Server.start(
                spec,
                runtime=self._runtime,
                say=self._say,
                run_id=self._run_id,
                held=self._keep,
                within=max(self._left(), 1.0),
            )
        except (HarnessError, Interrupted) as error:
            self.logs.append(error.log)
            raise
        self.servers.append(server)
        self.current = server
        self._started(server, "the server")
        server.about()
        self._baseline = None
        if server.may_change:
            try:
                self._baseline = State.of(server)
            except HarnessError as error:
                if replaces:
                    # No check has asked it anything: none is to be blamed.
                    server.raise_if_dead()
                # The checks will say what is wrong with it.
                self._say(f"its state cannot be read: {error.message}")
        return server

    def after(self, check: Check[Any], result: CheckResult) -> bool:
        """Makes the server fit for the next check; whether it is another one now.

        Raises nothing that a server or an engine does wrong: ``unusable`` says it.
        """
        server = self.current
        if server is None or self.unusable:
            return False
        ended = server.running.watch.ended
        if isinstance(ended, Death):
            self._note_death(check, ended.sentence())
            return self._replace(server, f"died under {check.id}")
        if ended is not None:
            return self._replace(server, f"was lost under {check.id} ({ended.reason})")
        if check.own_server or not server.may_change:
            return False
        if not check.changes and result.outcome not in SUSPICIOUS:
            return False
        try:
            wrong = self._differs_for_good(server, check)
        except ServerDied as error:
            self._note_death(check, error.message)
            return self._replace(server, f"died after {check.id}, while it was restored")
        return self._replace(server, wrong) if wrong else False

    def _note_death(self, check: Check[Any], how: str) -> None:
        self.because = check.id
        self.deaths[check.id] = how

    def _differs_for_good(self, server: Server, check: Check[Any]) -> str:
        """Why the server cannot be used any more; empty: it is as at its start (again)."""
        if self._baseline is None:
            if not check.changes:
                return ""
            return f"was modified by {check.id}, and its state at the start could not be read"
        try:
            done = restore(server, self._baseline)
        except ServerDied:
            raise
        except HarnessError as error:
            return f"could not be restored after {check.id} ({error.message})"
        except Exception as error:
            wrong = f"{type(error).__name__} in {place(error)}: {error}"
            return f"could not be restored after {check.id} (the harness failed: {wrong})"
        if done.differed:
            self.caveats.append(
                f"{check.id} left the server changed ({', '.join(done.differed)}); "
                f"it was restored before the next check."
            )
        return ""

    def _replace(self, server: Server, why: str) -> bool:
        if not self._ours:
            self.unusable = f"the server {why}, and it was not started by this run"
        elif self._replaced >= REPLACEMENTS:
            self.unusable = f"the server {why}, and had been replaced {REPLACEMENTS} times already"
        elif self._left() <= 0:
            self.unusable = f"the server {why}, and the run's limit was over"
        if self.unusable:
            return self._give_up()
        self._replaced += 1
        self._say(f"The server {why}. Starting another for the remaining checks")
        self.stop(server)
        try:
            before = len(self.servers)
            self._start(self._spec, replaces=True)
        except (ServerDied, StartTimeout) as error:
            came_up = len(self.servers) > before
            how = "ended as soon as it had come up" if came_up else "did not come up"
            self.unusable = f"the server {why}, and its replacement {how}: {error}"
        except (SpecError, ModelError, MissingExtra) as error:
            self.unusable = f"the server {why}, and could not be started again: {error}"
        except HarnessError as error:
            self.unusable = f"the server {why}, and could not be replaced: {error}"
        else:
            self.caveats.append(f"The server {why} and was replaced.")
            self.because = None
            return True
        return self._give_up()

    def _give_up(self) -> Literal[False]:
        self.caveats.append(f"{self.unusable[0].upper()}{self.unusable[1:].rstrip('.')}.")
        return False

    def give_back(self, server: Server) -> None:
        """Restores one that this run did not start, after a check that was cut short."""
        if self._ours or self._baseline is None or self.unusable:
            return
        try:
            restore(server, self._baseline)
        except Exception as error:
            self.caveats.append(f"The server could not be restored before it was left: {error}")

    def stop(self, server: Server, *, at_once: bool = True) -> None:
        """Ends one of them and keeps its log. Raises nothing but an interruption."""
        with Teardown() as down:
            log = log_of(server)
            ended = down.step("stop", lambda: server.stop(at_once=at_once))
            # What it wrote while it ended, where that can still be read.
            self.logs.append(log_of(server) or log)
            self.left_behind += [*down.failures, *(ended.left_behind if ended else [])]


def log_of(server: Server) -> str:
    try:
        return server.logs()
    except Exception:
        # Its container is gone, or the engine: what was read before has to do.
        return ""
