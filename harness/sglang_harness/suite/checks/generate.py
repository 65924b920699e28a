"""Does it generate the right tokens, however it is asked?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sglang_harness import oracle as oracles
from sglang_harness.client import Generation
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.lib.scored import (
    Scored,
    Tokens,
    largest_error,
    not_greedy,
    unequal,
    wrong_counts,
    wrong_logprobs,
)
from sglang_harness.traffic.at_once import at_once
from sglang_harness.verdict import Figure

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):",
    "Water boils at",
)
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def greedy(tokens: int) -> dict[str, object]:
    """Sampling parameters for exactly ``tokens`` most probable tokens."""
    return {**GREEDY, "max_new_tokens": tokens}


class ScoredAnswers(Observation):
    tokens: int
    answers: list[Scored]


@register
class GreedyTokens(Check[ScoredAnswers]):
    id = "generate/greedy-tokens"
    sentence = "At temperature 0 every token is the one that the oracle finds most probable."
    observation = ScoredAnswers
    gate = True

    def observe(self, context: Context) -> ScoredAnswers:
        tokens, oracle = 16, context.oracle
        answers = []
        for prompt in PROMPTS:
            answer = context.server.client.generate(prompt, sampling=greedy(tokens))
            ids = oracle.encode(prompt)
            answers.append(Scored.of(prompt, ids, answer, oracle, context.dtype))
        return ScoredAnswers(tokens=tokens, answers=answers)

    def judge(self, seen: ScoredAnswers) -> list[Mismatch]:
        wrong: list[Mismatch] = []
        for answer in seen.answers:
            where = repr(answer.prompt)
            wrong += wrong_counts(where, answer, seen.tokens)
            wrong += not_greedy(where, answer)
            wrong += expect(f"{where}, finish reason", "length", answer.finish)
        return wrong


class ScoredPrompt(Observation):
    sampled: Scored
    prompt_served: list[float | None]
    prompt_oracle: list[float]


@register
class Logprobs(Check[ScoredPrompt]):
    id = "generate/logprobs"
    sentence = (
        "The log-probabilities of sampled tokens and of the prompt are the oracle's, within "
        "the tolerance of the dtype."
    )
    observation = ScoredPrompt

    def observe(self, context: Context) -> ScoredPrompt:
        oracle, prompt = context.oracle, PROMPTS[1]
        ids = oracle.encode(prompt)
        answer = context.server.client.generate(
            ids,
            sampling={"temperature": 1.0, "ignore_eos": True, "max_new_tokens": 16},
            prompt_logprobs_from=0,
        )
        return ScoredPrompt(
            sampled=Scored.of(prompt, ids, answer, oracle, context.dtype),
            prompt_served=list(answer.prompt_logprobs),
            prompt_oracle=oracle.prompt_logprobs(ids),
        )

    def judge(self, seen: ScoredPrompt) -> list[Mismatch]:
        wrong = [
            *wrong_counts("sampled", seen.sampled, 16),
            *wrong_logprobs("sampled", seen.sampled),
        ]
        # The first token of a sequence follows nothing and has no log-probability.
        if len(seen.prompt_served) != len(seen.prompt_oracle) + 1:
            wrong.append(
                Mismatch(
                    "prompt",
                    f"{len(seen.prompt_oracle) + 1} log-probabilities, the first empty",
                    str(len(seen.prompt_served)),
                )
            )
            return wrong
        for place, reference in enumerate(seen.prompt_oracle, start=1):
            served = seen.prompt_served[place]
            if served is None or not abs(served - reference) <= seen.sampled.tolerance:
                wrong.append(
                    Mismatch(
                        f"prompt token {place}",
                        f"log-probability {reference:.6f}",
                        str(served),
                        f"tolerance {seen.sampled.tolerance:g}",
                    )
                )
        return wrong

    def figures(self, seen: ScoredPrompt) -> list[Figure]:
        error = largest_error([seen.sampled])
        return [Figure.of("largest log-probability error", "nats", "lower", error)]


class Pairs(Observation):
    """Two ways to ask the same thing; ``labels`` name the questions."""

    labels: list[str]
    expected: list[Tokens]
    got: list[Tokens]
    tolerance: float

    def mismatches(self) -> list[Mismatch]:
        if len(self.expected) != len(self.got):
            return [Mismatch("answers", str(len(self.expected)), str(len(self.got)))]
        wrong: list[Mismatch] = []
        for label, a, b in zip(self.labels, self.expected, self.got, strict=True):
            wrong += unequal(label, a, b, self.tolerance)
        return wrong


@register
class BatchEqualsSingle(Check[Pairs]):
    id = "generate/batch-equals-single"
    sentence = "Prompts sent together are answered as they are alone, in the order of the prompts."
    observation = Pairs

    def observe(self, context: Context) -> Pairs:
        client = context.server.client
        single = [client.generate(p, sampling=greedy(8), logprobs=True) for p in PROMPTS]
        # Answers of a warm cache would hide what the batch itself computes.
        context.empty_prefix_cache()
        batch = client.generate_batch(PROMPTS, sampling=greedy(8), logprobs=True)
        return Pairs(
            labels=list(PROMPTS),
            expected=[Tokens.of(a) for a in single],
            got=[Tokens.of(a) for a in batch],
            tolerance=oracles.tolerance(context.dtype),
        )

    def judge(self, seen: Pairs) -> list[Mismatch]:
        return seen.mismatches()


@register
class IdsEqualText(Check[Pairs]):
    id = "generate/ids-equal-text"
    sentence = "A prompt sent as token ids is answered as the same prompt sent as text."
    observation = Pairs

    def observe(self, context: Context) -> Pairs:
        client, prompt = context.server.client, PROMPTS[0]
        as_text = client.generate(prompt, sampling=greedy(8), logprobs=True)
        ids = context.oracle.encode(prompt)
        as_ids = client.generate(ids, sampling=greedy(8), logprobs=True)
        return Pairs(
            labels=[prompt],
            expected=[Tokens.of(as_text)],
            got=[Tokens.of(as_ids)],
            tolerance=oracles.tolerance(context.dtype),
        )

    def judge(self, seen: Pairs) -> list[Mismatch]:
        return seen.mismatches()


class Streamed(Observation):
    whole: Tokens
    chunk_texts: list[str]
    chunk_ids: list[list[int]]
    chunk_seconds: list[float]
    completion_tokens: int
    finish: str


@register
class StreamEqualsWhole(Check[Streamed]):
    id = "generate/stream-equals-whole"
    sentence = (
        "A streamed answer grows without taking anything back, and ends as the same answer "
        "that comes whole."
    )
    observation = Streamed

    def observe(self, context: Context) -> Streamed:
        client, prompt = context.server.client, PROMPTS[1]
        whole = client.generate(prompt, sampling=greedy(24))
        context.empty_prefix_cache()
        chunks = list(client.stream(prompt, sampling=greedy(24)))
        last = chunks[-1].data["meta_info"] if chunks else {}
        return Streamed(
            whole=Tokens.of(whole),
            chunk_texts=[c.text for c in chunks],
            chunk_ids=[list(c.output_ids) for c in chunks],
            chunk_seconds=[c.seconds for c in chunks],
            completion_tokens=int(last.get("completion_tokens", 0)),
            finish=str((last.get("finish_reason") or {}).get("type", "")),
        )

    def judge(self, seen: Streamed) -> list[Mismatch]:
        if not seen.chunk_texts:
            return [Mismatch("stream", "at least one event", "none")]
        wrong: list[Mismatch] = []
        for place, (before, after) in enumerate(
            zip(seen.chunk_texts, seen.chunk_texts[1:], strict=False), start=1
        ):
            # A character of several bytes may still be incomplete at the end of a chunk.
            if not after.startswith(before.rstrip("\ufffd")):
                wrong.append(
                    Mismatch(f"event {place}", f"text that begins {before!r}", repr(after))
                )
        ids = joined_ids(seen.chunk_ids, len(seen.whole.ids))
        wrong += expect("ids of the whole stream", seen.whole.ids, ids)
        wrong += expect("last text", seen.whole.text, seen.chunk_texts[-1])
        wrong += expect("completion_tokens", len(seen.whole.ids), seen.completion_tokens)
        wrong += expect("finish reason", seen.whole.finish, seen.finish)
        if len(seen.chunk_texts) < 3:
            wrong.append(Mismatch("events", "at least 3 for 24 tokens", str(len(seen.chunk_texts))))
        return wrong

    def figures(self, seen: Streamed) -> list[Figure]:
        if len(seen.chunk_seconds) < 3:
            return []
        first, last = seen.chunk_seconds[0], seen.chunk_seconds[-1]
        return [
            Figure.of("time to first token", "s", "lower", first),
            Figure.of(
                "tokens a second, one request",
                "1/s",
                "higher",
                (seen.completion_tokens - 1) / max(last - first, 1e-9),
            ),
        ]


def joined_ids(chunks: Sequence[Sequence[int]], expected: int) -> list[int]:
    """The ids of a stream, whether its events carry all ids so far or only the new ones."""
    if chunks and len(chunks[-1]) == expected:
        return list(chunks[-1])
    return [i for chunk in chunks for i in chunk]


class Concurrent(Observation):
    tokens: int
    answers: list[Scored]
    seconds: float


@register
class ConcurrentInOrder(Check[Concurrent]):
    id = "generate/32-at-once"
    sentence = "Of 32 requests at once each gets the right answer to its own prompt."
    observation = Concurrent

    def observe(self, context: Context) -> Concurrent:
        client, oracle, tokens = context.server.client, context.oracle, 4
        numbers = context.random(self.id).sample(range(100, 1000), 32)
        prompts = [f"Item number {n} in the list, counted from {n - 1}, is" for n in numbers]

        def ask(prompt: str) -> Generation:
            return client.generate(prompt, sampling=greedy(tokens), logprobs=True)

        started = time.monotonic()
        answers = at_once(ask, prompts)
        seconds = time.monotonic() - started
        # Scored afterwards: the oracle must not take the processor from the server.
        scored = [
            Scored.of(prompt, oracle.encode(prompt), answer, oracle, context.dtype)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return Concurrent(tokens=tokens, answers=scored, seconds=seconds)

    def judge(self, seen: Concurrent) -> list[Mismatch]:
        wrong: list[Mismatch] = []
        wrong += expect("answers", 32, len(seen.answers))
        for answer in seen.answers:
            where = repr(answer.prompt)
            wrong += wrong_counts(where, answer, seen.tokens)
            wrong += not_greedy(where, answer)
            wrong += wrong_logprobs(where, answer)
        return wrong

    def figures(self, seen: Concurrent) -> list[Figure]:
        rate = sum(len(a.output_ids) for a in seen.answers) / max(seen.seconds, 1e-9)
        return [Figure.of("tokens a second, 32 requests", "1/s", "higher", rate)]
