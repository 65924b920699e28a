"""What a release or resume at the wrong moment does. Each check has a server of its own: SGLang
0.5.23 asserts here, and its scheduler takes everything with it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from sglang_harness import oracle as oracles
from sglang_harness.errors import HarnessError, RequestFailed, ServerDied
from sglang_harness.suite.background import BackgroundStream
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, register
from sglang_harness.suite.generate import greedy
from sglang_harness.suite.memory_release import ALL_TAGS, RELEASE, RESUME
from sglang_harness.suite.needs import STARTED_HERE
from sglang_harness.suite.scored import Tokens, unequal

if TYPE_CHECKING:
    from sglang_harness.server import Server

PROMPT = [1, 2, 3, 4]
#: SGLang takes about six seconds from a scheduler's end to its own.
DIES_WITHIN = 12.0


class AfterMisuse(Observation):
    status: int | None
    """Of the call at the wrong moment; ``None`` when it got no answer."""
    reason: str
    death: str
    """How the server ended; empty when it lives."""
    before: Tokens
    after: Tokens | None
    tolerance: float


class _Misuse(Check[AfterMisuse]):
    """Asks, does the wrong thing, and asks again."""

    observation = AfterMisuse
    profile = "full"
    own_server = True
    needs = (STARTED_HERE, RELEASE, RESUME)

    def prepare(self, server: Server) -> Any:
        """Makes the moment a wrong one; the others are handed what it returns."""
        del server

    @abstractmethod
    def misuse(self, server: Server, prepared: Any) -> None:
        """Sends the call. What it raises is what is seen."""

    def put_back(self, server: Server, prepared: Any) -> None:
        """Ends what was begun, on a server that lives."""
        del server, prepared

    def observe(self, context: Context) -> AfterMisuse:
        with context.own_server() as server:
            client = server.client
            dtype = str(client.server_info().get("dtype"))

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
                self.misuse(server, prepared)
            except ServerDied as error:
                status, death = None, error.death.sentence()
            except RequestFailed as error:
                status, reason = getattr(error, "status", None), str(error)
            refused = status is not None and 400 <= status < 500
            if not death and (seen := server.running.watch.wait(1.0 if refused else DIES_WITHIN)):
                death = seen.sentence()
            if not death:
                try:
                    self.put_back(server, prepared)
                    after = ask()
                except ServerDied as error:
                    death = error.death.sentence()
                except RequestFailed as error:
                    reason = reason or str(error)
            return AfterMisuse(
                status=status,
                reason=reason,
                death=death,
                before=before,
                after=after,
                tolerance=oracles.tolerance(dtype),
            )

    def judge(self, seen: AfterMisuse) -> list[Mismatch]:
        if seen.death:
            return [Mismatch("the server", "one that lives", seen.death)]
        wrong = []
        # To do nothing is as good an answer as to refuse.
        if seen.status is None or not (seen.status == 200 or 400 <= seen.status < 500):
            wrong.append(
                Mismatch("answer", "200 or a refusal (4xx)", f"{seen.status} {seen.reason}")
            )
        if seen.after is None:
            wrong.append(Mismatch("answer afterwards", "one", f"none {seen.reason}".strip()))
        else:
            if not seen.before.ids:
                wrong.append(Mismatch("answer before", "tokens", "none"))
            wrong += unequal("answer afterwards", seen.before, seen.after, seen.tolerance)
        return wrong


@register
class ReleaseTwice(_Misuse):
    id = "memory/release-twice"
    sentence = "A second release of the same tags harms nothing: one resume brings all back."

    def misuse(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.release_memory(["kv_cache"])
        server.client.release_memory(["kv_cache"])

    def put_back(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.resume_memory(["kv_cache"])


@register
class ResumeWithoutRelease(_Misuse):
    id = "memory/resume-without-release"
    sentence = "A resume of what was not released is refused or does nothing."

    def misuse(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.resume_memory(["kv_cache"])


@register
class ReleaseUnderLoad(_Misuse):
    id = "memory/release-under-load"
    sentence = "A release while a request runs is refused or waits, and the server goes on."

    def prepare(self, server: Server) -> BackgroundStream:
        sampling = {**greedy(1500), "ignore_eos": True}
        stream = BackgroundStream(server.client, PROMPT, sampling=sampling)
        if not stream.wait_for(2, 20.0):
            raise HarnessError("The request that is to run meanwhile did not begin within 20 s.")
        return stream

    def misuse(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.release_memory(ALL_TAGS)
        server.client.resume_memory(ALL_TAGS)

    def put_back(self, server: Server, prepared: Any) -> None:
        server.client.abort_all()
        prepared.wait_until_over(20.0)
