"""Background requests and what can be asked of them; a real HTTP server that is scripted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from scripted_server import BOUND, Answer, Mortal, ScriptedServer, Seen

from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import HarnessError, ServerDied, TimeIsOver
from sglang_harness.traffic import EmptySlice, SentRequest, Traffic, TrafficRecord


def answer(seen: Seen, version: str = "v1") -> Answer:
    prompt = seen.json()["input_ids"]
    return Answer(
        body={
            "text": "",
            "output_ids": [prompt[0], 7],
            "meta_info": {
                "id": "x", "finish_reason": {"type": "length"}, "prompt_tokens": len(prompt),
                "completion_tokens": 2, "weight_version": version,
                "weight_versions": [{"version": version, "start": 0, "end": 2}],
                "output_token_logprobs": [[-0.5, prompt[0], None], [-0.25, 7, None]],
            },
        }
    )  # fmt: skip


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer({"POST /generate": answer}) as scripted:
        yield scripted


def client(server: ScriptedServer, watch: object = None) -> Client:
    return Client(RequestsTransport(server.url), watch=watch)  # type: ignore[arg-type]


PROMPTS = [[1, 2], [3, 4], [5, 6]]


def test_every_request_is_on_record_with_its_answer(server: ScriptedServer) -> None:
    with Traffic(client(server), PROMPTS, sampling={}, workers=3) as traffic:
        traffic.wait_for_answers(9, seconds=10)
    record = traffic.record()
    assert len(record.requests) == len(server.asked("POST /generate"))
    assert [r.number for r in record.requests] == list(range(len(record.requests)))
    assert record.lost() == []
    for request in record.requests:
        assert request.prompt == PROMPTS[request.number % 3]
        assert request.ids == [request.prompt[0], 7]
        assert request.logprobs == [-0.5, -0.25]
        assert request.weight_spans == [("v1", 0, 2)]
        assert request.ended is not None
        assert request.ended >= request.sent
    assert TrafficRecord.model_validate_json(record.model_dump_json()) == record


def test_slices_lie_before_across_and_after_a_mark(server: ScriptedServer) -> None:
    gate, held = threading.Event(), threading.Event()

    def held_back(seen: Seen) -> Answer:
        if not held.is_set():
            return answer(seen)
        plain = answer(seen, "v2")
        return Answer(body=plain.body, hold=gate)

    server.script["POST /generate"] = held_back
    with Traffic(client(server), PROMPTS, sampling={}, workers=2) as traffic:
        traffic.wait_for_answers(4, seconds=10)
        held.set()
        # Both workers now wait for an answer that is held back.
        seen = len(server.seen)
        while len(server.seen) < seen + 2:
            pass
        traffic.mark("change")
        held.clear()
        gate.set()
        traffic.wait_for_answers(6, seconds=10)
    record = traffic.record()
    before, across, after = record.before("change"), record.across("change"), record.after("change")
    assert len(before) + len(across) + len(after) == len(record.requests)
    assert 1 <= len(across) <= 2
    assert {r.weight_version for r in before} == {"v1"}
    assert "v2" in {r.weight_version for r in across}


def test_an_empty_slice_is_an_error_and_no_answer() -> None:
    record = TrafficRecord(
        requests=[SentRequest(number=0, prompt=[1], sent=0.0, ended=1.0)],
        marks=[{"name": "change", "at": 2.0}],  # type: ignore[list-item]
    )
    assert len(record.before("change")) == 1
    for empty in (record.across, record.after):
        with pytest.raises(EmptySlice, match="'change'"):
            empty("change")
    with pytest.raises(KeyError, match="no mark 'other'"):
        record.before("other")


def test_a_refusal_is_an_outcome_and_the_next_request_is_sent(server: ScriptedServer) -> None:
    server.script["POST /generate"] = lambda seen: (
        Answer(400, {"error": {"message": "no"}})
        if seen.json()["input_ids"] == [3, 4]
        else answer(seen)
    )
    with Traffic(client(server), PROMPTS, sampling={}, workers=1) as traffic:
        traffic.wait_for_answers(6, seconds=10)
    outcomes = {(tuple(r.prompt), r.error != "") for r in traffic.record().requests if r.ended}
    assert outcomes == {((1, 2), False), ((3, 4), True), ((5, 6), False)}


def test_a_dead_server_ends_the_wait_with_its_reason(server: ScriptedServer) -> None:
    mortal = Mortal()
    server.script["POST /generate"] = Answer(before=mortal.die, ending="reset")
    with (
        Traffic(client(server, mortal.watch), PROMPTS, sampling={}, workers=2) as traffic,
        pytest.raises(ServerDied),
    ):
        traffic.wait_for_answers(1, seconds=20)
    assert all("exit code 137" in r.error for r in traffic.record().requests)


def test_answers_that_do_not_come_are_counted(server: ScriptedServer) -> None:
    Aborting(server)
    traffic = Traffic(client(server), PROMPTS, sampling={}, workers=1, patience=0.1)
    with traffic, pytest.raises(HarnessError, match=r"Only 0 of 2 .* within 0.1 s"):
        traffic.wait_for_answers(2, seconds=0.1)
    assert len(traffic.record().lost()) == 1, "one that never ended is lost, not forgotten"
    assert traffic.under_way() == 1


# --- what is the harness's own fault -------------------------------------------------------------

NOT_JSON: dict[str, object] = {"stop": {object()}}


def test_an_error_of_the_harness_is_raised_to_the_reader_and_is_no_lost_request(
    server: ScriptedServer,
) -> None:
    traffic = Traffic(client(server), PROMPTS, sampling=NOT_JSON, workers=2)
    with traffic, pytest.raises(TypeError, match="not JSON serializable"):
        traffic.wait_for_answers(1, seconds=10)
    with pytest.raises(TypeError, match="not JSON serializable"):
        traffic.record()
    assert server.seen == []
    assert traffic.under_way() == 0


def test_the_time_of_the_caller_ends_the_traffic_and_is_no_answer_of_the_server(
    server: ScriptedServer,
) -> None:
    server.script["POST /generate"] = Answer(delay=BOUND)
    asking = client(server)
    traffic = Traffic(asking, PROMPTS, sampling={}, workers=2)
    with asking.within(0.3), traffic, pytest.raises(TimeIsOver):
        traffic.wait_for_answers(6, seconds=BOUND)
    with pytest.raises(TimeIsOver):
        traffic.record()
    assert len(server.asked("POST /generate")) <= 2, "nothing is sent again and again meanwhile"


def test_traffic_without_prompts_is_refused(server: ScriptedServer) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        Traffic(client(server), [], sampling={})


# --- what is left behind -------------------------------------------------------------------------


class Aborting:
    """Holds every generation until its request is aborted, as a server that is busy does."""

    def __init__(self, server: ScriptedServer) -> None:
        self.running: dict[str, threading.Event] = {}
        self.aborted: list[str] = []
        server.script["POST /generate"] = self.generate
        server.script["POST /abort_request"] = self.abort

    def generate(self, seen: Seen) -> Answer:
        held = self.running.setdefault(seen.json()["rid"], threading.Event())
        return Answer(body=answer(seen).body, hold=held)

    def abort(self, seen: Seen) -> Answer:
        request_id = seen.json()["rid"]
        self.aborted.append(request_id)
        self.running.setdefault(request_id, threading.Event()).set()
        return Answer()


def threads_of_the_harness() -> set[str]:
    names = {t.name for t in threading.enumerate()}
    return {name for name in names if name.startswith(("traffic-", "stream-", "at-once"))}


class Broken(Exception):
    """What a check raises in the midst of it."""


def broken_off(traffic: Traffic, held: Aborting) -> None:
    with traffic:
        while len(held.running) < 3:
            time.sleep(0.01)
        raise Broken


def test_traffic_is_aborted_where_its_owner_raises(server: ScriptedServer) -> None:
    held = Aborting(server)
    traffic = Traffic(client(server), PROMPTS, sampling={}, workers=3, patience=6 * BOUND)
    with pytest.raises(Broken):
        broken_off(traffic, held)
    assert set(held.aborted) == set(held.running)
    assert threads_of_the_harness() == set()


def test_what_outlasts_the_patience_is_lost_and_does_not_run_on(server: ScriptedServer) -> None:
    held = Aborting(server)
    with Traffic(client(server), PROMPTS, sampling={}, workers=2, patience=0.2) as traffic:
        while len(held.running) < 2:
            time.sleep(0.01)
    assert len(traffic.record().lost()) == 2
    assert set(held.aborted) == set(held.running)
    assert threads_of_the_harness() == set()
