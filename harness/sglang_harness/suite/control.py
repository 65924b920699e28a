"""Does it pause, continue and keep strangers out?"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from sglang_harness.client import Call, Client, RequestsTransport, calls
from sglang_harness.errors import Refused
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.generate import PROMPTS, greedy
from sglang_harness.suite.needs import route
from sglang_harness.suite.scored import Tokens

TOKENS = 48


class Paused(Observation):
    undisturbed: Tokens
    paused: Tokens
    held_seconds: float
    ended_while_paused: bool
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
    needs = (route("POST", "/pause_generation"), route("POST", "/continue_generation"),
             route("GET", "/ready"))

    def observe(self, context: Context) -> Paused:
        client, prompt = context.server.client, PROMPTS[1]
        undisturbed = client.generate(prompt, sampling=greedy(TOKENS), logprobs=True)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.generate, prompt, sampling=greedy(TOKENS), logprobs=True)
            deadline = time.monotonic() + 10
            while client.requests_in_flight() < 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            client.pause("in_place")
            try:
                began = time.monotonic()
                while not answer.done() and time.monotonic() - began < 1.5:
                    context.server.raise_if_dead()
                    time.sleep(0.05)
                held, ended = time.monotonic() - began, answer.done()
                ready_while_paused = _status(client, calls.ready())
            finally:
                client.resume()
            paused = answer.result()
        return Paused(
            undisturbed=Tokens.of(undisturbed),
            paused=Tokens.of(paused),
            held_seconds=held,
            ended_while_paused=ended,
            ready_while_paused=ready_while_paused,
            ready_after=_status(client, calls.ready()),
        )

    def judge(self, seen: Paused) -> list[Mismatch]:
        return [
            *expect("ended while paused", False, seen.ended_while_paused),
            *expect("ids after continue", seen.undisturbed.ids, seen.paused.ids),
            *expect("text after continue", seen.undisturbed.text, seen.paused.text),
            *expect("finish reason", "length", seen.paused.finish),
            *expect("/ready while paused", 503, seen.ready_while_paused),
            *expect("/ready after continue", 200, seen.ready_after),
        ]


def _status(client: Client, call: Call[None]) -> int:
    try:
        client.send(call)
    except Refused as error:
        return error.status
    return 200


class Doors(Observation):
    """HTTP status by route, without a key and with a wrong one."""

    without_key: dict[str, int]
    wrong_key: dict[str, int]
    with_key: int


@register
class NeedsItsKey(Check[Doors]):
    id = "control/api-key"
    sentence = "A server that was started with a key answers 401 without it and with another."
    observation = Doors

    def observe(self, context: Context) -> Doors:
        routes = [
            calls.model_info(),
            calls.generate(PROMPTS[0], sampling=greedy(1)),
            calls.checksums(),
            calls.flush_cache(),
        ]

        def knock(key: str | None) -> dict[str, int]:
            transport = RequestsTransport(context.server.address, api_key=key)
            try:
                return {str(call): transport.send(call).status for call in routes}
            finally:
                transport.close()

        return Doors(
            without_key=knock(None),
            wrong_key=knock("not-the-key-of-this-server"),
            with_key=_status(context.server.client, Call("GET", "/model_info", lambda _: None)),
        )

    def judge(self, seen: Doors) -> list[Mismatch]:
        wrong = list(expect("with the key", 200, seen.with_key))
        for label, answers in (("without a key", seen.without_key), ("wrong key", seen.wrong_key)):
            for name, status in answers.items():
                wrong += expect(f"{name}, {label}", 401, status)
        return wrong
