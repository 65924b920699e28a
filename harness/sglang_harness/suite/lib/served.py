"""What a check asks a server that it started: everything that the oracle can score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from sglang_harness.client import Generation
from sglang_harness.oracle import Oracle
from sglang_harness.server import Server
from sglang_harness.suite.check import Context, Mismatch, Observation, dtype_of, expect
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.scored import (
    Scored,
    largest_error,
    not_greedy,
    wrong_counts,
    wrong_logprobs,
)
from sglang_harness.verdict import Figure

TOKENS = 12


class Served(Observation):
    """A server that the check started, and the oracle of its model."""

    never_came_up: str = ""
    """How it ended at its start, or that it never answered; empty when it came up."""
    start_seconds: float = 0.0
    """From its creation to its first generation."""
    asked: dict[str, Any] = Field(default_factory=dict)
    """Flags that it was started with, by the names that ``/server_info`` has for them."""
    stated: dict[str, Any] = Field(default_factory=dict)
    """What it says of them."""
    architecture: str = ""
    """The checkpoint's, by its ``config.json``."""
    stated_architectures: list[str] = Field(default_factory=list)
    """What ``/model_info`` says."""
    alone: list[Scored] = Field(default_factory=list)
    """Each prompt in a request of its own."""
    together: list[Scored] = Field(default_factory=list)
    """All prompts in one request, with an empty cache."""


def observe_served(
    context: Context, server: Server, seen: Served, *, oracle: Oracle | None = None
) -> Oracle:
    """Asks ``server`` all prompts alone and together, and fills ``seen`` with what came.

    Raises:
        NotProvided: its reference model cannot be made here.
    """
    oracle = oracle or context.oracle_of(server)
    client, dtype = server.client, dtype_of(server)
    info, model = client.server_info(), client.model_info()
    seen.start_seconds = sum(phase.seconds for phase in server.report.phases)
    seen.stated = {name: info.get(name) for name in seen.asked}
    seen.architecture = oracle.architecture
    seen.stated_architectures = [str(a) for a in model.get("architectures") or ()]
    alone = [client.generate(p, sampling=greedy(TOKENS), logprobs=True) for p in PROMPTS]
    # Answers of a warm cache would hide what the batch itself computes.
    client.flush_cache()
    together = client.generate_batch(PROMPTS, sampling=greedy(TOKENS), logprobs=True)
    seen.alone = scored(PROMPTS, alone, oracle, dtype)
    seen.together = scored(PROMPTS, together, oracle, dtype)
    return oracle


def scored(
    prompts: Sequence[str], answers: Sequence[Generation], oracle: Oracle, dtype: str
) -> list[Scored]:
    """Each answer with the oracle's scores."""
    return [
        Scored.of(prompt, oracle.encode(prompt), answer, oracle, dtype)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def wrong_served(seen: Served) -> list[Mismatch]:
    """Everything that is not as the oracle has it, or that the server never came up."""
    if seen.never_came_up:
        return [Mismatch("the server", "to come up", seen.never_came_up)]
    wrong: list[Mismatch] = []
    for name, value in seen.asked.items():
        wrong += expect(f"--{name.replace('_', '-')}", value, seen.stated.get(name))
    # Older servers do not say.
    if seen.stated_architectures:
        wrong += expect("architectures", [seen.architecture], seen.stated_architectures)
    wrong += wrong_answers("alone", seen.alone, len(PROMPTS))
    wrong += wrong_answers("in a batch", seen.together, len(PROMPTS))
    return wrong


def wrong_answers(how: str, answers: Sequence[Scored], number: int) -> list[Mismatch]:
    """Each answer has as many tokens as were asked for, the most probable ones, with the right
    log-probabilities."""
    wrong = list(expect(f"answers {how}", number, len(answers)))
    for answer in answers:
        where = f"{answer.prompt!r} {how}"
        wrong += wrong_counts(where, answer, TOKENS)
        wrong += not_greedy(where, answer)
        wrong += wrong_logprobs(where, answer)
    return wrong


def figures_of(check_id: str, seen: Served) -> list[Figure]:
    """How long the start took, and how far the worst log-probability was off."""
    if seen.never_came_up:
        return []
    return [
        Figure.of(f"{check_id}: start", "s", "lower", seen.start_seconds),
        Figure.of(
            f"{check_id}: largest log-probability error",
            "nats",
            "lower",
            largest_error([*seen.alone, *seen.together]),
        ),
    ]
