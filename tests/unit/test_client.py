"""The client: what is sent, what is bounded, and how a server's death is noticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scripted_server import A_DEATH, BOUND, DONE, Answer, Mortal, ScriptedServer, Seen, event

from sglang_harness.client import Checksums, Client, RequestsTransport, calls
from sglang_harness.client.call import Call
from sglang_harness.errors import (
    NoAnswerInTime,
    Refused,
    RequestFailed,
    ServerDied,
    ServerLost,
    TimeIsOver,
    Unreachable,
)
from sglang_harness.runtime.death import DeathWatch, Unknown

ASK: Call[Any] = Call("GET", "/a", lambda reply: reply.json())

HANG_UP = Answer(ending="silence")

MakeClient = Callable[..., Client]


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    made: list[Client] = []

    def make(server: ScriptedServer, *, read_timeout: float = 5.0, **options: Any) -> Client:
        made.append(Client(RequestsTransport(server.url, read_timeout=read_timeout), **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


# --- sending ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [HANG_UP, Answer(503, {"error": "busy"}), Answer(500), Answer(ending="cut"), Answer(body="?")],
    ids=["broken", "busy", "failing", "cut", "unreadable"],
)
def test_every_call_is_sent_once_whatever_comes_back(make_client: MakeClient, answer: Answer):
    with ScriptedServer({"GET /a": [answer, Answer(body="7")]}) as server:
        with pytest.raises(RequestFailed):
            make_client(server).send(ASK)
        assert len(server.seen) == 1


# --- time ---------------------------------------------------------------------------------------


def test_after_the_deadline_nothing_is_sent_any_more(make_client: MakeClient):
    with ScriptedServer({"GET /a": Answer(body="7")}) as server:
        client = make_client(server)
        with client.within(-0.01):
            with pytest.raises(TimeIsOver, match="GET /a"):
                client.send(ASK)
            with pytest.raises(TimeIsOver, match="POST /generate"):
                list(client.stream("a"))
        assert server.seen == []
        assert client.send(ASK) == 7


def test_what_restores_the_server_is_sent_after_the_deadline_and_bounded_on_its_own(
    make_client: MakeClient,
):
    with ScriptedServer({"GET /a": Answer(body="7"), "GET /b": Answer(delay=BOUND)}) as server:
        client = make_client(server)
        with client.within(-0.01):
            with client.cleanup():
                assert client.send(ASK) == 7
            with pytest.raises(TimeIsOver):
                client.send(ASK)
            with client.cleanup(0.3), pytest.raises(TimeIsOver, match="GET /b"):
                client.send(Call("GET", "/b", lambda _: None))
        assert [sent.path for sent in server.seen] == ["/a", "/b"]


def test_cleaning_up_in_one_thread_gives_another_no_more_time(make_client: MakeClient):
    with ScriptedServer({"GET /a": Answer(body="7")}) as server, ThreadPoolExecutor(1) as other:
        client = make_client(server)
        with client.within(-0.01), client.cleanup():
            with pytest.raises(TimeIsOver):
                other.submit(client.send, ASK).result(timeout=BOUND)
            assert client.send(ASK) == 7


def test_of_two_bounds_the_earlier_holds(make_client: MakeClient):
    with ScriptedServer({"GET /a": Answer(delay=BOUND)}) as server:
        client = make_client(server)
        with client.within(0.2), client.within(60), pytest.raises(TimeIsOver):
            client.send(ASK)
        with client.within(60), client.within(0.2), pytest.raises(TimeIsOver):
            client.send(ASK)


@pytest.mark.parametrize("own", [None, 30.0], ids=["without a time-out", "with a longer one"])
def test_a_call_in_flight_has_no_more_time_than_the_deadline_leaves(
    make_client: MakeClient, own: float | None
):
    slow: Call[Any] = Call("GET", "/a", lambda _: None, timeout=own)
    with ScriptedServer({"GET /a": Answer(delay=BOUND)}) as server:
        client = make_client(server)
        began = time.monotonic()
        with client.within(0.3), pytest.raises(TimeIsOver):
            client.send(slow)
        assert 0.2 < time.monotonic() - began < 2.0


def test_a_deadline_that_is_far_does_not_give_a_call_more_time_than_its_own(
    make_client: MakeClient,
):
    quick: Call[Any] = Call("GET", "/a", lambda _: None, timeout=0.2)
    with ScriptedServer({"GET /a": Answer(delay=BOUND)}) as server:
        client = make_client(server)
        with client.within(60), pytest.raises(NoAnswerInTime, match=r"0\.2 s") as raised:
            client.send(quick)
    assert not isinstance(raised.value, TimeIsOver), "the server took too long, not the caller"


def test_a_stream_that_goes_on_and_on_ends_with_the_deadline(make_client: MakeClient):
    # Every event comes well within the time-out between two; all together never end.
    pieces = (event({"text": "a", "output_ids": []}), 0.05) * 100
    with ScriptedServer({"POST /generate": Answer(pieces=pieces)}) as server:
        client = make_client(server)
        began = time.monotonic()
        with client.within(0.4), pytest.raises(TimeIsOver):
            list(client.stream("a"))
        assert time.monotonic() - began < 2.0


def test_an_answer_that_trickles_ends_with_the_deadline(make_client: MakeClient):
    with ScriptedServer({"GET /a": Answer(pieces=((b" ", 0.1) * 10 + (b"7",)))}) as server:
        client = make_client(server)
        with client.within(0.4), pytest.raises(TimeIsOver):
            client.send(ASK)


def test_the_clients_time_out_holds_where_neither_call_nor_deadline_says_less(
    make_client: MakeClient,
):
    with ScriptedServer({"GET /a": Answer(body="7", delay=1.0)}) as server:
        client = make_client(server, timeout=0.2)
        with pytest.raises(NoAnswerInTime):
            client.send(ASK)


# --- death --------------------------------------------------------------------------------------


def test_a_broken_connection_to_a_dead_server_is_reported_as_its_death(make_client: MakeClient):
    mortal = Mortal()
    dying = Answer(ending="silence", before=mortal.die)
    with ScriptedServer({"POST /generate": dying}) as server:
        client = make_client(server, watch=mortal.watch)
        began = time.monotonic()
        with pytest.raises(ServerDied, match="index out of range in self") as caught:
            client.generate("a")
    assert time.monotonic() - began < 2.0
    assert caught.value.death == A_DEATH
    # The broken connection is not forgotten: it is the cause.
    assert isinstance(caught.value.__cause__, Unreachable)


def test_a_broken_connection_to_a_server_that_cannot_be_observed_is_not_its_death(
    make_client: MakeClient,
):
    watch = DeathWatch(lambda: Unknown("its container was removed from outside this run"))
    with (
        ScriptedServer({"POST /generate": Answer(ending="reset")}) as server,
        pytest.raises(ServerLost, match="removed from outside") as lost,
    ):
        make_client(server, watch=watch).generate("a")
    assert isinstance(lost.value.__context__, Unreachable)


def test_a_process_that_is_gone_a_moment_after_its_connections_is_waited_for(
    make_client: MakeClient,
):
    mortal = Mortal()
    timer = threading.Timer(0.3, mortal.die)
    with ScriptedServer({"POST /generate": Answer(ending="reset", before=timer.start)}) as server:
        client = make_client(server, watch=mortal.watch)
        with pytest.raises(ServerDied):
            client.generate("a")


def test_a_scheduler_that_died_answers_500_first_and_is_reported_as_dead(
    make_client: MakeClient,
):
    mortal = Mortal()
    timer = threading.Timer(0.2, mortal.die)
    failing = Answer(500, {"error": {"message": "Internal Server Error"}}, before=timer.start)
    with ScriptedServer({"POST /generate": failing}) as server, pytest.raises(ServerDied):
        make_client(server, watch=mortal.watch).generate("a")


def test_a_stream_that_a_dying_server_cuts_is_reported_as_its_death(make_client: MakeClient):
    for ending in ("reset", "whole"):  # a broken stream, and one that just ends
        mortal = Mortal()
        pieces = (event({"text": "a", "output_ids": [1]}),)
        dying = Answer(pieces=pieces, before=mortal.die, ending=ending)
        with ScriptedServer({"POST /generate": dying}) as server, pytest.raises(ServerDied):
            list(make_client(server, watch=mortal.watch).stream("a"))


def test_a_server_that_was_stopped_on_purpose_is_unreachable_and_not_dead(
    make_client: MakeClient,
):
    mortal = Mortal()
    mortal.watch.expected = True
    with (
        ScriptedServer({"GET /a": Answer(ending="silence", before=mortal.die)}) as server,
        pytest.raises(Unreachable),
    ):
        make_client(server, watch=mortal.watch).send(ASK)


def test_a_refusal_by_a_live_server_is_raised_at_once(make_client: MakeClient):
    # Waiting here for a death would make every check of a 400 or 503 slower by seconds.
    script = {"GET /a": [Answer(400, {"error": "no"}), Answer(503, {"error": "busy"})]}
    with ScriptedServer(script) as server:
        client = make_client(server, watch=Mortal().watch)
        began = time.monotonic()
        for status in (400, 503):
            with pytest.raises(Refused, match=str(status)):
                client.send(ASK)
        assert time.monotonic() - began < 0.8


def test_a_broken_connection_to_a_server_that_lives_stays_one(make_client: MakeClient):
    with ScriptedServer({"GET /a": HANG_UP}) as server, pytest.raises(Unreachable):
        make_client(server, watch=Mortal().watch).send(ASK)


# --- what answers mean --------------------------------------------------------------------------


def test_a_generation_keeps_everything_that_checks_judge_on(make_client: MakeClient):
    answer = {
        "text": " fox",
        "output_ids": [264, 9],
        "meta_info": {
            "id": "req-1",
            "finish_reason": {"type": "stop", "matched": 9},
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "cached_tokens": 1,
            "weight_version": "v2",
            "input_token_logprobs": [[None, 1, None], [-2.5, 2, None]],
            "output_token_logprobs": [[-0.5, 264, None], [-0.25, 9, None]],
        },
    }
    with ScriptedServer({"POST /generate": Answer(body=answer, delay=0.1)}) as server:
        got = make_client(server).generate(
            [1, 2, 3], sampling={"max_new_tokens": 2}, prompt_logprobs_from=1, request_id="req-1"
        )
    assert server.seen[0].json() == {
        "input_ids": [1, 2, 3],
        "sampling_params": {"max_new_tokens": 2},
        "return_logprob": True,
        "logprob_start_len": 1,
        "rid": "req-1",
    }
    assert (got.text, got.output_ids, got.logprob_ids) == (" fox", (264, 9), (264, 9))
    assert got.logprobs == (-0.5, -0.25)
    assert got.prompt_logprobs == (None, -2.5)
    assert (got.finish, got.finish_detail) == ("stop", {"matched": 9})
    assert (got.prompt_tokens, got.completion_tokens, got.cached_tokens) == (3, 2, 1)
    assert (got.request_id, got.weight_version) == ("req-1", "v2")
    assert got.seconds >= 0.1


def test_a_batch_of_ids_is_sent_as_lists_and_answered_in_order(make_client: MakeClient):
    def echo(seen: Seen) -> Answer:
        return Answer(
            body=[
                {
                    "text": "",
                    "output_ids": ids,
                    "meta_info": {
                        "id": str(number),
                        "finish_reason": {"type": "length"},
                        "prompt_tokens": len(ids),
                        "completion_tokens": 1,
                    },
                }
                for number, ids in enumerate(seen.json()["input_ids"])
            ]
        )

    with ScriptedServer({"POST /generate": echo}) as server:
        got = make_client(server).generate_batch([(5, 6), [7]])
    assert [g.output_ids for g in got] == [(5, 6), (7,)]


def test_a_batch_of_nothing_is_refused_before_it_is_sent():
    with pytest.raises(ValueError, match="at least one"):
        calls.generate_batch([])


def test_a_streamed_chat_is_put_together_from_its_deltas(make_client: MakeClient):
    def piece(**delta: Any) -> bytes:
        finish = delta.pop("finish", None)
        return event({"choices": [{"delta": delta, "finish_reason": finish}], "usage": None})

    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    pieces = (
        piece(role="assistant", content=""),
        piece(content="Par"),
        piece(content="is"),
        piece(content=None, finish="stop"),
        event({"choices": [], "usage": usage}),
        DONE,
    )
    with ScriptedServer({"POST /v1/chat/completions": Answer(pieces=pieces)}) as server:
        got = make_client(server).chat_streamed([{"role": "user", "content": "Where?"}])
    assert (got.text, got.finish, got.prompt_tokens, got.completion_tokens, got.chunks) == (
        "Paris",
        "stop",
        5,
        2,
        5,
    )
    # Without this option SGLang counts nothing.
    assert server.seen[0].json()["stream_options"] == {"include_usage": True}


def test_a_changed_tensor_is_found_on_any_rank():
    before = Checksums(({"a": "1", "b": "2", "gone": "3"}, {"a": "1", "b": "2"}), "x")
    after = Checksums(({"a": "1", "b": "9", "new": "3"}, {"a": "8", "b": "2"}), "y")
    assert after.changed_since(before) == ["b", "gone", "new", "rank1:a"]
    assert after.changed_since(after) == []


def test_every_tensor_of_every_rank_has_a_name_and_every_rank_a_place():
    info = {"role": "target", "tp_rank": 1, "tp_size": 2, "pp_rank": 0}
    got = Checksums.parse(
        {
            "ranks": [
                {"checksums": {"b": "1", "a": "2"}},
                # 0.5.23 lists one place for each model that the rank holds.
                {"checksums": {"a": "3"}, "parallelism_info": [info, {"role": "draft"}]},
                {"checksums": {"a": "4"}, "parallelism_info": info},
            ]
        }
    )
    assert got.names() == ["a", "b", "rank1:a", "rank2:a"]
    assert got.places == ({}, *[{"tp_rank": 1, "tp_size": 2, "pp_rank": 0}] * 2)


def test_ranks_are_in_order_whatever_the_order_of_the_answer():
    def rank(dp: int, tp: int) -> dict[str, Any]:
        place = {"dp_rank": dp, "tp_rank": tp, "pp_rank": 0}
        return {"checksums": {"a": f"{dp}{tp}"}, "parallelism_info": [place]}

    got = Checksums.parse({"ranks": [rank(1, 0), rank(1, 1), rank(0, 0), rank(0, 1)]})
    assert [held["a"] for held in got.ranks] == ["00", "01", "10", "11"]
    assert [place["dp_rank"] for place in got.places] == [0, 0, 1, 1]


# --- adapters and replicas ------------------------------------------------------------------------


def test_a_request_names_its_adapter_and_its_replica_only_when_it_has_one(make_client: MakeClient):
    answer = Answer(
        body={
            "text": "",
            "output_ids": [5],
            "meta_info": {
                "id": "a",
                "finish_reason": {"type": "length"},
                "prompt_tokens": 1,
                "completion_tokens": 1,
                "dp_rank": 1,
            },
        }
    )
    with ScriptedServer({"POST /generate": answer}) as server:
        client = make_client(server)
        got = client.generate("a", lora_path="mine", routed_dp_rank=0)
        client.generate("a")
    assert got.dp_rank == 1
    bodies = [seen.json() for seen in server.seen]
    assert (bodies[0]["lora_path"], bodies[0]["routed_dp_rank"]) == ("mine", 0)
    assert not {"lora_path", "routed_dp_rank"} & bodies[1].keys()


def test_each_prompt_of_a_batch_has_its_own_adapter():
    call = calls.generate_batch(["a", "b"], lora_path=["mine", None])
    assert call.body is not None
    assert call.body["lora_path"] == ["mine", None]
    with pytest.raises(ValueError, match="1 adapters for 2 prompts"):
        calls.generate_batch(["a", "b"], lora_path=["mine"])


def test_adapters_are_loaded_and_unloaded_as_the_server_takes_it(make_client: MakeClient):
    loaded = {"success": True, "error_message": None, "loaded_adapters": {"mine": "/a", "b": "/b"}}
    gone = {"success": True, "error_message": None, "loaded_adapters": {}}
    no = Answer(status=400, body={"success": False, "error_message": "rank 64 is too large"})
    script = {
        "POST /load_lora_adapter": Answer(body=loaded),
        "POST /load_lora_adapter_from_tensors": no,
        "POST /unload_lora_adapter": Answer(body=gone),
    }
    with ScriptedServer(script) as server:
        client = make_client(server)
        got = client.load_lora_adapter("mine", "/exchange/a")
        assert (got.success, got.loaded, got.message) == (True, ("b", "mine"), "")
        with pytest.raises(Refused, match="400: rank 64 is too large") as caught:
            client.load_lora_adapter_from_tensors("mine", {"r": 64}, ["aGk="], pinned=True)
        assert caught.value.status == 400
        assert client.unload_lora_adapter("mine").loaded == ()
    assert [seen.json() for seen in server.seen] == [
        {"lora_name": "mine", "lora_path": "/exchange/a", "pinned": False},
        {
            "lora_name": "mine",
            "config_dict": {"r": 64},
            "serialized_named_tensors": ["aGk="],
            "pinned": True,
        },
        {"lora_name": "mine"},
    ]


def test_loading_an_adapter_counts_as_a_change_of_the_server():
    for call in (
        calls.load_lora_adapter("a", "/a"),
        calls.load_lora_adapter_from_tensors("a", {}, []),
        calls.unload_lora_adapter("a"),
    ):
        assert call.changes
