"""From a refused connection to a first token: phases, lies on the way, and ends that are none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from scripted_server import BOUND, Answer, Mortal, ScriptedServer

from sglang_harness.errors import ServerDied, ServerLost, StartTimeout
from sglang_harness.runtime.death import DeathWatch, Unknown
from sglang_harness.server.readiness import PHASES, StartReport, wait_until_ready

STARTING = Answer(503, "")
OK = Answer(200, "")
TWO_TOKENS = Answer(
    body={
        "text": " a b",
        "output_ids": [5, 6],
        "meta_info": {
            "id": "1",
            "finish_reason": {"type": "length"},
            "prompt_tokens": 3,
            "completion_tokens": 2,
        },
    }
)
NO_TOKENS = Answer(body={**TWO_TOKENS.body, "text": "", "output_ids": []})

#: As 0.5.23 was seen to start: a list of models and the model's description long before it
#: can generate.
AS_SEEN: dict[str, Any] = {
    "GET /ready": [STARTING, STARTING, OK],
    "GET /v1/models": Answer(body={"data": [{"id": "m"}]}),
    "GET /model_info": Answer(body={"model_path": "m"}),
    "POST /generate": TWO_TOKENS,
}

#: 0.5.15: no /ready, and /health generates inside the server.
WITHOUT_READY: dict[str, Any] = {
    "GET /health": [STARTING, STARTING, OK],
    "GET /v1/models": Answer(body={"data": []}),
    "POST /generate": TWO_TOKENS,
}


def wait(server: ScriptedServer, *, limit: float = 30.0, **options: Any) -> StartReport:
    options = {"watch": Mortal().watch, "api_key": "the-key", **options}
    return wait_until_ready(server.url, limit=limit, **options)


def test_the_way_from_refused_to_a_first_token_is_kept_phase_by_phase():
    heard: list[str] = []
    with ScriptedServer(AS_SEEN, listening=False) as server:
        late = threading.Timer(0.3, server.listen)
        late.start()
        began = time.monotonic()
        report = wait(server, started=began - 2.0, say=heard.append)
        took = time.monotonic() - began
    seconds = {phase.name: phase.seconds for phase in report.phases}
    assert tuple(seconds) == PHASES
    # 'create' is what went by before anybody looked; 'import' the time of refused connections.
    assert seconds["create"] == pytest.approx(2.0, abs=0.2)
    assert 0.25 < seconds["import"] < 1.5
    # The phases follow one another without a gap.
    assert report.seconds == pytest.approx(2.0 + took, abs=0.2)
    assert report.ready_after == pytest.approx(
        seconds["create"] + seconds["import"] + seconds["load"], abs=0.01
    )
    assert (report.ready_by, report.first_tokens) == ("/ready", 2)
    assert heard == ["the server answers, and loads the model"]


def test_routes_that_answer_before_the_server_can_generate_are_on_record():
    with ScriptedServer(AS_SEEN, listening=False) as server:
        late = threading.Timer(0.2, server.listen)
        late.start()
        report = wait(server)
    assert report.premature == ["/v1/models", "/model_info"]
    # Only changes are sightings, however often a route was looked at.
    assert [(s.route, s.answer) for s in report.sightings] == [
        ("/ready", "refused"),
        ("/ready", "503"),
        ("/v1/models", "200"),
        ("/model_info", "200"),
        ("/ready", "200"),
    ]
    times = [s.seconds for s in report.sightings]
    assert times == sorted(times)
    assert report.looks > len(report.sightings)


def test_a_route_that_tells_the_truth_is_not_called_premature():
    honest = {**AS_SEEN, "GET /v1/models": STARTING, "GET /model_info": Answer(401, "")}
    with ScriptedServer(honest) as server:
        assert wait(server).premature == []


def test_a_server_without_ready_is_asked_for_its_health():
    with ScriptedServer(WITHOUT_READY) as server:
        report = wait(server)
        assert len(server.asked("GET /health")) == 3
        # Asked again and again for a route that is not there, it would fill its log.
        assert len(server.asked("GET /ready")) <= 2
    assert report.ready_by == "/health"
    assert report.premature == ["/v1/models"]


def test_every_look_carries_the_key():
    with ScriptedServer(AS_SEEN) as server:
        wait(server, api_key="the-key")
        assert {s.headers.get("authorization") for s in server.seen} == {"Bearer the-key"}


@pytest.mark.parametrize("listening", [False, True], ids=["while importing", "while loading"])
def test_a_server_that_dies_while_it_starts_is_told_at_once_and_not_at_the_limit(listening: bool):
    mortal = Mortal()
    timer = threading.Timer(0.3, mortal.die)
    with ScriptedServer({"GET /ready": STARTING}, listening=listening) as server:
        began = time.monotonic()
        timer.start()
        with pytest.raises(ServerDied, match="index out of range"):
            wait(server, limit=60.0, watch=mortal.watch)
    # Within a second of its exit.
    assert time.monotonic() - began < 1.3


def test_a_server_that_can_no_longer_be_observed_is_lost_at_once_and_not_dead():
    watch = DeathWatch(lambda: Unknown("the Docker engine stopped answering"))
    with ScriptedServer({"GET /ready": STARTING}) as server, pytest.raises(ServerLost):
        wait(server, limit=60.0, watch=watch)


def test_a_server_that_dies_under_its_first_generation_is_told_at_once():
    mortal = Mortal()
    script = {**AS_SEEN, "POST /generate": Answer(ending="reset", before=mortal.die)}
    with ScriptedServer(script) as server:
        began = time.monotonic()
        with pytest.raises(ServerDied):
            wait(server, limit=60.0, watch=mortal.watch)
    assert time.monotonic() - began < 3.0


def test_a_server_that_never_listens_is_slow_and_not_dead():
    with ScriptedServer({}, listening=False) as server:
        began = time.monotonic()
        with pytest.raises(StartTimeout) as caught:
            wait(server, limit=0.4, last_log_line=lambda: "Load weight begin. avail mem=20 GB")
    assert 0.4 <= time.monotonic() - began < 3.0
    text = str(caught.value)
    # How long, what was last seen, how far its log came, and what to do.
    for part in ("0.4 s", "/ready: refused", "Load weight begin", "limits.start"):
        assert part in text


def test_a_server_that_stays_busy_says_what_each_route_last_answered():
    script = {**AS_SEEN, "GET /ready": STARTING}
    with ScriptedServer(script) as server, pytest.raises(StartTimeout) as caught:
        wait(server, limit=0.4)
    text = str(caught.value)
    for part in ("/ready: 503", "/v1/models: 200", "/model_info: 200", "last log line: none"):
        assert part in text


def test_a_first_generation_that_fails_twice_is_asked_again():
    script = {
        **AS_SEEN,
        "POST /generate": [Answer(503, {"error": "warming up"}), Answer(ending="cut"), TWO_TOKENS],
    }
    with ScriptedServer(script) as server:
        report = wait(server)
        assert len(server.asked("POST /generate")) == 3
    assert report.first_tokens == 2


def test_the_first_generation_asks_for_tokens_that_every_vocabulary_has():
    with ScriptedServer(AS_SEEN) as server:
        wait(server)
        (asked,) = server.asked("POST /generate")
    body = asked.json()
    # An id out of the vocabulary kills SGLang 0.5.23; an early end would look like no token.
    assert max(body["input_ids"]) < 100
    assert body["sampling_params"]["ignore_eos"] is True


def test_a_200_without_a_token_is_an_error_and_not_a_start():
    with (
        ScriptedServer({**AS_SEEN, "POST /generate": NO_TOKENS}) as server,
        pytest.raises(StartTimeout, match="200 and no token"),
    ):
        wait(server)


def ended_within(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """What ``work`` raised, if it ended in time."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return raised[0] if raised else None


@pytest.mark.parametrize("hanging", ["GET /ready", "POST /generate"])
def test_an_answer_that_hangs_does_not_move_the_limit(hanging: str):
    with ScriptedServer({**AS_SEEN, hanging: Answer(delay=BOUND)}) as server:
        raised = ended_within(2.0, lambda: wait(server, limit=0.5))
    assert isinstance(raised, StartTimeout)


def test_a_server_that_refuses_to_generate_says_why_in_the_end():
    refusing = Answer(400, {"error": {"message": "lora path is required"}})
    with (
        ScriptedServer({**AS_SEEN, "POST /generate": refusing}) as server,
        pytest.raises(StartTimeout, match="lora path is required"),
    ):
        wait(server, limit=0.4)


def test_the_last_log_line_does_not_carry_the_key_into_the_message():
    line = "server_args={'model_path': 'm', 'api_key': 'the-key-of-this-server'}"
    with ScriptedServer({}, listening=False) as server, pytest.raises(StartTimeout) as caught:
        wait(server, limit=0.2, api_key="the-key-of-this-server", last_log_line=lambda: line)
    assert "model_path" in str(caught.value)
    assert "the-key-of-this-server" not in str(caught.value)
