"""Lies of servers that the checks ``stop/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

import copy
from typing import Any

from alterations import (
    Alteration,
    at,
    put,
)


def leaves_out_the_stop_token(evidence: dict[str, Any]) -> None:
    evidence["at_id"]["answer"]["ids"].pop()


LIES = [
    Alteration(
        "stop/conditions",
        "the stop string is ignored",
        at(do=lambda e: e["at_string"].update(answer=copy.deepcopy(e["whole"]), detail={})),
        "stop string, finish: expected 'stop', got 'length'",
    ),
    Alteration(
        "stop/conditions",
        "the stop string is left in the text",
        at("at_string", "answer", do=lambda a: a.update(text=a["text"] + "ive")),
        "stop string, text: expected",
    ),
    Alteration(
        "stop/conditions",
        "another stop string is named",
        put({"at_string.detail.matched": "iv"}),
        "stop string, matched: expected 'ive', got 'iv'",
    ),
    Alteration(
        "stop/conditions",
        "the stop token is ignored",
        at(do=lambda e: e["at_id"].update(answer=copy.deepcopy(e["whole"]), detail={})),
        "stop token, finish: expected 'stop', got 'length'",
    ),
    Alteration(
        "stop/conditions",
        "goes on for a token past the stop token",
        at("at_id", "answer", "ids", do=lambda ids: ids.append(181)),
        "stop token, ids: expected [237, 301, 312, 167], got [237, 301, 312, 167, 298, 181]",
    ),
    Alteration(
        "stop/conditions",
        "the stop token is not named",
        put({"at_id.detail": {}}),
        "stop token, matched: expected 298, got None",
    ),
    Alteration(
        "stop/conditions",
        "goes on past the end of the sequence",
        put({"at_eos.answer.ids": [1, 1, 1], "at_eos.answer.finish": "length"}),
        "end of sequence, tokens at most: expected True, got False",
    ),
    Alteration(
        "stop/conditions",
        "ends at the end of the sequence and calls it length",
        put({"at_eos.answer.finish": "length"}),
        "end of sequence, finish: expected 'stop', got 'length'",
    ),
    Alteration(
        "stop/conditions",
        "ignores the end of the sequence and names it all the same",
        put({"past_eos.answer.finish": "stop"}),
        "ignored end of sequence, finish: expected 'length', got 'stop'",
    ),
    Alteration(
        "stop/conditions",
        "ends at an ignored end of sequence",
        put({"past_eos.answer.ids": [1], "past_eos.answer.finish": "stop"}),
        "ignored end of sequence, tokens: expected 3, got 1",
    ),
    Alteration(
        "stop/conditions",
        "one token more than asked for",
        at("at_length", "answer", "ids", do=lambda ids: ids.append(181)),
        "length, ids: expected [237, 301, 312, 167, 298], got [237, 301, 312, 167, 298, 181]",
    ),
    Alteration(
        "stop/conditions",
        "the wrong reason for an end by length",
        put({"at_length.answer.finish": "stop"}),
        "length, finish: expected 'length', got 'stop'",
    ),
    *[
        lie
        for check in ("stop/abort", "stop/abort-whole-id")
        for lie in (
            Alteration(
                check,
                "the abort does nothing",
                put({"aborted.finish": "length", "aborted.tokens": 400}),
                "aborted request: expected fewer than 400 tokens, got 400",
            ),
            Alteration(
                check,
                "the abort ends its neighbour too",
                put({"neighbour.finish": "abort", "neighbour.tokens": 3}),
                "neighbour, finish reason: expected 'length', got 'abort'",
            ),
            Alteration(
                check,
                "the neighbour loses tokens and says nothing",
                put({"neighbour.tokens": 21}),
                "neighbour, tokens: expected 24, got 21",
            ),
            Alteration(
                check,
                "the abort is called a stop",
                put({"aborted.finish": "stop"}),
                "aborted request, finish reason: expected 'abort', got 'stop'",
            ),
            Alteration(
                check,
                "the abort takes half a minute",
                put({"seconds_to_end": 30.2}),
                "aborted request: expected an end within 10 s, got 30.2 s",
            ),
            Alteration(
                check,
                "the aborted request ends without a word",
                put({"aborted": {"text": "", "tokens": 0, "finish": "", "chunk_seconds": []}}),
                "aborted request, finish reason: expected 'abort', got ''",
            ),
        )
    ],
]

HARMLESS = [
    Alteration("stop/abort", "the last moment", put({"seconds_to_end": 10.0})),
    Alteration("stop/conditions", "the stop token is left out", leaves_out_the_stop_token),
    Alteration(
        "stop/conditions", "the end of sequence is left out", put({"at_eos.answer.ids": []})
    ),
]
