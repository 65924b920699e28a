"""Does a generation stop when it should, where it should, and only there?"""

from __future__ import annotations

import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict

from sglang_harness.client import Client, Generation
from sglang_harness.errors import HarnessError
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.scored import Tokens
from sglang_harness.suite.lib.streams import ended
from sglang_harness.traffic.background import BackgroundStream, StreamEnded


class StoppedAnswers(BaseModel):
    model_config = ConfigDict(extra="forbid")

    answer: Tokens
    detail: dict[str, Any]

    @classmethod
    def of(cls, answer: Generation) -> StoppedAnswers:
        return cls(answer=Tokens.of(answer), detail=answer.finish_detail)


class StopConditions(Observation):
    whole: Tokens
    stop_string: str
    at_string: StoppedAnswers
    stop_id: int
    at_id: StoppedAnswers
    eos_ids: list[int]
    at_eos: StoppedAnswers
    past_eos: StoppedAnswers
    at_length: StoppedAnswers


@register
class StopsWhereTold(Check[StopConditions]):
    id = "stop/conditions"
    sentence = (
        "A generation ends at its stop string, its stop token, the end-of-sequence token or its "
        "length, says which, and does not end at an ignored end-of-sequence token."
    )
    observation = StopConditions

    def observe(self, context: Context) -> StopConditions:
        client, prompt = context.server.client, PROMPTS[1]
        context.empty_prefix_cache()
        whole = client.generate(prompt, sampling=greedy(24))
        stop_string = _first_seen_in_the_middle(whole.text)
        stop_id = next(
            (i for n, i in enumerate(whole.output_ids) if n >= 4 and i not in whole.output_ids[:n]),
            whole.output_ids[0],
        )
        eos = sorted(context.oracle.eos_ids)
        # Makes the end-of-sequence token certain at the first step, whatever the model.
        forced = {str(i): 100.0 for i in eos[:1]}

        def ask(**sampling: Any) -> StoppedAnswers:
            # With a cached prompt the sums are other ones, and a near tie may turn.
            context.empty_prefix_cache()
            return StoppedAnswers.of(client.generate(prompt, sampling={**greedy(24), **sampling}))

        return StopConditions(
            whole=Tokens.of(whole),
            stop_string=stop_string,
            at_string=ask(stop=[stop_string]),
            stop_id=stop_id,
            at_id=ask(stop_token_ids=[stop_id], ignore_eos=False),
            eos_ids=eos,
            at_eos=ask(logit_bias=forced, ignore_eos=False),
            past_eos=ask(logit_bias=forced, ignore_eos=True, max_new_tokens=3),
            at_length=ask(max_new_tokens=5),
        )

    def judge(self, seen: StopConditions) -> list[Mismatch]:
        text, ids = seen.whole.text, seen.whole.ids
        until_string = text[: text.index(seen.stop_string)]
        until_id = ids[: ids.index(seen.stop_id)]
        at_id = seen.at_id.answer.ids
        return [
            *expect("stop string, finish", "stop", seen.at_string.answer.finish),
            *expect("stop string, text", until_string, seen.at_string.answer.text),
            *expect("stop string, matched", seen.stop_string, seen.at_string.detail.get("matched")),
            *expect("stop token, finish", "stop", seen.at_id.answer.finish),
            *expect("stop token, matched", seen.stop_id, seen.at_id.detail.get("matched")),
            # Versions differ in whether the stop token itself is among the ids.
            *expect(
                "stop token, ids", until_id, at_id[:-1] if at_id[-1:] == [seen.stop_id] else at_id
            ),
            *expect("end of sequence, finish", "stop", seen.at_eos.answer.finish),
            *expect("end of sequence, tokens at most", True, len(seen.at_eos.answer.ids) <= 1),
            *expect("ignored end of sequence, finish", "length", seen.past_eos.answer.finish),
            *expect("ignored end of sequence, tokens", 3, len(seen.past_eos.answer.ids)),
            *expect("length, finish", "length", seen.at_length.answer.finish),
            *expect("length, ids", ids[:5], seen.at_length.answer.ids),
        ]


def _first_seen_in_the_middle(text: str) -> str:
    """A string that first occurs past the first third of ``text``, of plain characters."""
    for size in (3, 2, 4, 5, 1):
        for start in range(len(text) // 3, len(text) - size + 1):
            piece = text[start : start + size]
            # A random model also writes halves of characters, which stop strings never match.
            if piece.isascii() and piece.isprintable() and text.index(piece) == start:
                return piece
    raise HarnessError(f"No usable stop string in the answer {text!r}.")


class Aborted(Observation):
    asked: int
    aborted: StreamEnded
    seconds_to_end: float
    """From the abort call to the end of the aborted request."""
    neighbour: StreamEnded
    neighbour_asked: int


#: Tokens of the neighbour: more, where it was over before the abort was answered.
NEIGHBOUR = (24, 96, 384)


def abort_beside_neighbour(client: Client, aborted_id: str, neighbour_id: str) -> Aborted:
    """Runs two requests, aborts the first once both generate, and waits for both.

    Raises:
        HarnessError: they did not both run when the abort was answered.
    """
    for length in NEIGHBOUR:
        if seen := _aborted(client, aborted_id, neighbour_id, length):
            return seen
    raise HarnessError(
        f"A request for {NEIGHBOUR[-1]} tokens had ended before the abort was answered."
    )


def _aborted(
    client: Client, aborted_id: str, neighbour_id: str, neighbour_asked: int
) -> Aborted | None:
    """``None`` where the neighbour was over too early for the abort to do anything to it."""
    asked = 400
    with (
        BackgroundStream(
            client, PROMPTS[1], sampling=greedy(asked), request_id=aborted_id
        ) as first,
        BackgroundStream(
            client, PROMPTS[0], sampling=greedy(neighbour_asked), request_id=neighbour_id
        ) as second,
    ):
        both_run = first.wait_for(1, 30) and second.wait_for(1, 30)
        client.abort(aborted_id)
        over = second.is_over
        began = time.monotonic()
        aborted = ended(first)
        seconds = time.monotonic() - began
        if not both_run:
            raise HarnessError("Two requests did not both start to generate within 30 s.")
        neighbour = ended(second)
    if over and neighbour.finish != "abort":
        return None
    return Aborted(
        asked=asked,
        aborted=aborted,
        seconds_to_end=seconds,
        neighbour=neighbour,
        neighbour_asked=neighbour_asked,
    )


def judge_aborted(seen: Aborted) -> list[Mismatch]:
    wrong = [
        *expect("aborted request, finish reason", "abort", seen.aborted.finish),
        *expect("neighbour, finish reason", "length", seen.neighbour.finish),
        *expect("neighbour, tokens", seen.neighbour_asked, seen.neighbour.tokens),
    ]
    if seen.aborted.tokens >= seen.asked:
        wrong.append(
            Mismatch("aborted request", f"fewer than {seen.asked} tokens", str(seen.aborted.tokens))
        )
    if seen.seconds_to_end > 10:
        wrong.append(
            Mismatch("aborted request", "an end within 10 s", f"{seen.seconds_to_end:.1f} s")
        )
    return wrong


@register
class AbortEndsOne(Check[Aborted]):
    id = "stop/abort"
    sentence = "An abort ends its own request early and leaves another one that runs alone."
    observation = Aborted

    def observe(self, context: Context) -> Aborted:
        tag = uuid.uuid4().hex[:8]
        return abort_beside_neighbour(context.server.client, f"{tag}-first", f"{tag}-second")

    def judge(self, seen: Aborted) -> list[Mismatch]:
        return judge_aborted(seen)


@register
class AbortMatchesWholeIds(Check[Aborted]):
    id = "stop/abort-whole-id"
    sentence = "Aborting request 'x-1' leaves request 'x-10' alone."
    observation = Aborted

    def observe(self, context: Context) -> Aborted:
        tag = uuid.uuid4().hex[:8]
        return abort_beside_neighbour(context.server.client, f"{tag}-1", f"{tag}-10")

    def judge(self, seen: Aborted) -> list[Mismatch]:
        return judge_aborted(seen)
