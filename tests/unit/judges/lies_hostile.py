"""Lies of servers that the checks ``hostile/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

from alterations import (
    Alteration,
    at,
    off_by,
    put,
)

LIES = [
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the request kills the server",
        put({"death": "The server ended (exit code 137).", "status": None, "after": None}),
        "the server: expected to stay up, got The server ended (exit code 137).",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the request is answered as if it were right",
        put({"status": 200, "reason": ""}),
        "answer: expected a refusal (4xx), got 200",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the request is never answered",
        put({"status": None, "reason": "no answer within 20 s"}),
        "answer: expected a refusal (4xx), got None no answer within 20 s",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the server lives on and answers other tokens",
        put({"after.ids.0": 3, "after.logprobs.0": -0.5}),
        "answer afterwards, token 0: expected token 177, got token 3",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the server lives on and scores otherwise",
        off_by(0.01, "after", "logprobs", 5),
        "answer afterwards, token 5 (154): expected log-probability",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the server lives on and answers nothing any more",
        put({"after": None}),
        "answer afterwards: expected one, got none",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the server lives on and its answers are cut short",
        at("after", do=lambda t: (t["ids"].pop(), t["logprobs"].pop())),
        "answer afterwards: expected 6 tokens, got 5 tokens",
    ),
]

HARMLESS: list[Alteration] = []
