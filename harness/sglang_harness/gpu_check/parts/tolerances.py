"""How far served log-probabilities are from the float32 reference model, by dtype, batch and cache.

Small models give most of the tokens: their references take milliseconds an answer on a host's CPU.
The bf16 model made here gives fewer (its reference took 1.1 s an answer of 32 tokens on two cores):
rounding adds up over its 20 layers, of which the small ones' 2 to 4 say nothing.

The tiny model is saved in float32, so a server in half precision rounds its weights: to float16
by itself, to bfloat16 where it is told to. Tokens of prompts are judged by the same bounds as
generated ones, and are further off: the error of a probable token's logit is in the sum over all
tokens too, where it cancels; that of an improbable one's is not.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_harness.errors import HarnessError
from sglang_harness.gpu_check import distances
from sglang_harness.gpu_check.budget import within_share
from sglang_harness.gpu_check.distances import Condition, Measured, Token
from sglang_harness.gpu_check.part import NotHere, Part
from sglang_harness.gpu_check.served import MODEL_BYTES, model

if TYPE_CHECKING:
    from sglang_harness.client import Client, Generation
    from sglang_harness.gpu_check.context import Context
    from sglang_harness.oracle import Oracle, Scores

#: Prompts of one request, prompts that are sent one by one, and tokens of each answer.
BATCH, SINGLE, TOKENS = 32, 16, 32

#: Seconds for a start and one condition, without which another server is not started.
LEAST = 30.0

#: Share of what is left of the budget that all of it may take.
SHARE = 0.6

#: Seconds that are kept for writing down what was seen.
KEPT = 5.0

SEED = 20

#: Servers, by model and dtype, most valuable first. A rehearsal has float32, whose bound was
#: measured on a CPU; and its large model is small.
STARTS = {
    "gpu": (
        ("large", "bfloat16"),
        ("tiny", "float16"),
        ("small", "bfloat16"),
        ("large", "float16"),
        ("tiny", "bfloat16"),
    ),
    "cpu": (
        ("large", "bfloat16"),
        ("tiny", "float32"),
        ("large", "float32"),
        ("tiny", "bfloat16"),
    ),
}


@dataclass(frozen=True)
class Answer:
    """What a server generated, greedily."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int

    @classmethod
    def of(cls, prompt: Sequence[int], got: Generation) -> Answer:
        return cls(tuple(prompt), got.output_ids, got.logprobs, got.cached_tokens)


def prompts(count: int, first_id: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Of 8 to 64 tokens, the same in every run; no two begin with the same token, so none has a
    prefix of another in the cache.

    Args:
        first_id: ids below it are special tokens.
    """
    chosen = random.Random(SEED)  # noqa: S311 -- reproducible on purpose
    ids = range(first_id, vocabulary)
    return [
        (first, *chosen.choices(ids, k=chosen.randint(7, 63)))
        for first in chosen.sample(ids, count)
    ]


def tokens_of(answer: Answer, scores: Scores) -> list[Token]:
    """
    Raises:
        AssertionError: not every token has a log-probability.
    """
    assert len(answer.logprobs) == len(answer.ids), (
        f"expected {len(answer.ids)} log-probabilities, one a token, got {len(answer.logprobs)}"
    )
    return [
        Token(served, reference, 0.0 if token == best_id else max(0.0, best - reference))
        for token, served, reference, best_id, best in zip(
            answer.ids,
            answer.logprobs,
            scores.logprobs,
            scores.best_ids,
            scores.best_logprobs,
            strict=True,
        )
    ]


def why_not_cached(answers: Sequence[Answer], cached: bool) -> str:
    """Why the answers do not show what they are to show; empty where they do."""
    if cached:
        without = sum(answer.cached == 0 for answer in answers)
        return f"{without} of {len(answers)} prompts were not in the prefix cache" * bool(without)
    found = sum(answer.cached > 0 for answer in answers)
    return f"{found} of {len(answers)} prompts were in the emptied prefix cache" * bool(found)


def ask(client: Client, asked: Sequence[Sequence[int]], batch: int, cached: bool) -> list[Answer]:
    """Answers to ``asked``, ``batch`` at a time, out of the prefix cache or with none."""
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    found: list[Answer] = []
    for first in range(0, len(asked), batch):
        now = [list(prompt) for prompt in asked[first : first + batch]]
        client.flush_cache()
        for _ in range(2 if cached else 1):
            if batch == 1:
                got = [client.generate(now[0], sampling=sampling, logprobs=True)]
            else:
                got = client.generate_batch(now, sampling=sampling, logprobs=True)
        found += [Answer.of(p, g) for p, g in zip(now, got, strict=True)]
    return found


def of_prompts(
    client: Client, oracle: Oracle, asked: Sequence[Sequence[int]], within: float
) -> list[Token]:
    """The tokens of as many prompts as can be scored within that time (seconds), one at least; not
    their first ones, which follow nothing."""
    until, found = time.monotonic() + within, list[Token]()
    for prompt in asked:
        if found and time.monotonic() > until:
            break
        got = client.generate(
            list(prompt), sampling={"temperature": 0, "max_new_tokens": 1}, prompt_logprobs_from=0
        )
        expected = oracle.prompt_logprobs(prompt)
        served = [math.nan if each is None else each for each in got.prompt_logprobs[1:]]
        assert len(served) == len(expected), (
            f"expected {len(expected)} log-probabilities of a prompt, got {len(served)}"
        )
        found += [Token(s, e, 0.0) for s, e in zip(served, expected, strict=True)]
    return found


class Scoring:
    """The reference model's scores, each answer once.

    Attributes:
        seconds, passes: what they took.
    """

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Scores] = {}
        self.seconds, self.passes = 0.0, 0

    def score(self, answers: Sequence[Answer], within: float) -> list[Token]:
        """Of as many answers as can be scored within that time (seconds), and of one at least."""
        until, found = time.monotonic() + within, list[Token]()
        for answer in answers:
            key = (answer.prompt, answer.ids)
            if key not in self._known:
                if found and time.monotonic() > until:
                    break
                began = time.monotonic()
                self._known[key] = self._oracle.score(answer.prompt, answer.ids)
                self.seconds += time.monotonic() - began
                self.passes += 1
            found += tokens_of(answer, self._known[key])
        return found


def measure(context: Context) -> dict[str, Any]:
    """The part ``tolerances``."""
    from sglang_harness import oracle

    rows: list[Measured] = []
    models = {"tiny": "tiny", "small": "random-small", "large": model(context)}
    starts = STARTS[context.settings.device]
    until = time.monotonic() + within_share(context, SHARE, least=LEAST)

    def left() -> float:
        return min(until - time.monotonic(), context.left()) - KEPT

    for number, (name, dtype) in enumerate(starts):
        rounded = name == "tiny" and dtype != "float32"
        conditions = [
            Condition(name, dtype, batch, cached, rounded)
            for batch in (1, BATCH)
            for cached in (False, True)
        ]
        conditions.append(Condition(name, dtype, 1, False, rounded, prompt=True))
        fair = left() / (len(starts) - number)
        if left() < LEAST * context.settings.slow:
            why = f"{max(0.0, left()):.0f} s left"
            rows += [Measured(each, why_not=why) for each in conditions]
            continue
        rows += _of_one_server(context, models[name], conditions, fair)
        context.put("rows", rows)
    found = distances.proposals(rows, oracle.TOLERANCE)
    context.put("proposals", found)
    _tell(context, rows, found)
    wrong = [distances.uncovered(found)]
    wrong += [f"{row.condition}: {row.why_not}" for row in rows if row.failed]
    assert not any(wrong), "; ".join(filter(None, wrong))
    lacking = [f"{row.condition}: {row.why_not}" for row in rows if row.why_not]
    if lacking:
        raise NotHere(
            f"{len(rows) - len(lacking)} of {len(rows)} conditions were measured, and are within "
            f"the bounds in use; not measured: {'; '.join(lacking)}"
        )
    return {"rule": distances.RULE}


def _of_one_server(
    context: Context, served: str, conditions: list[Condition], fair: float
) -> list[Measured]:
    """Args: fair: seconds that this server may take of the part's."""
    from sglang_harness import oracle

    began, found = time.monotonic(), list[Measured]()
    dtype = conditions[0].dtype
    try:
        server = context.server(model=served, server_args={"dtype": dtype})
    except (HarnessError, NotHere) as error:
        failed = isinstance(error, HarnessError)
        return [Measured(each, f"no server: {error}", failed=failed) for each in conditions]
    assert server.model is not None, "it serves a model of this machine"
    reference = oracle.for_folder(server.model)
    context.say(f"{conditions[0].model} {dtype}: up after {time.monotonic() - began:.1f} s")
    vocabulary = len(reference.tokenizer)
    asked = prompts(BATCH, len(reference.tokenizer.all_special_ids), vocabulary)
    scoring = Scoring(reference)
    for number, condition in enumerate(conditions):
        left = min(fair - (time.monotonic() - began), context.left() - KEPT)
        within = left / (len(conditions) - number)
        these = asked if condition.batch > 1 else asked[:SINGLE]
        if condition.prompt:
            tokens = of_prompts(server.client, reference, these, within)
            found.append(distances.measured(condition, tokens, 0))
            context.say(f"{condition}: {found[-1].tokens} tokens, {found[-1].largest:.3g} at most")
            continue
        answers = ask(server.client, these, condition.batch, condition.cached)
        cached = sum(answer.cached for answer in answers)
        if why := why_not_cached(answers, condition.cached):
            found.append(Measured(condition, why_not=why, cached_tokens=cached))
            continue
        tokens = scoring.score(answers, within)
        found.append(distances.measured(condition, tokens, cached))
        context.say(f"{condition}: {found[-1].tokens} tokens, {found[-1].largest:.3g} at most")
    context.put(
        f"reference of {conditions[0].model} {dtype}",
        {"passes": scoring.passes, "seconds": round(scoring.seconds, 2)},
    )
    return found


def _tell(context: Context, rows: list[Measured], found: list[distances.Proposal]) -> None:
    where = "" if context.on_gpu else "CPU: "
    line = "; ".join(
        f"{each.dtype} {each.largest:.3g} at most over {each.tokens} tokens (bound "
        f"{each.in_use:g}, proposed {each.proposed:g})"
        for each in found
    )
    context.headline(where + (line or "nothing was measured"))
    for row in rows:
        told = row.why_not or (
            f"p50 {row.percentiles['p50']:.2g}, p99.9 {row.percentiles['p99.9']:.2g}, max "
            f"{row.largest:.3g} over {row.tokens} tokens"
        )
        if not row.why_not and not row.condition.prompt:  # nobody chose the tokens of a prompt
            told += f", {row.not_best} not the most probable (by {row.furthest_behind:.2g} at most)"
        context.note("tolerances", where + str(row.condition), told)
    for each in found:
        context.note("tolerances", f"{where}proposed bound for {each.dtype}", f"{each.proposed:g}")


PART = Part(
    name="tolerances",
    asks="Do the bounds that log-probabilities are judged with cover what is measured?",
    seconds=240,
    run=measure,
    needs=frozenset({"release"}),
    scope="release",
    disk_bytes=MODEL_BYTES,
    least=60,
)
