"""Streams in the background: their results, and that none outlives its owner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from scripted_server import BOUND, DONE, Answer, Mortal, Script, ScriptedServer, event

from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import BadAnswer, HarnessError, Refused, ServerDied
from sglang_harness.traffic.at_once import at_once
from sglang_harness.traffic.background import BackgroundStream
from sglang_harness.traffic.base import together


def piece(tokens: int, finish: str | None = None) -> bytes:
    meta = {"completion_tokens": tokens, "finish_reason": {"type": finish} if finish else None}
    return event({"text": "a" * tokens, "output_ids": [7] * tokens, "meta_info": meta})


@pytest.fixture
def opened() -> Iterator[Callable[..., tuple[ScriptedServer, Client]]]:
    made: list[tuple[ScriptedServer, Client]] = []

    def serve(script: Script, mortal: Mortal | None = None) -> tuple[ScriptedServer, Client]:
        server = ScriptedServer(script)
        watch = None if mortal is None else mortal.watch
        made.append((server, Client(RequestsTransport(server.url), watch=watch)))
        return made[-1]

    yield serve
    for server, client in made:
        client.close()
        server.close()


def stream(client: Client, **options: object) -> BackgroundStream:
    return BackgroundStream(client, [1, 2], **{"sampling": {}, **options})  # type: ignore[arg-type]


def left() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("stream-", "at-once"))]


def test_a_stream_is_read_to_its_end(opened) -> None:
    gate = threading.Event()
    pieces = (piece(1), piece(2), gate, piece(3, "length"), DONE)
    server, client = opened({"POST /generate": Answer(pieces=pieces)})
    with stream(client, request_id="mine") as running:
        assert running.wait_for(2, BOUND)
        assert not running.is_over
        assert not running.wait_for(3, 0.05)
        gate.set()
        ended = running.end(BOUND)
    assert (ended.text, ended.tokens, ended.finish) == ("aaa", 3, "length")
    assert running.is_over
    assert [seen.json()["rid"] for seen in server.asked("POST /generate")] == ["mine"]
    assert server.asked("POST /abort_request") == [], "one that is over is not aborted"


@pytest.mark.parametrize("wait", [True, False], ids=["in the wait for events", "at its end"])
def test_the_error_that_ended_a_stream_is_raised(opened, wait: bool) -> None:
    refused = Answer(400, {"error": {"message": "the prompt is too long"}})
    _, client = opened({"POST /generate": refused})
    with stream(client) as running, pytest.raises(Refused, match="too long"):
        running.wait_for(2, BOUND) if wait else running.end(BOUND)


def test_an_error_of_the_harness_in_a_stream_is_raised_as_it_is(opened) -> None:
    _, client = opened({"POST /generate": Answer(pieces=(piece(1, "length"), DONE))})
    with stream(client, sampling={"stop": {object()}}) as running:
        with pytest.raises(TypeError, match="not JSON serializable"):
            running.wait_for(1, BOUND)
        with pytest.raises(TypeError, match="not JSON serializable"):
            running.end(BOUND)


def test_a_dead_server_is_reported_as_dead(opened) -> None:
    mortal = Mortal()
    dying = Answer(pieces=(piece(1),), before=mortal.die, ending="reset")
    _, client = opened({"POST /generate": dying}, mortal)
    with stream(client) as running, pytest.raises(ServerDied):
        running.end(BOUND)


@pytest.mark.parametrize(
    "last", [{"text": "a"}, {"text": "a", "meta_info": {}}, {"text": "a", "meta_info": 7}]
)
def test_a_last_event_without_its_counts_is_a_bad_answer(opened, last: dict[str, object]) -> None:
    _, client = opened({"POST /generate": Answer(pieces=(event(last), DONE))})
    with stream(client) as running, pytest.raises(BadAnswer, match="last event"):
        running.end(BOUND)


class Broken(Exception):
    """What a check raises in the midst of it."""


def broken_off(running: BackgroundStream) -> None:
    with running:
        assert running.wait_for(1, BOUND)
        raise Broken


def broken_off_late(client: Client, streams: list[BackgroundStream]) -> None:
    with together(streams):
        assert all(each.wait_for(1, BOUND) for each in streams)
        with client.within(-1):
            raise Broken


def test_a_stream_is_aborted_where_its_owner_raises(opened) -> None:
    endless = Answer(pieces=(piece(1), *(0.02, piece(2)) * 1000))
    server, client = opened({"POST /generate": endless, "POST /abort_request": Answer()})
    running = stream(client)
    with pytest.raises(Broken):
        broken_off(running)
    assert running.is_over
    assert left() == []
    assert server.disconnected.wait(BOUND)
    asked, aborted = server.asked("POST /generate"), server.asked("POST /abort_request")
    assert {seen.json()["rid"] for seen in aborted} == {asked[0].json()["rid"]}


def test_a_stream_that_is_silent_ends_with_its_owner_too(opened) -> None:
    aborted = threading.Event()
    held = Answer(pieces=(piece(1), aborted, piece(1, "abort"), DONE))
    script = {"POST /generate": held, "POST /abort_request": Answer(before=aborted.set)}
    _, client = opened(script)
    running = stream(client)
    with client.within(BOUND), pytest.raises(Broken):
        broken_off(running)
    assert running.is_over
    assert left() == []


def test_streams_end_although_the_time_of_their_check_is_over(opened) -> None:
    aborted = threading.Event()
    held = Answer(pieces=(piece(1), aborted, piece(1, "abort"), DONE))
    script = {"POST /generate": held, "POST /abort_request": Answer(before=aborted.set)}
    server, client = opened(script)
    running = [stream(client) for _ in range(4)]
    with pytest.raises(Broken):
        broken_off_late(client, running)
    assert all(each.is_over for each in running)
    assert left() == []
    assert server.asked("POST /abort_request")


def test_many_are_asked_at_once_and_answered_in_their_order() -> None:
    together_now = threading.Barrier(8)

    def ask(number: int) -> int:
        together_now.wait(BOUND)
        return number * number

    assert at_once(ask, range(8)) == [n * n for n in range(8)]


def test_the_error_of_one_that_is_asked_at_once_is_that_of_its_thread() -> None:
    def ask(number: int) -> int:
        if number == 5:
            raise Refused("POST /generate", 400, "no")
        return number

    with pytest.raises(Refused, match="400: no"):
        at_once(ask, range(8))
    assert left() == []


def test_threads_that_do_not_all_run_are_an_error_that_says_so() -> None:
    asked: list[int] = []
    with pytest.raises(HarnessError, match="4 requests could not be sent at the same time"):
        at_once(asked.append, range(4), seconds=0)
    assert asked == []
