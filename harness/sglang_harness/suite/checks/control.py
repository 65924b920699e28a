"""Does the server pause and continue, and refuse requests without its key?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_harness.client import Call, Client, RequestsTransport, calls
from sglang_harness.errors import HarnessError, Refused
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.streams import ended
from sglang_harness.suite.needs import API_KEY, route
from sglang_harness.traffic.background import BackgroundStream, StreamEnded

TOKENS = 24


class Paused(Observation):
    undisturbed: str
    paused: StreamEnded
    asked: int
    chunks_at_pause: int
    """Events that had come when the pause had settled, half a second after its answer."""
    chunks_at_resume: int
    ready_while_paused: int
    ready_after: int


@register
class PauseHoldsAndContinues(Check[Paused]):
    id = "control/pause"
    sentence = (
        "A generation paused in place stands still, is not ready meanwhile, and after "
        "continue ends as if nothing had happened."
    )
    observation = Paused
    needs = (
        route("POST", "/pause_generation"),
        route("POST", "/continue_generation"),
        route("GET", "/ready"),
    )
    changes = True

    def observe(self, context: Context) -> Paused:
        client, prompt = context.server.client, PROMPTS[1]
        client.flush_cache()
        undisturbed = client.generate(prompt, sampling=greedy(TOKENS))
        # About three seconds' worth, so that it surely still runs when it is paused.
        asked = min(1024, max(2 * TOKENS, int(3 * TOKENS / max(undisturbed.seconds, 1e-3))))
        # With a cached prompt the sums are other ones, and a near tie may turn.
        client.flush_cache()
        with BackgroundStream(client, prompt, sampling=greedy(asked)) as stream:
            if not stream.wait_for(2, 30):
                raise HarnessError("A streamed generation gave fewer than two events in 30 s.")
            with _paused(client):
                # What was on its way when the pause was answered still arrives.
                stream.wait_until_over(0.5)
                at_pause = stream.count
                stream.wait_until_over(1.0)
                at_resume = stream.count
                ready_while_paused = _status(client, calls.ready())
            paused = ended(stream)
        return Paused(
            undisturbed=undisturbed.text,
            paused=paused,
            asked=asked,
            chunks_at_pause=at_pause,
            chunks_at_resume=at_resume,
            ready_while_paused=ready_while_paused,
            ready_after=_status(client, calls.ready()),
        )

    def judge(self, seen: Paused) -> list[Mismatch]:
        return [
            # Three seconds' worth was asked for: over by now, it was not paused at all.
            *expect("running when it was paused", True, seen.chunks_at_pause < seen.asked),
            *expect("events while paused", 0, seen.chunks_at_resume - seen.chunks_at_pause),
            *expect(
                "text after continue", seen.undisturbed, seen.paused.text[: len(seen.undisturbed)]
            ),
            *expect("tokens after continue", seen.asked, seen.paused.tokens),
            *expect("finish reason", "length", seen.paused.finish),
            *expect("/ready while paused", 503, seen.ready_while_paused),
            *expect("/ready after continue", 200, seen.ready_after),
        ]


@contextmanager
def _paused(client: Client) -> Iterator[None]:
    """Paused in place inside, and continued in the end, whether the check's time is over or not.
    A pause without an answer may have been taken all the same."""
    try:
        client.pause("in_place")
        yield
    finally:
        with client.cleanup():
            client.resume()


def _status(client: Client, call: Call[None]) -> int:
    try:
        client.send(call)
    except Refused as error:
        return error.status
    return 200


class Answers(Observation):
    """HTTP status by route, without a key and with a wrong one."""

    without_key: dict[str, int]
    wrong_key: dict[str, int]
    with_key: int


@register
class NeedsItsKey(Check[Answers]):
    id = "control/api-key"
    sentence = "A server that was started with a key answers 401 without it and with another one."
    observation = Answers
    needs = (API_KEY,)

    def observe(self, context: Context) -> Answers:
        routes: list[Call[Any]] = [
            calls.model_info(),
            calls.generate(PROMPTS[0], sampling=greedy(1)),
            calls.checksums(),
            # Accepted, it would change the server.
            *([calls.flush_cache()] if context.server.may_change else []),
        ]

        def ask(key: str | None) -> dict[str, int]:
            transport = RequestsTransport(context.server.address, api_key=key)
            try:
                return {str(call): transport.send(call).status for call in routes}
            finally:
                transport.close()

        return Answers(
            without_key=ask(None),
            wrong_key=ask("not-the-key-of-this-server"),
            with_key=_status(context.server.client, Call("GET", "/model_info", lambda _: None)),
        )

    def judge(self, seen: Answers) -> list[Mismatch]:
        wrong = list(expect("with the key", 200, seen.with_key))
        for label, answers in (("without a key", seen.without_key), ("wrong key", seen.wrong_key)):
            for name, status in answers.items():
                wrong += expect(f"{name}, {label}", 401, status)
        return wrong
