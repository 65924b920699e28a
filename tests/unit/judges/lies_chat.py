"""Lies of servers that the checks ``chat/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

from alterations import (
    Alteration,
    at,
    put,
)

LIES = [
    Alteration(
        "chat/equals-native",
        "the template is applied twice",
        put({"whole": " quick", "whole_prompt_tokens": 61}),
        "prompt tokens: expected 42, got 61",
    ),
    Alteration(
        "chat/equals-native",
        "another answer than the native one",
        put({"whole": " quick"}),
        "text: expected ' fob-",
    ),
    Alteration(
        "chat/equals-native",
        "the stream loses its last piece",
        at(do=lambda e: e.update(streamed=e["streamed"][:-1])),
        "streamed text: expected ' fob-",
    ),
    Alteration(
        "chat/equals-native",
        "completion_tokens lies",
        put({"whole_completion_tokens": 13}),
        "completion tokens: expected 12, got 13",
    ),
    Alteration(
        "chat/equals-native",
        "the wrong finish reason",
        put({"finish": "stop"}),
        "finish reason: expected 'length', got 'stop'",
    ),
    Alteration(
        "chat/equals-native",
        "a stream that never says why it ends",
        put({"streamed_finish": ""}),
        "finish reason of the stream: expected 'length', got ''",
    ),
    Alteration(
        "chat/equals-native",
        "a stream of two events",
        put({"streamed_chunks": 2}),
        "events of the stream: expected at least 3 for 12 tokens, got 2",
    ),
    Alteration(
        "chat/completions-equal-native",
        "the prompt is echoed",
        at(do=lambda e: e.update(completion="The capital of France is" + e["completion"])),
        "got 'The capital of France is three",
    ),
    Alteration(
        "chat/completions-equal-native",
        "the prompt is taken for a chat",
        put({"completion_prompt_tokens": 37}),
        "prompt tokens: expected 18, got 37",
    ),
    Alteration(
        "chat/json-schema",
        "cut in the middle",
        at(do=lambda e: e.update(text=e["text"][:-4], finish="length")),
        "answer: expected JSON, got",
    ),
    Alteration(
        "chat/json-schema",
        "words around the JSON",
        at(do=lambda e: e.update(text="Here it is: " + e["text"])),
        "answer: expected JSON, got 'Here it is",
    ),
    Alteration(
        "chat/json-schema",
        "a value that the schema does not list",
        put({"text": '{"city": "Oslo", "certain": true, "stars": 2}'}),
        "'Oslo' is not one of ['Paris', 'Rome', 'Berlin']",
    ),
    Alteration(
        "chat/json-schema",
        "a field that is not there",
        put({"text": '{"city": "Rome", "certain": true}'}),
        "'stars' is a required property",
    ),
    Alteration(
        "chat/json-schema",
        "a field too many",
        put({"text": '{"city": "Rome", "certain": true, "stars": 2, "and": 1}'}),
        "Additional properties are not allowed",
    ),
    Alteration(
        "chat/json-schema",
        "whole, and said to be cut",
        put({"finish": "length"}),
        "finish reason: expected 'stop', got 'length'",
    ),
    Alteration("chat/json-schema", "no answer", put({"text": ""}), "expected JSON, got ''"),
]

HARMLESS: list[Alteration] = []
