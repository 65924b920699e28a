"""Lies of servers that the checks ``launch/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

from alterations import (
    Alteration,
    at,
    put,
)

LIES = [
    Alteration(
        "launch/phases",
        "the first generation gave no token",
        put({"first_tokens": 0}),
        "tokens of the first generation: expected 2, got 0",
    ),
    Alteration(
        "launch/phases",
        "the first generation went on past its end",
        put({"first_tokens": 3}),
        "tokens of the first generation: expected 2, got 3",
    ),
    Alteration(
        "launch/readiness",
        "/ready takes it back and says it again",
        put({"afterwards": {"200": 30, "503": 9}}),
        "/ready afterwards: expected 200 every time, got 200 x 30, 503 x 9",
    ),
    Alteration(
        "launch/readiness",
        "/ready is not answered any more",
        put({"afterwards": {"no answer": 1}}),
        "/ready afterwards: expected 200 every time, got no answer x 1",
    ),
    Alteration(
        "launch/readiness",
        "ready when it was first asked",
        at("sightings", do=lambda s: s.__setitem__(slice(None), s[-1:])),
        "/ready: expected a refusal before the first 200, got ['200']",
    ),
    Alteration(
        "launch/readiness",
        "ready, and the first generation is refused",
        at("sightings", do=lambda s: s.append({**s[-1], "route": "/generate", "answer": "503"})),
        "generation after /ready: expected an answer, got 503",
    ),
    Alteration(
        "launch/server-info",
        "a share of memory that was not asked for",
        put({"info.mem-fraction-static": 0.9}),
        "--mem-fraction-static: expected 0.1, got 0.9",
    ),
    Alteration(
        "launch/server-info",
        "a switch that was not turned",
        put({"info.disable-overlap-schedule": False}),
        "--disable-overlap-schedule: expected True, got False",
    ),
    Alteration(
        "launch/server-info",
        "another dtype than asked for",
        put({"info.dtype": "bfloat16"}),
        "--dtype: expected float32, got bfloat16",
    ),
    Alteration(
        "launch/server-info",
        "another model than asked for",
        put({"info_model_path": "/models/tiny-2-seed1"}),
        "model_path: expected '/models/tiny-2-seed0', got '/models/tiny-2-seed1'",
    ),
    Alteration(
        "launch/server-info",
        "a GPU server that fell back to the CPU",
        put({"device": "cuda"}),
        "device: expected 'cuda', got 'cpu'",
    ),
    Alteration(
        "launch/server-info",
        "no version",
        put({"version": "unknown"}),
        "version: expected a version, got 'unknown'",
    ),
    Alteration(
        "launch/log",
        "a traceback",
        at("alarming", do=lambda lines: lines.append("Traceback (most recent call last):")),
        "log: expected no traceback, got Traceback (most recent call last):",
    ),
    Alteration("launch/log", "nothing in the log", put({"lines": 0}), "at least one line"),
    Alteration(
        "launch/stop",
        "killed in the end",
        put({"exit_code": 137}),
        "exit code: expected 0, got 137",
    ),
    Alteration(
        "launch/stop",
        "shared memory left behind",
        put({"left_behind": ["/dev/shm/psm_1f2e"]}),
        "left behind: expected [], got ['/dev/shm/psm_1f2e']",
    ),
    Alteration(
        "launch/stop",
        "later than the limit",
        put({"seconds": 31.0}),
        "end: expected within 30 s, got 31.0 s",
    ),
]

HARMLESS = [
    Alteration("launch/stop", "the last moment", put({"seconds": 30.0, "limit": 30.0})),
    Alteration(
        "launch/server-info",
        "a flag without a field of its own",
        put({"asked.tp": 1, "info.tp": None}),
    ),
    Alteration("launch/server-info", "a number as a text", put({"info.max-total-tokens": "4096"})),
    Alteration("launch/readiness", "it stays ready", put({"afterwards": {"200": 39}})),
    Alteration(
        "launch/readiness",
        "an older server without /ready",
        at(
            do=lambda e: (
                e.update(ready_by="/health"),
                [s.update(route="/health") for s in e["sightings"] if s["answer"] != "refused"],
            )
        ),
    ),
    Alteration(
        "launch/server-info", "a number as it was typed", put({"asked.mem-fraction-static": ".1"})
    ),
]
