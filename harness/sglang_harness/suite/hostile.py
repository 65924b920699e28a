"""Does it survive what it should refuse? Each check has a server of its own."""

from __future__ import annotations

from sglang_harness import oracle as oracles
from sglang_harness.errors import RequestFailed, ServerDied
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, register
from sglang_harness.suite.generate import greedy
from sglang_harness.suite.scored import Tokens, unequal


class AfterHostility(Observation):
    status: int | None
    """Of the hostile request; ``None`` when it got no answer."""
    reason: str
    death: str
    """How the server ended; empty when it lives."""
    before: Tokens
    after: Tokens | None
    tolerance: float


@register
class OutOfVocabulary(Check[AfterHostility]):
    id = "hostile/out-of-vocabulary-ids"
    sentence = "A token id beyond the vocabulary is refused, and the server goes on as before."
    observation = AfterHostility
    profile = "full"
    own_server = True

    def observe(self, context: Context) -> AfterHostility:
        with context.own_server() as server:
            client = server.client
            prompt = [1, 2, 3, 4]
            dtype = str(client.server_info().get("dtype"))

            def ask() -> Tokens:
                client.flush_cache()
                return Tokens.of(client.generate(prompt, sampling=greedy(6), logprobs=True))

            before = ask()
            status: int | None = 200
            reason = death = ""
            after = None
            try:
                client.generate([1, 2, 10_000_000], sampling=greedy(2), timeout=20)
            except ServerDied as error:
                status, death = None, error.death.sentence()
            except RequestFailed as error:
                status, reason = getattr(error, "status", None), str(error)
            # SGLang takes about six seconds from a scheduler's end to its own.
            if not death and (seen := server.running.watch.wait(12.0 if status != 400 else 1.0)):
                death = seen.sentence()
            if not death:
                try:
                    after = ask()
                except ServerDied as error:
                    death = error.death.sentence()
            return AfterHostility(
                status=status,
                reason=reason,
                death=death,
                before=before,
                after=after,
                tolerance=oracles.tolerance(dtype),
            )

    def judge(self, seen: AfterHostility) -> list[Mismatch]:
        if seen.death:
            return [Mismatch("the server", "one that lives", seen.death)]
        wrong = []
        if seen.status is None or not 400 <= seen.status < 500:
            wrong.append(Mismatch("answer", "a refusal (4xx)", f"{seen.status} {seen.reason}"))
        if seen.after is None:
            wrong.append(Mismatch("answer afterwards", "one", "none"))
        else:
            wrong += unequal("answer afterwards", seen.before, seen.after, seen.tolerance)
        return wrong
