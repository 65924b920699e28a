"""The transport on a real socket: what breaks, how it is named, and what is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scripted_server import BOUND, DONE, Answer, ScriptedServer, Seen, event

from sglang_harness.client import RequestsTransport, calls
from sglang_harness.client.call import Call
from sglang_harness.errors import NoAnswerInTime, Unreachable

ASK: Call[Any] = Call("GET", "/a", lambda reply: reply.json())

Connect = Callable[..., RequestsTransport]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes transports, and closes them."""
    made: list[RequestsTransport] = []

    def make(server: ScriptedServer, **options: Any) -> RequestsTransport:
        made.append(RequestsTransport(server.url, **{"read_timeout": 5.0, **options}))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


# --- what breaks --------------------------------------------------------------------------------


def test_a_refused_connection_is_unreachable_at_once(connect: Connect):
    with ScriptedServer({}, listening=False) as server:
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"^GET /a: connection refused$"):
            connect(server).send(ASK)
    assert time.monotonic() - began < 2.0


def test_a_connection_closed_in_place_of_an_answer_says_so(connect: Connect):
    with ScriptedServer({"GET /a": Answer(ending="silence")}) as server:
        transport = connect(server)
        with pytest.raises(Unreachable, match=r"the connection was closed without an answer$"):
            transport.send(ASK)
        # Sent once: a transport that repeats by itself would hide what checks look for.
        assert len(server.seen) == 1


def test_a_server_that_is_killed_under_an_answer_is_unreachable(connect: Connect):
    with (
        ScriptedServer({"GET /a": Answer(body="[1, 2", ending="reset")}) as server,
        pytest.raises(Unreachable),
    ):
        connect(server).send(ASK)


def test_half_an_answer_is_no_answer_even_where_it_would_parse(connect: Connect):
    with (
        ScriptedServer({"GET /a": Answer(body="[1, 2]", ending="cut")}) as server,
        pytest.raises(Unreachable),
    ):
        connect(server).send(ASK)


@pytest.mark.parametrize("where", ["the call", "the transport"])
def test_a_slow_server_is_distinguished_from_one_that_is_gone(connect: Connect, where: str):
    with ScriptedServer({"GET /a": Answer(delay=BOUND)}) as server:
        by_call = where == "the call"
        transport = connect(server, read_timeout=30.0 if by_call else 0.25)
        call: Call[Any] = Call("GET", "/a", lambda _: None, timeout=0.25 if by_call else None)
        began = time.monotonic()
        with pytest.raises(NoAnswerInTime, match=r"GET /a: no answer within 0\.25 s"):
            transport.send(call)
        assert 0.2 < time.monotonic() - began < 3.0


def test_a_stream_that_falls_silent_ends_in_time(connect: Connect):
    never = threading.Event()
    script = {"POST /generate": Answer(pieces=(event({"text": "a"}), never, DONE))}
    with ScriptedServer(script) as server:
        lines = connect(server, read_timeout=0.25).stream(calls.generate_stream("a"))
        assert next(lines) == b"200"
        assert next(lines) == b'data: {"text": "a"}'
        with pytest.raises(NoAnswerInTime, match=r"0\.25 s"):
            list(lines)


def test_a_connection_that_the_server_dropped_while_idle_is_replaced(connect: Connect):
    # uvicorn closes idle connections after 5 s; a check that waits longer must not fail.
    hung_up = threading.Event()
    script = {
        "GET /a": [Answer(body="1", ending="hang up", after=hung_up.set), Answer(body="2")],
    }
    with ScriptedServer(script) as server:
        transport = connect(server)
        assert transport.send(ASK).body == b"1"
        assert hung_up.wait(BOUND)
        assert transport.send(ASK).body == b"2"
        assert server.connections == 2


# --- what is sent -------------------------------------------------------------------------------


def test_the_key_is_sent_as_a_bearer_token_and_only_where_there_is_one(connect: Connect):
    with ScriptedServer({"GET /a": Answer(body="1")}) as server:
        connect(server, api_key="a-key-of-one-server").send(ASK)
        connect(server).send(ASK)
    with_key, without = server.seen
    assert with_key.headers["authorization"] == "Bearer a-key-of-one-server"
    assert "authorization" not in without.headers


def test_proxies_of_the_environment_are_for_other_hosts(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
):
    with ScriptedServer({}, listening=False) as dead:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, dead.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with ScriptedServer({"GET /a": Answer(body="1")}) as server:
            assert connect(server).send(ASK).body == b"1"


def test_passwords_of_this_machine_are_not_sent_to_a_server(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password private\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with ScriptedServer({"GET /a": Answer(body="1")}) as server:
        connect(server).send(ASK)
        connect(server, api_key="the-key").send(ASK)
    assert [s.headers.get("authorization") for s in server.seen] == [None, "Bearer the-key"]


def test_an_empty_body_is_sent_as_one_and_no_body_as_none(connect: Connect):
    # /release_memory_occupation and /continue_generation answer 400 to a missing body.
    with ScriptedServer({}) as server:
        transport = connect(server)
        for call in (calls.release_memory(), calls.resume(), calls.flush_cache()):
            transport.send(call)
    assert [s.body for s in server.seen] == [b"{}", b"{}", b""]
    assert server.seen[0].headers["content-type"] == "application/json"


def test_a_query_and_an_address_with_a_slash_at_its_end(connect: Connect):
    with ScriptedServer({}) as server:
        transport = RequestsTransport(server.url + "/")
        transport.send(Call("GET", "/a", lambda _: None, query=(("b", "c d"), ("b", "&"))))
        transport.close()
    assert (server.seen[0].path, server.seen[0].query) == ("/a", "b=c+d&b=%26")


def test_one_thread_keeps_its_connection(connect: Connect):
    # A new connection for every request would be measured as the server's latency.
    with ScriptedServer({"GET /a": Answer(body="1")}) as server:
        transport = connect(server)
        for _ in range(5):
            transport.send(ASK)
        assert len(server.seen) == 5
        assert server.connections == 1


def test_many_threads_at_once_each_get_their_own_answer(connect: Connect):
    threads, rounds = 24, 4
    together = threading.Barrier(threads)

    def echo(seen: Seen) -> Answer:
        return Answer(body={"you are": seen.json()["rid"]})

    with ScriptedServer({"POST /generate": echo}) as server:
        transport = connect(server)

        def ask(number: int) -> list[str]:
            together.wait(BOUND)
            answers = []
            for turn in range(rounds):
                call = calls.generate("a", request_id=f"{number}-{turn}")
                answers.append(transport.send(call).json()["you are"])
            return answers

        with ThreadPoolExecutor(threads) as pool:
            answers = list(pool.map(ask, range(threads)))
    assert answers == [[f"{n}-{turn}" for turn in range(rounds)] for n in range(threads)]
    # No two threads ever shared a connection.
    by_connection: dict[int, set[str]] = {}
    for seen in server.seen:
        by_connection.setdefault(seen.connection, set()).add(seen.json()["rid"].split("-")[0])
    assert all(len(numbers) == 1 for numbers in by_connection.values())


# --- streams ------------------------------------------------------------------------------------


def test_events_arrive_when_they_are_sent_and_not_when_the_stream_is_over(connect: Connect):
    first_was_read = threading.Event()
    pieces = (event({"text": "a"}), first_was_read, event({"text": "b"}), DONE)
    with ScriptedServer({"POST /generate": Answer(pieces=pieces)}) as server:
        lines = connect(server, read_timeout=5.0).stream(calls.generate_stream("a"))
        assert next(lines) == b"200"
        assert next(lines) == b'data: {"text": "a"}'
        # The server sends the rest only now: a client that buffers never gets here.
        first_was_read.set()
        assert [line for line in lines if line] == [b'data: {"text": "b"}', b"data: [DONE]"]


def test_a_large_event_costs_the_reader_next_to_nothing(connect: Connect):
    # Cumulative text with log-probabilities: nothing unusual after some thousand tokens.
    pieces = (event({"text": "a" * 80_000}), DONE)
    with ScriptedServer({"POST /generate": Answer(pieces=pieces)}) as server:
        began = time.monotonic()
        assert sum(map(len, connect(server).stream(calls.generate_stream("a")))) > 80_000
        assert time.monotonic() - began < 0.5


def test_closing_a_stream_closes_its_connection(connect: Connect):
    # A client's disconnect is what frees the slot in SGLang.
    pieces = (event({"text": "a"}), *[event({"text": "a" * 4096})] * 5000)
    with ScriptedServer({"POST /generate": Answer(pieces=pieces)}) as server:
        lines = connect(server).stream(calls.generate_stream("a"))
        next(lines)
        next(lines)
        lines.close()  # type: ignore[attr-defined]
        assert server.disconnected.wait(BOUND)
