"""The bracket around a push: at whatever point it fails, what was opened is closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scripted_server import Answer, Mortal, ScriptedServer

from sglang_harness.client import Client, RequestsTransport, calls
from sglang_harness.errors import NoAnswerInTime, Refused, ServerDied, TimeIsOver
from sglang_harness.weights import bracket as sessions
from sglang_harness.weights.bracket import Session

OK = Answer(body={"success": True, "message": ""})
NO = Answer(400, {"success": False, "message": "not now"})
NEVER = Answer(delay=60.0)

PAUSE, FLUSH = "POST /pause_generation", "POST /flush_cache"
BEGIN, END = "POST /begin_weight_update", "POST /end_weight_update"
BUCKET, GO_ON = "POST /update_weights_from_distributed", "POST /continue_generation"

ALL = {PAUSE: OK, FLUSH: OK, BEGIN: OK, BUCKET: OK, END: OK, GO_ON: OK}


@pytest.fixture(autouse=True)
def short_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CLOSES_WITHIN", 0.3)


@pytest.fixture
def play() -> Iterator[Any]:
    """Runs one session with one bucket on a server that answers as told."""
    opened: list[Any] = []

    def run(answers: dict[str, Any], **options: Any) -> tuple[Session, list[str], Any]:
        server = ScriptedServer({**ALL, **answers})
        client = Client(RequestsTransport(server.url), watch=options.pop("watch", None))
        opened.extend([client, server])
        given = {"pause": "retract", "flush": True, "bracket": True, "timeout": 1.0, **options}
        session = Session(client, **given)
        raised = None
        try:
            with session:
                session.step("bucket 0", lambda: client.send(bucket))
        except Exception as error:
            raised = error
        return session, [f"{seen.method} {seen.path}" for seen in server.seen], raised

    bucket = calls.update_weights_from_distributed(
        names=["a"], dtypes=["float32"], shapes=[[1]], group_name="g", timeout=1.0
    )
    yield run
    for each in opened:
        each.close()


def outcomes(session: Session) -> dict[str, str]:
    return {step.name: step.outcome for step in session.steps}


def test_a_push_goes_through_the_whole_bracket(play):
    session, sent, raised = play({})
    assert raised is None
    assert sent == [PAUSE, FLUSH, BEGIN, BUCKET, END, FLUSH, GO_ON]
    assert set(outcomes(session).values()) == {"done"}
    assert session.left_open == []
    assert [step.at for step in session.steps] == sorted(step.at for step in session.steps)


def test_what_nobody_asked_for_is_left_out_and_said(play):
    session, sent, raised = play({}, pause=None, flush=False, bracket=False)
    assert raised is None
    assert sent == [BUCKET]
    told = outcomes(session)
    assert [told[name] for name in ("pause", "flush", "begin")] == ["left out"] * 3


@pytest.mark.parametrize(
    ("refused", "sent_after"),
    [
        # A refused pause may have been obeyed in part: going on does no harm.
        (PAUSE, [FLUSH, GO_ON]),
        (FLUSH, [FLUSH, GO_ON]),
        # What is open then is somebody else's session: it is not ended.
        (BEGIN, [FLUSH, GO_ON]),
        (BUCKET, [END, FLUSH, GO_ON]),
    ],
)
def test_whatever_is_refused_on_the_way_the_server_goes_on(play, refused, sent_after):
    answers = {refused: [NO, OK]} if refused == FLUSH else {refused: NO}
    session, sent, raised = play(answers, pause="abort")
    assert isinstance(raised, Refused)
    assert sent[sent.index(refused) + 1 :] == sent_after
    assert session.left_open == []


def test_a_batch_that_still_ends_after_a_pause_is_waited_for(play):
    session, sent, raised = play({FLUSH: [NO, NO, OK]}, pause="retract")
    assert raised is None
    assert sent[:5] == [PAUSE, FLUSH, FLUSH, FLUSH, BEGIN]
    assert outcomes(session)["flush"] == "done"


def test_a_cache_that_is_never_emptied_is_told_and_the_server_goes_on(play, monkeypatch):
    monkeypatch.setattr("sglang_harness.weights.bracket.DRAINS_WITHIN", 0.2)
    session, sent, raised = play({FLUSH: NO}, pause="retract")
    assert isinstance(raised, Refused)
    assert BEGIN not in sent
    assert sent[-1] == GO_ON
    assert session.left_open == []


def test_a_session_that_cannot_be_ended_is_told_and_generation_goes_on(play):
    session, sent, raised = play({END: NO})
    assert raised is None, "closing never raises: whoever opened looks at what stayed open"
    assert sent[-1] == GO_ON
    assert session.left_open == ["a weight-update session is open"]
    assert isinstance(session.closing_errors[0], Refused)


def test_a_server_that_stays_paused_is_told(play):
    session, _, raised = play({GO_ON: NO})
    assert raised is None
    assert session.left_open == ["generation is paused"]


def test_a_refused_bucket_is_not_hidden_by_what_fails_afterwards(play):
    session, _, raised = play({BUCKET: NO, END: NO, GO_ON: NO})
    assert isinstance(raised, Refused)
    assert BUCKET.removeprefix("POST ") in raised.call
    assert session.left_open == ["a weight-update session is open", "generation is paused"]


def test_a_lost_answer_to_begin_means_that_a_session_may_be_open(play):
    _, sent, raised = play({BEGIN: NEVER})
    assert isinstance(raised, NoAnswerInTime)
    assert END in sent


def test_after_silence_closing_is_short(play):
    session, _, raised = play({BUCKET: NEVER, END: NEVER, GO_ON: NEVER}, timeout=5.0)
    assert isinstance(raised, NoAnswerInTime)
    closing = [step.name for step in session.steps[-2:]]
    assert closing == ["end", "continue"], "no flush for a server that answers nothing"
    assert session.left_open == ["a weight-update session is open", "generation is paused"]
    assert sum(step.seconds for step in session.steps[-2:]) < 2.0


def test_a_dead_server_is_asked_nothing_more(play):
    mortal = Mortal()
    dying = Answer(ending="silence", before=mortal.die)
    session, sent, raised = play({BUCKET: dying}, watch=mortal.watch)
    assert isinstance(raised, ServerDied)
    assert sent[-1] == BUCKET
    assert outcomes(session)["end"] == outcomes(session)["continue"] == "left out"


def test_a_bound_of_the_caller_never_forbids_closing_nor_hurries_it():
    """The server may only be slow: it is given the whole of its time to end the session."""
    late = Answer(body={"success": True, "message": ""}, delay=0.6)
    server = ScriptedServer({**ALL, END: late})
    client = Client(RequestsTransport(server.url))
    session = Session(client, pause="retract", flush=True, bracket=True, timeout=10.0)

    def push() -> None:
        with client.within(600), session:
            client._deadline = 0.0
            session.step("bucket 0", client.resume)

    try:
        with pytest.raises(TimeIsOver):
            push()
        sent = [f"{seen.method} {seen.path}" for seen in server.seen]
        assert sent == [PAUSE, FLUSH, BEGIN, END, FLUSH, GO_ON]
        assert session.left_open == []
    finally:
        client.close()
        server.close()


def test_an_interruption_closes_too(play):
    server = ScriptedServer(ALL)
    client = Client(RequestsTransport(server.url))
    try:
        session = Session(client, pause="abort", flush=False, bracket=True, timeout=1.0)

        def interrupted() -> None:
            with session:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert [s.path for s in server.seen][-2:] == ["/end_weight_update", "/continue_generation"]
    finally:
        client.close()
        server.close()
