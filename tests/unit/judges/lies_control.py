"""Lies of servers that the checks ``control/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

from alterations import (
    Alteration,
    at,
    put,
)

LIES = [
    Alteration(
        "control/pause",
        "the generation goes on while paused",
        put({"chunks_at_pause": 3, "chunks_at_resume": 31}),
        "events while paused: expected 0, got 28",
    ),
    Alteration(
        "control/pause",
        "the paused generation is ended",
        put({"paused.finish": "abort", "paused.tokens": 4}),
        "tokens after continue: expected 48, got 4",
    ),
    Alteration(
        "control/pause",
        "the answer is another one after continue",
        at("paused", do=lambda p: p.update(text=p["text"].replace("ten", "two", 1))),
        "text after continue: expected",
    ),
    Alteration(
        "control/pause",
        "the right answer for the wrong reason",
        put({"paused.finish": "stop"}),
        "finish reason: expected 'length', got 'stop'",
    ),
    Alteration(
        "control/pause",
        "says ready while paused",
        put({"ready_while_paused": 200}),
        "/ready while paused: expected 503, got 200",
    ),
    Alteration(
        "control/pause",
        "is never ready again",
        put({"ready_after": 503}),
        "/ready after continue: expected 200, got 503",
    ),
    Alteration(
        "control/pause",
        "waits for the end instead of pausing",
        put({"chunks_at_pause": 48, "chunks_at_resume": 48}),
        "running when it was paused: expected True, got False",
    ),
    Alteration(
        "control/api-key",
        "no key is asked for",
        put({"without_key.POST /generate": 200}),
        "POST /generate, without a key: expected 401, got 200",
    ),
    Alteration(
        "control/api-key",
        "any key will do",
        put({"wrong_key.GET /model_info": 200}),
        "GET /model_info, wrong key: expected 401, got 200",
    ),
    Alteration(
        "control/api-key",
        "the right key is refused",
        put({"with_key": 401}),
        "with the key: expected 200, got 401",
    ),
]

HARMLESS: list[Alteration] = []
