"""What a release or resume at the wrong moment does. Each check has a server of its own: SGLang
0.5.23 asserts here, and its scheduler takes everything with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_harness.errors import HarnessError
from sglang_harness.suite.check import register
from sglang_harness.suite.checks.generate import greedy
from sglang_harness.suite.checks.hostile.requests import PROMPT, Survives
from sglang_harness.suite.checks.memory.release import ALL_TAGS, RELEASE, RESUME
from sglang_harness.suite.needs import STARTED_HERE
from sglang_harness.traffic.background import BackgroundStream

if TYPE_CHECKING:
    from sglang_harness.server import Server


class _Misuse(Survives):
    needs = (STARTED_HERE, RELEASE, RESUME)
    # To do nothing is as good an answer as to refuse.
    may_answer_200 = True


@register
class ReleaseTwice(_Misuse):
    id = "memory/release-twice"
    sentence = "A second release of the same tags harms nothing: one resume brings all back."

    def attack(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.release_memory(["kv_cache"])
        server.client.release_memory(["kv_cache"])

    def restore(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.resume_memory(["kv_cache"])


@register
class ResumeWithoutRelease(_Misuse):
    id = "memory/resume-without-release"
    ends_its_server = True
    sentence = "A resume of what was not released is refused or does nothing."

    def attack(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.resume_memory(["kv_cache"])


@register
class ReleaseUnderLoad(_Misuse):
    id = "memory/release-under-load"
    ends_its_server = True
    sentence = "A release while a request runs is refused or waits, and the server goes on."

    def prepare(self, server: Server) -> BackgroundStream:
        sampling = {**greedy(1500), "ignore_eos": True}
        stream = BackgroundStream(server.client, PROMPT, sampling=sampling)
        if not stream.wait_for(2, 20.0):
            stream.cancel()
            raise HarnessError("The request that is to run meanwhile did not begin within 20 s.")
        return stream

    def attack(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.release_memory(ALL_TAGS)
        server.client.resume_memory(ALL_TAGS)

    def restore(self, server: Server, prepared: Any) -> None:
        server.client.abort_all()
        prepared.wait_until_over(20.0)
