"""Does a server survive what it should refuse? The frame of all such checks: look, attack, look
again. Each has a server of its own, which it may kill."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sglang_harness import oracle as oracles
from sglang_harness.client import Update
from sglang_harness.errors import NoAnswerInTime, Refused, RequestFailed, ServerDied, TimeIsOver
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, dtype_of
from sglang_harness.suite.lib.scored import Tokens, unequal

if TYPE_CHECKING:
    from sglang_harness.server import Server

PROMPT = [1, 2, 3, 4]
TOKENS = 6

#: Seconds. SGLang takes about six from a scheduler's end to its own (0.5.23).
DIES_WITHIN = 12.0
#: Seconds for an answer of a server that was attacked.
ANSWERS_WITHIN = 30.0
#: The same where the attack itself got no answer.
ANSWERS_AGAIN_WITHIN = 10.0


class Aftermath(Observation):
    status: int | None
    """Of the attack; ``None`` when it got no answer. 200 with ``success: false`` counts as 400,
    which is what SGLang sends with it."""
    death: str
    """How the server ended; empty while it runs."""
    hung: str = ""
    """What it did not answer afterwards; empty when it answered everything."""
    before: Tokens
    after: Tokens | None
    tolerance: float

    def note(self, words: str) -> None:
        """Keeps what the server said of the attack, or of what came after it."""
        raise NotImplementedError

    def noted(self) -> str:
        raise NotImplementedError


A = TypeVar("A", bound=Aftermath)


class Survives(Check[A]):
    """Looks at a server, does what it should refuse, and looks again.

    Attributes:
        may_answer_200: doing nothing is as good an answer as refusing.
    """

    profile = "full"
    own_server = True
    may_answer_200: ClassVar[bool] = False

    @abstractmethod
    def look(self, server: Server) -> A:
        """The server as it is before the attack."""

    def prepare(self, context: Context, server: Server) -> Any:
        """What the attack needs; handed to the other methods."""
        del context, server

    @abstractmethod
    def attack(self, server: Server, prepared: Any) -> Update | None:
        """Sends it. What it raises is what is seen; so is an update without success."""

    def restore(self, server: Server, prepared: Any, seen: A) -> None:
        """Ends what was begun, on a server that is still up. No deadline of the check holds."""
        del server, prepared, seen

    def look_again(self, server: Server, seen: A, timeout: float) -> None:
        """The server as it is afterwards; ``timeout``: seconds for each answer."""
        seen.after = Tokens.asked(server.client, PROMPT, TOKENS, timeout=timeout)

    def observe(self, context: Context) -> A:
        with context.own_server() as server:
            seen = self.look(server)
            # Only an empty cache has the attack computed and not looked up.
            server.client.flush_cache()
            prepared = self.prepare(context, server)
            try:
                self._attack(server, prepared, seen)
                if not seen.death:
                    self._look_again(server, prepared, seen)
            except ServerDied as error:
                seen.death = error.death.sentence()
            return seen

    def _attack(self, server: Server, prepared: Any, seen: A) -> None:
        try:
            update = self.attack(server, prepared)
            seen.status = 200 if update is None or update.success else 400
            if update is not None:
                seen.note(f"success {update.success}: {update.message}")
        except TimeIsOver:
            raise
        except RequestFailed as error:
            seen.status = error.status if isinstance(error, Refused) else None
            seen.note(error.message)
        settled = seen.status is not None and seen.status < 500
        if death := server.running.watch.wait(1.0 if settled else DIES_WITHIN):
            seen.death = death.sentence()

    def _look_again(self, server: Server, prepared: Any, seen: A) -> None:
        unanswered = seen.status is None
        try:
            with server.client.cleanup():
                self.restore(server, prepared, seen)
            self.look_again(server, seen, ANSWERS_AGAIN_WITHIN if unanswered else ANSWERS_WITHIN)
        except TimeIsOver:
            raise
        except RequestFailed as error:
            # An attack that was answered may still take the server down seconds later.
            if death := server.running.watch.wait(1.0 if unanswered else DIES_WITHIN):
                raise ServerDied(death) from error
            if isinstance(error, NoAnswerInTime):
                seen.hung = error.message
                # Nothing restores a server that answers nothing; each try would wait again.
                server.stop()
            else:
                seen.note(error.message)

    def judge(self, seen: A) -> list[Mismatch]:
        if seen.death:
            return [Mismatch("the server", "to stay up", seen.death)]
        if seen.hung:
            return [Mismatch("the server", "to keep answering", seen.hung)]
        wrong = []
        if not (refused(seen.status) or (self.may_answer_200 and seen.status == 200)):
            right = "200 or a refusal (4xx)" if self.may_answer_200 else "a refusal (4xx)"
            wrong.append(Mismatch("answer", right, f"{seen.status} {seen.noted()}".strip()))
        if not seen.before.ids:
            wrong.append(Mismatch("answer before", "tokens", "none"))
        if seen.after is None:
            wrong.append(Mismatch("answer afterwards", "one", f"none {seen.noted()}".strip()))
        else:
            wrong += unequal("answer afterwards", seen.before, seen.after, seen.tolerance)
        return wrong


class Survived(Aftermath):
    """The aftermath of a request that changes no weights."""

    reason: str

    def note(self, words: str) -> None:
        self.reason = self.reason or words

    def noted(self) -> str:
        return self.reason


def first_look(server: Server) -> Survived:
    """A server before an attack that changes no weights."""
    return Survived(
        status=None,
        reason="",
        death="",
        before=Tokens.asked(server.client, PROMPT, TOKENS),
        after=None,
        tolerance=oracles.tolerance(dtype_of(server)),
    )


def refused(status: int | None) -> bool:
    """Whether the server said no, as HTTP says it."""
    return status is not None and 400 <= status < 500
