"""Does the server sample as it is told to?"""

from __future__ import annotations

import math

from sglang_harness.client import calls
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.needs import launched_with


class SeededAnswers(Observation):
    first: list[int]
    again: list[int]
    in_company: list[int]
    other_seeds: list[list[int]]


@register
class SeededSamplingRepeats(Check[SeededAnswers]):
    id = "sample/seed-repeats"
    sentence = "A sampling_seed gives the same tokens each time, alone or in a batch."
    observation = SeededAnswers
    needs = (
        launched_with(
            "enable-deterministic-inference", "SGLang then takes sampling_seed and ignores it"
        ),
    )

    def observe(self, context: Context) -> SeededAnswers:
        client = context.server.client

        def sampling(seed: int) -> dict[str, object]:
            return {
                "temperature": 1.0,
                "max_new_tokens": 12,
                "ignore_eos": True,
                "sampling_seed": seed,
            }

        def ask(seed: int) -> list[int]:
            return list(client.generate(PROMPTS[1], sampling=sampling(seed)).output_ids)

        batch = client.generate_batch([PROMPTS[1], *PROMPTS], sampling=sampling(7))
        return SeededAnswers(
            first=ask(7),
            again=ask(7),
            in_company=list(batch[0].output_ids),
            other_seeds=[ask(seed) for seed in (8, 9, 10)],
        )

    def judge(self, seen: SeededAnswers) -> list[Mismatch]:
        wrong = [
            *expect("the same seed again", seen.first, seen.again),
            *expect("the same seed in a batch", seen.first, seen.in_company),
        ]
        if all(other == seen.first for other in seen.other_seeds):
            wrong.append(Mismatch("other seeds", "other tokens", f"{seen.first} for every seed"))
        return wrong


class SampledTokens(Observation):
    sampled: list[int]
    likely_ids: list[int]
    """The oracle's most probable tokens: together at least 0.4 of the probability."""
    likely_probability: float
    greedy_ids: list[int]
    top_k_1_ids: list[int]


@register
class SamplingFollowsOracle(Check[SampledTokens]):
    id = "sample/follows-oracle"
    sentence = (
        "At temperature 1 tokens come as often as the reference model says; with top_k 1 sampling "
        "is greedy."
    )
    observation = SampledTokens

    def observe(self, context: Context) -> SampledTokens:
        client, prompt = context.server.client, PROMPTS[3]
        answers = client.send(
            calls.generate_samples(
                prompt,
                96,
                sampling={"temperature": 1.0, "max_new_tokens": 1, "ignore_eos": True},
            )
        )
        probabilities = context.oracle.next_token_probabilities(context.oracle.encode(prompt))
        likely: list[int] = []
        total = 0.0
        for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
            if total >= 0.4:
                break
            likely.append(token)
            total += probabilities[token]
        context.empty_prefix_cache()
        top_k_1 = client.generate(prompt, sampling={**greedy(8), "temperature": 1.0, "top_k": 1})
        context.empty_prefix_cache()
        most_probable = client.generate(prompt, sampling=greedy(8))
        return SampledTokens(
            sampled=[a.output_ids[0] for a in answers if a.output_ids],
            likely_ids=likely,
            likely_probability=total,
            greedy_ids=list(most_probable.output_ids),
            top_k_1_ids=list(top_k_1.output_ids),
        )

    def judge(self, seen: SampledTokens) -> list[Mismatch]:
        wrong = [
            *expect("number of samples", 96, len(seen.sampled)),
            *expect("top_k 1", seen.greedy_ids, seen.top_k_1_ids),
        ]
        count, p = len(seen.sampled), seen.likely_probability
        hits = sum(token in set(seen.likely_ids) for token in seen.sampled)
        # Five standard deviations: a right server is refused once in millions of runs.
        allowed = 5 * math.sqrt(count * p * (1 - p)) + 1
        if abs(hits - count * p) > allowed:
            wrong.append(
                Mismatch(
                    f"samples among the {len(seen.likely_ids)} likeliest tokens",
                    f"{count * p:.0f} of {count}, give or take {allowed:.0f}",
                    str(hits),
                )
            )
        return wrong
