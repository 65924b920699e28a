"""Does it survive what it should refuse? Each check has a server of its own, which it may kill."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from sglang_harness import oracle as oracles
from sglang_harness.errors import RequestFailed, ServerDied
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, dtype_of, register
from sglang_harness.suite.checks.generate import greedy
from sglang_harness.suite.lib.scored import Tokens, unequal

if TYPE_CHECKING:
    from sglang_harness.server import Server

PROMPT = [1, 2, 3, 4]
#: Seconds. SGLang takes about six from a scheduler's end to its own (0.5.23).
DIES_WITHIN = 12.0


class Aftermath(Observation):
    status: int | None
    """Of the hostile call; ``None`` when it got no answer."""
    reason: str
    death: str
    """How the server ended; empty when it lives."""
    before: Tokens
    after: Tokens | None
    tolerance: float


class Survives(Check[Aftermath]):
    """Asks, does what should harm nothing, and asks again.

    Attributes:
        may_answer_200: doing nothing is as good an answer as refusing.
    """

    observation = Aftermath
    profile = "full"
    own_server = True
    may_answer_200: ClassVar[bool] = False

    def prepare(self, server: Server) -> Any:
        """Makes the moment a wrong one; the others are handed what it returns."""
        del server

    @abstractmethod
    def attack(self, server: Server, prepared: Any) -> None:
        """Sends the call. What it raises is what is seen."""

    def restore(self, server: Server, prepared: Any) -> None:
        """Ends what was begun, on a server that lives."""
        del server, prepared

    def observe(self, context: Context) -> Aftermath:
        with context.own_server() as server:
            client = server.client
            dtype = dtype_of(server)

            def ask() -> Tokens:
                client.flush_cache()
                return Tokens.of(client.generate(PROMPT, sampling=greedy(6), logprobs=True))

            before = ask()
            client.flush_cache()
            status: int | None = 200
            reason = death = ""
            after = None
            prepared = self.prepare(server)
            try:
                self.attack(server, prepared)
            except ServerDied as error:
                status, death = None, error.death.sentence()
            except RequestFailed as error:
                status, reason = getattr(error, "status", None), str(error)
            if not death and (
                seen := server.running.watch.wait(1.0 if refused(status) else DIES_WITHIN)
            ):
                death = seen.sentence()
            if not death:
                try:
                    self.restore(server, prepared)
                    after = ask()
                except ServerDied as error:
                    death = error.death.sentence()
                except RequestFailed as error:
                    reason = reason or str(error)
            return Aftermath(
                status=status,
                reason=reason,
                death=death,
                before=before,
                after=after,
                tolerance=oracles.tolerance(dtype),
            )

    def judge(self, seen: Aftermath) -> list[Mismatch]:
        if seen.death:
            return [Mismatch("the server", "one that lives", seen.death)]
        wrong = []
        if not (refused(seen.status) or (self.may_answer_200 and seen.status == 200)):
            right = "200 or a refusal (4xx)" if self.may_answer_200 else "a refusal (4xx)"
            wrong.append(Mismatch("answer", right, f"{seen.status} {seen.reason}"))
        if not seen.before.ids:
            wrong.append(Mismatch("answer before", "tokens", "none"))
        if seen.after is None:
            wrong.append(Mismatch("answer afterwards", "one", f"none {seen.reason}".strip()))
        else:
            wrong += unequal("answer afterwards", seen.before, seen.after, seen.tolerance)
        return wrong


def refused(status: int | None) -> bool:
    """Whether the server said no, as HTTP says it."""
    return status is not None and 400 <= status < 500


@register
class OutOfVocabulary(Survives):
    id = "hostile/out-of-vocabulary-ids"
    ends_its_server = True
    sentence = "A token id beyond the vocabulary is refused, and the server goes on as before."

    def attack(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.generate([1, 2, 10_000_000], sampling=greedy(2), timeout=20)
