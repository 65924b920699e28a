"""Lies of servers that the checks ``sample/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

from typing import Any

from alterations import (
    Alteration,
    at,
    put,
)


def evenly_sampled(evidence: dict[str, Any]) -> None:
    """Of 373 tokens that are as likely as one another, four of 96 are among the right fifteen."""
    likely = evidence["likely_ids"]
    evidence["sampled"] = [i for i in range(300) if i not in likely][:92] + likely[:4]


LIES = [
    Alteration(
        "sample/seed-repeats",
        "the seed is ignored",
        put({"again": [4, 5, 6, 7]}),
        "the same seed again: expected [237, 12, 90, 301], got [4, 5, 6, 7]",
    ),
    Alteration(
        "sample/seed-repeats",
        "company changes the answer",
        put({"in_company.3": 9}),
        "the same seed in a batch: expected [237, 12, 90, 301], got [237, 12, 90, 9]",
    ),
    Alteration(
        "sample/seed-repeats",
        "every seed is the same one",
        put({"other_seeds": [[237, 12, 90, 301]] * 3}),
        "other seeds: expected other tokens",
    ),
    Alteration(
        "sample/follows-oracle",
        "temperature is ignored: always the likeliest token",
        put({"sampled": [166] * 96}),
        "samples among the 15 likeliest tokens: expected 40 of 96, give or take 25, got 96",
    ),
    Alteration(
        "sample/follows-oracle",
        "every token is as likely as another",
        evenly_sampled,
        "give or take 25, got 4",
    ),
    Alteration(
        "sample/follows-oracle",
        "samples are missing",
        at("sampled", do=lambda s: s.__delitem__(slice(90, None))),
        "number of samples: expected 96, got 90",
    ),
    Alteration(
        "sample/follows-oracle",
        "no sample at all",
        put({"sampled": []}),
        "number of samples: expected 96, got 0",
    ),
    Alteration(
        "sample/follows-oracle",
        "top_k is ignored",
        put({"top_k_1_ids.2": 3}),
        "top_k 1: expected [166, 143, 181",
    ),
]

HARMLESS: list[Alteration] = []
