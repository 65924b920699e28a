"""Lies of servers that the checks ``generate/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from alterations import (
    Alteration,
    at,
    cut,
    off_by,
    other_tokens,
    put,
    shift,
    swap,
)


def swap_neighbours(evidence: dict[str, Any]) -> None:
    """Two requests that ran together get each other's answer."""
    first, second = evidence["answers"][:2]
    swap(first, second, ("output_ids", "served", "served_ids", "text"))
    # To each oracle the other's tokens come as a surprise.
    for answer in (first, second):
        answer["oracle"] = [best - 4.0 for best in answer["best"]]


def as_increments(evidence: dict[str, Any]) -> None:
    """The stream of a server whose events carry only what is new."""
    ids = evidence["whole"]["ids"]
    evidence["chunk_ids"] = [ids[:2], *([i] for i in ids[2:])]


def lose_an_increment(evidence: dict[str, Any]) -> None:
    as_increments(evidence)
    del evidence["chunk_ids"][7]


def repeat_an_increment(evidence: dict[str, Any]) -> None:
    as_increments(evidence)
    evidence["chunk_ids"].insert(7, evidence["chunk_ids"][7])


def lose_text(evidence: dict[str, Any]) -> None:
    """The pieces of one event are missing in every text after it."""
    texts = evidence["chunk_texts"]
    evidence["chunk_texts"] = [*texts[:2], *(t.replace("ick", "", 1) for t in texts[2:])]


def repeat_text(evidence: dict[str, Any]) -> None:
    """A piece is sent twice, so every text after it holds it twice."""
    texts = evidence["chunk_texts"]
    evidence["chunk_texts"] = [*texts[:5], *(t.replace("ick", "ickick", 1) for t in texts[5:])]


def in_events(number: int) -> Callable[[dict[str, Any]], object]:
    """The stream is held back, and comes in a few events at its end."""

    def alter(evidence: dict[str, Any]) -> None:
        for key in ("chunk_texts", "chunk_ids", "chunk_seconds"):
            evidence[key] = evidence[key][-number:]

    return alter


def no_events(evidence: dict[str, Any]) -> None:
    put({"chunk_texts": [], "chunk_ids": [], "chunk_seconds": []})(evidence)
    put({"completion_tokens": 0, "finish": ""})(evidence)


def near_tie(evidence: dict[str, Any]) -> None:
    """Another token than the oracle's, as probable as it within the tolerance."""
    answer = evidence["answers"][0]
    answer["output_ids"][4] += 1
    answer["oracle"][4] = answer["best"][4] - 1.5 * answer["tolerance"]


def tie_turned_by_the_batch(evidence: dict[str, Any]) -> None:
    """Equally probable tokens change places, and from there on the answers go apart."""
    got = evidence["got"][1]
    got["ids"][5:] = [9, 8, 7]
    got["logprobs"][5] += 4e-4
    got["logprobs"][6:] = [-0.1, -7.0]
    got["text"] = "another end"


def half_a_character(evidence: dict[str, Any]) -> None:
    """An event ends within a character of several bytes; the next one completes it."""
    texts = evidence["chunk_texts"]
    whole = texts[-1]
    put({"whole.text": whole + "é", "chunk_texts": [*texts[:-1], whole + "\ufffd", whole + "é"]})(
        evidence
    )


LIES = [
    Alteration(
        "generate/greedy-tokens",
        "q and k swapped",
        at("answers", do=lambda answers: [other_tokens(a) for a in answers]),
        "'The capital of France is', token 0: expected token 366",
    ),
    Alteration(
        "generate/greedy-tokens",
        "one wrong token in the last answer",
        put({"answers.3.output_ids.9": 7, "answers.3.oracle.9": -9.5}),
        "'Water boils at', token 9:",
    ),
    Alteration(
        "generate/greedy-tokens",
        "one token too few",
        at("answers", 1, do=lambda a: cut(a, 15)),
        "expected 16 tokens, got 15 tokens",
    ),
    Alteration(
        "generate/greedy-tokens",
        "no token at all",
        at("answers", 1, do=lambda a: cut(a, 0)),
        "expected 16 tokens, got 0 tokens",
    ),
    Alteration(
        "generate/greedy-tokens",
        "completion_tokens lies",
        put({"answers.2.completion_tokens": 17}),
        "expected completion_tokens 16, as many as came, got 17",
    ),
    Alteration(
        "generate/greedy-tokens",
        "a beginning-of-sequence token put before the prompt",
        put({"answers.0.prompt_tokens": 19}),
        "expected prompt_tokens 18, got 19",
    ),
    Alteration(
        "generate/greedy-tokens",
        "ended at an ignored end-of-sequence token",
        put({"answers.0.finish": "stop"}),
        "finish reason: expected 'length', got 'stop'",
    ),
    Alteration(
        "generate/logprobs",
        "a log-probability off by a hundredth",
        off_by(0.01, "sampled", "served", 5),
        "sampled, token 5 (",
    ),
    Alteration(
        "generate/logprobs",
        "every log-probability belongs to the next token",
        at("sampled", "served", do=shift),
        "sampled, token 0 (",
    ),
    Alteration(
        "generate/logprobs",
        "log-probabilities of other tokens than were sent",
        at("sampled", "served_ids", do=shift),
        "sampled: expected log-probabilities of the tokens [",
    ),
    Alteration(
        "generate/logprobs",
        "log-probabilities left out",
        put({"sampled.served": [], "sampled.served_ids": []}),
        "got of []",
    ),
    Alteration(
        "generate/logprobs",
        "a log-probability that is no number",
        put({"sampled.served.3": math.nan}),
        "sampled, token 3 (",
    ),
    Alteration(
        "generate/logprobs",
        "logarithms to the base of two",
        at("sampled", do=lambda s: s.update(served=[v / math.log(2) for v in s["served"]])),
        "sampled, token 15 (",
    ),
    Alteration(
        "generate/logprobs",
        "the prompt's log-probabilities stand one place too early",
        at("prompt_served", do=shift),
        "prompt token 1: expected log-probability -6.519",
    ),
    Alteration(
        "generate/logprobs",
        "the prompt's first log-probability left out, the rest moved up",
        at("prompt_served", do=lambda values: values.pop(0)),
        "prompt: expected 42 log-probabilities, the first empty, got 41",
    ),
    Alteration(
        "generate/logprobs",
        "a prompt token without a log-probability",
        put({"prompt_served.8": None}),
        "got None",
    ),
    Alteration(
        "generate/logprobs",
        "a prompt token with one that is no number",
        put({"prompt_served.41": math.nan}),
        "prompt token 41: ",
    ),
    Alteration(
        "generate/logprobs",
        "fewer tokens than asked for",
        at("sampled", do=lambda a: cut(a, 4)),
        "sampled: expected 16 tokens, got 4 tokens",
    ),
    Alteration(
        "generate/batch-equals-single",
        "two answers of a batch swapped",
        at("got", do=lambda got: got.insert(0, got.pop(1))),
        "The capital of France is, token 0: expected token 366, got token 237",
    ),
    Alteration(
        "generate/batch-equals-single",
        "padding leaks into a log-probability",
        off_by(-0.01, "got", 2, "logprobs", 6),
        "def fibonacci(n):, token 6 (367): expected log-probability",
    ),
    Alteration(
        "generate/batch-equals-single",
        "a log-probability in a batch is no number",
        put({"got.1.logprobs.7": math.nan}),
        "off by nan",
    ),
    Alteration(
        "generate/batch-equals-single",
        "the right ids and another's text",
        at("got", do=lambda got: swap(got[0], got[1], ("text",))),
        "The capital of France is: expected text ' three",
    ),
    Alteration(
        "generate/ids-equal-text",
        "a beginning-of-sequence token put before ids",
        put({"got.0.ids.0": 12, "got.0.logprobs.0": -1.25}),
        "token 0: expected token 366, got token 12",
    ),
    Alteration(
        "generate/ids-equal-text",
        "a log-probability off by a hundredth",
        off_by(0.01, "got", 0, "logprobs", 4),
        "off by 0.010",
    ),
    Alteration(
        "generate/ids-equal-text",
        "the last token lost",
        at("got", 0, do=lambda t: (t["ids"].pop(), t["logprobs"].pop())),
        "expected 8 tokens, got 7 tokens",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "an event's text lost",
        lose_text,
        "last text: expected",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "an event's text sent twice",
        repeat_text,
        "event 5: expected text that begins",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "an event's ids lost",
        lose_an_increment,
        "ids of the whole stream: expected [237, 301, 312,",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "an event's ids sent twice",
        repeat_an_increment,
        "ids of the whole stream: expected [237, 301, 312,",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "the last event is lost",
        at(do=lambda e: [e[k].pop() for k in ("chunk_texts", "chunk_ids", "chunk_seconds")]),
        "last text: expected",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "completion_tokens lies",
        put({"completion_tokens": 23}),
        "completion_tokens: expected 24, got 23",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "ends without a reason",
        put({"finish": ""}),
        "finish reason: expected 'length', got ''",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "held back and sent in two events",
        in_events(2),
        "events: expected at least 3 for 24 tokens, got 2",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "a stream of nothing",
        no_events,
        "stream: expected at least one event, got none",
    ),
    Alteration(
        "generate/32-at-once",
        "two requests get each other's answer",
        swap_neighbours,
        "'Item number 723 in the list, counted from 722, is', token 0: expected token 347",
    ),
    Alteration(
        "generate/32-at-once",
        "two requests get each other's log-probabilities",
        at("answers", do=lambda a: swap(a[3], a[4], ("served",))),
        "token 0 (",
    ),
    Alteration(
        "generate/32-at-once",
        "one answer is cut short",
        at("answers", 30, do=lambda a: cut(a, 2)),
        "expected 4 tokens, got 2 tokens",
    ),
    Alteration(
        "generate/32-at-once",
        "one log-probability of a hundred and twenty-eight is no number",
        put({"answers.31.served.3": math.nan}),
        "got nan",
    ),
]

HARMLESS = [
    Alteration("generate/greedy-tokens", "a near tie goes the other way", near_tie),
    Alteration("generate/batch-equals-single", "a near tie turns", tie_turned_by_the_batch),
    Alteration("generate/stream-equals-whole", "events carry only what is new", as_increments),
    Alteration("generate/stream-equals-whole", "half of a character", half_a_character),
    Alteration("generate/stream-equals-whole", "few events", in_events(3)),
    Alteration("generate/32-at-once", "a prefix was cached", put({"answers.0.cached_tokens": 30})),
]
