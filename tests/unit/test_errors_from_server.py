"""Every error answer becomes one of a few typed errors with the server's own message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scripted_server import DONE, Answer, ScriptedServer, event

from sglang_harness.client import Client, RequestsTransport, calls
from sglang_harness.client.call import Call
from sglang_harness.errors import BadAnswer, Refused, Unreachable

GENERATION = {
    "text": " a fox",
    "output_ids": [264, 300],
    "meta_info": {
        "id": "req-1",
        "finish_reason": {"type": "length", "length": 2},
        "prompt_tokens": 3,
        "completion_tokens": 2,
    },
}


@contextmanager
def client_of(script: Any) -> Iterator[Client]:
    with ScriptedServer(script) as server:
        client = Client(RequestsTransport(server.url, read_timeout=5.0))
        try:
            yield client
        finally:
            client.close()


REFUSALS = [
    pytest.param(
        400,
        {"error": {"message": "The input is too long", "type": "BadRequestError", "code": 400}},
        "The input is too long",
        "BadRequestError",
        id="an error object with message and type",
    ),
    pytest.param(
        400,
        {"error": {"message": "Duplicate request ID detected: a", "code": 400}},
        "Duplicate request ID detected: a",
        "400",
        id="an error object with a code alone",
    ),
    pytest.param(
        400,
        {"error": "SamplingParams got an unexpected keyword argument 'top_q'"},
        "SamplingParams got an unexpected keyword argument 'top_q'",
        "",
        id="an error that is a string",
    ),
    pytest.param(
        400,
        {
            "object": "error",
            "message": "1 validation error",
            "type": "BadRequest",
            "param": None,
            "code": 400,
        },
        "1 validation error",
        "BadRequest",
        id="OpenAI's flat shape",
    ),
    pytest.param(
        400,
        {"success": False, "message": "Failed to update weights: no such folder."},
        "Failed to update weights: no such folder.",
        "",
        id="an unsuccessful update",
    ),
    pytest.param(404, {"detail": "Not Found"}, "Not Found", "", id="FastAPI's own"),
    pytest.param(400, "Flush cache failed.\n", "Flush cache failed.", "", id="plain text"),
    pytest.param(500, "", "(empty body)", "", id="an empty body"),
    pytest.param(
        502,
        "<html><title>502 Bad Gateway</title></html>",
        "<html><title>502 Bad Gateway</title></html>",
        "",
        id="a proxy's HTML",
    ),
    pytest.param(401, {"error": "Unauthorized"}, "Unauthorized", "", id="a wrong key"),
]


@pytest.mark.parametrize(("status", "body", "reason", "kind"), REFUSALS)
def test_every_shape_of_an_error_becomes_the_same_refusal(
    status: int, body: Any, reason: str, kind: str
):
    with (
        client_of({"POST /generate": Answer(status, body)}) as client,
        pytest.raises(Refused) as caught,
    ):
        client.generate("a")
    error = caught.value
    assert (error.status, error.reason, error.kind) == (status, reason, kind)
    # The message alone names the call, the status and the reason.
    assert str(error) == f"POST /generate: the server answered {status}: {reason}"


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"17",
        b"{}",
        b'{"error": null}',
        b'{"error": {}}',
        b'{"error": ["a"]}',
        b"\xff\xfe\x00",
        b'{"error": {"message": "cut',
    ],
)
def test_an_error_in_no_known_shape_is_still_a_refusal_with_some_words(body: bytes):
    with (
        client_of({"POST /generate": Answer(400, body)}) as client,
        pytest.raises(Refused) as caught,
    ):
        client.generate("a")
    assert caught.value.status == 400
    assert caught.value.reason


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("<html>" + "x" * 100_000, id="HTML"),
        pytest.param({"error": {"message": "x" * 100_000}}, id="an error object"),
        pytest.param(
            {"error": "x" * 100_000},
            id="an error string",
        ),
    ],
)
def test_a_page_long_error_is_cut_before_it_fills_a_report(body: Any):
    with (
        client_of({"POST /generate": Answer(500, body)}) as client,
        pytest.raises(Refused) as caught,
    ):
        client.generate("a")
    assert 500 < len(caught.value.reason) <= 1000


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GENERATION.items() if name != key}


def with_meta(**changes: Any) -> dict[str, Any]:
    return {**GENERATION, "meta_info": {**GENERATION["meta_info"], **changes}}


UNREADABLE: list[Any] = [
    pytest.param(calls.generate("a"), b"", id="generate: nothing"),
    pytest.param(calls.generate("a"), b"OK", id="generate: no JSON"),
    pytest.param(calls.generate("a"), json.dumps(GENERATION)[:-9], id="generate: cut JSON"),
    pytest.param(calls.generate("a"), b"\xff\xfe", id="generate: no UTF-8"),
    pytest.param(calls.generate("a"), None, id="generate: null"),
    pytest.param(calls.generate("a"), [GENERATION], id="generate: a list"),
    pytest.param(calls.generate("a"), without("output_ids"), id="generate: no ids"),
    pytest.param(calls.generate("a"), without("meta_info"), id="generate: no meta"),
    pytest.param(calls.generate("a"), {**GENERATION, "output_ids": ["a"]}, id="generate: text"),
    pytest.param(calls.generate("a"), with_meta(prompt_tokens=None), id="generate: no count"),
    pytest.param(calls.generate("a"), with_meta(finish_reason="stop"), id="generate: no finish"),
    pytest.param(
        calls.generate("a"), with_meta(output_token_logprobs=[[]]), id="generate: empty logprob"
    ),
    pytest.param(calls.generate_batch(["a", "b"]), [GENERATION], id="batch: one answer of two"),
    pytest.param(calls.generate_batch(["a"]), GENERATION, id="batch: no list"),
    pytest.param(calls.models(), {"data": None}, id="models: null"),
    pytest.param(calls.models(), ["a"], id="models: a list"),
    pytest.param(calls.checksums(), {"ranks": []}, id="checksums: no rank"),
    pytest.param(calls.checksums(), {"ranks": [{"checksums": {}}]}, id="checksums: none on a rank"),
    pytest.param(calls.chat([]), {"choices": [], "usage": {}}, id="chat: no choice"),
    pytest.param(calls.model_info(), [1], id="model info: a list"),
    pytest.param(calls.update_weights_from_disk("/a"), {"message": "ok"}, id="update: no success"),
]


@pytest.mark.parametrize(("call", "body"), UNREADABLE)
def test_a_200_that_cannot_be_read_is_a_bad_answer_that_names_the_call(call: Call[Any], body: Any):
    with client_of({str(call): Answer(200, body)}) as client, pytest.raises(BadAnswer) as caught:
        client.send(call)
    assert caught.value.call == str(call)
    assert str(caught.value).startswith(f"{call}: ")


def test_a_bad_answer_shows_what_came_but_not_a_megabyte_of_it():
    with (
        client_of({"POST /generate": Answer(200, "surprise " * 100_000)}) as client,
        pytest.raises(BadAnswer) as caught,
    ):
        client.generate("a")
    assert "surprise" in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- streams ------------------------------------------------------------------------------------


def a_piece(text: str, *ids: int) -> bytes:
    return event({"text": text, "output_ids": list(ids), "meta_info": {"id": "a"}})


def texts_until(client: Client, error: type[Exception]) -> tuple[list[str], Any]:
    came: list[str] = []

    def read() -> None:
        came.extend(chunk.text for chunk in client.stream("a"))

    with pytest.raises(error) as caught:
        read()
    return came, caught.value


def test_an_error_inside_a_stream_is_a_refusal_although_the_status_was_200():
    failed = {"error": {"message": "KV cache is full", "type": "InternalServerError", "code": 500}}
    pieces = (a_piece("one", 1), event(failed), DONE)
    with client_of({"POST /generate": Answer(pieces=pieces)}) as client:
        came, error = texts_until(client, Refused)
    # What came before it is not lost.
    assert came == ["one"]
    assert (error.status, error.reason, error.kind) == (
        200,
        "KV cache is full",
        "InternalServerError",
    )
    assert error.call == "POST /generate"


def test_a_stream_that_just_stops_is_a_bad_answer_and_not_a_short_generation():
    pieces = (a_piece("one", 1), a_piece("one two", 1, 2))
    with client_of({"POST /generate": Answer(pieces=pieces)}) as client:
        came, error = texts_until(client, BadAnswer)
    assert came == ["one", "one two"]
    assert "[DONE]" in str(error)


@pytest.mark.parametrize("line", ["not json", "{'text': 'a'}", '{"text": "cut'])
def test_an_event_that_is_no_json_is_a_bad_answer(line: str):
    with client_of({"POST /generate": Answer(pieces=(event(line), DONE))}) as client:
        came, error = texts_until(client, BadAnswer)
    assert came == []
    assert error.call == "POST /generate"


@pytest.mark.parametrize("line", ["null", "7", "[1]", '"words"'])
def test_an_event_that_is_json_but_no_object_is_a_bad_answer(line: str):
    with client_of({"POST /generate": Answer(pieces=(event(line), DONE))}) as client:
        came, _ = texts_until(client, BadAnswer)
    assert came == []


def test_a_stream_that_breaks_in_the_middle_is_unreachable_and_not_finished():
    for ending in ("cut", "reset"):
        pieces = (a_piece("one", 1),)
        with (
            client_of({"POST /generate": Answer(pieces=pieces, ending=ending)}) as client,
            pytest.raises(Unreachable),
        ):
            list(client.stream("a"))


def test_a_stream_that_is_refused_is_a_refusal_with_the_whole_reason():
    # Pretty-printed: the reason goes over several lines of a body that is read line by line.
    body = json.dumps({"object": "error", "message": "no chat template", "type": "BR"}, indent=1)
    with (
        client_of({"POST /v1/chat/completions": Answer(400, body)}) as client,
        pytest.raises(Refused) as caught,
    ):
        client.chat_streamed([{"role": "user", "content": "a"}])
    assert (caught.value.status, caught.value.reason, caught.value.kind) == (
        400,
        "no chat template",
        "BR",
    )


def test_comments_empty_lines_and_other_fields_of_a_stream_are_no_events():
    noise = b": keep-alive\n\nevent: token\nid: 7\nretry: 10\n\n"
    pieces = (noise, a_piece("one", 1), b"\r\n", noise, DONE)
    with client_of({"POST /generate": Answer(pieces=pieces)}) as client:
        assert [chunk.text for chunk in client.stream("a")] == ["one"]


def test_text_with_separators_of_other_alphabets_is_not_torn_apart():
    # Line ends to str.splitlines(), ordinary characters inside an event.
    text = "a\u2028b\u2029c\x85d\x0be \U0001f600"
    pieces = tuple(bytes([byte]) for byte in a_piece(text, 1) + DONE)
    with client_of({"POST /generate": Answer(pieces=pieces)}) as client:
        assert [chunk.text for chunk in client.stream("a")] == [text]
