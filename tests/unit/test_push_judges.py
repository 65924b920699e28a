"""The judges of pushes and of refused weights, on good observations and on each kind of lie."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_harness.suite import registered
from sglang_harness.suite.check import Check, Mismatch
from sglang_harness.suite.pushes import (
    END,
    START,
    Many,
    Partial,
    PushedUnderTraffic,
    Said,
    TaughtSentence,
    UnderLoad,
)
from sglang_harness.suite.refused_weights import Refusal
from sglang_harness.suite.scored import Tokens
from sglang_harness.suite.segments import Segmented
from sglang_harness.traffic import Mark, Request, TrafficRecord
from sglang_harness.weights.report import PushReport, Witness

TOLERANCE = 5e-4


def check(name: str) -> Check[Any]:
    return registered()[name]


def words(found: list[Mismatch]) -> str:
    return "; ".join(map(str, found))


def witness(name: str, says: str = "agrees") -> Witness:
    return Witness.model_validate({"name": name, "says": says, "how": "by a test"})


def report(**changes: Any) -> PushReport:
    told: dict[str, Any] = {
        "route": "tensor", "checkpoint": "x", "outcome": "good", "reason": "", "tensors": 1,
        "bytes": 4, "ranks": 1, "version": "v", "pause": "retract", "flush": True,
        "strict": False, "session": True, "seconds": 0.1, "seconds_staged": 0.0, "buckets": [],
        "steps": [], "checksums": witness("checksums"),
        "logprobs": witness("log-probabilities"), "label": witness("weight version"),
        "tokens": [], "new": [], "old": [], "unknown": [], "put_back": None, "unfit": None,
        "notes": [],
    }  # fmt: skip
    return PushReport.model_validate({**told, **changes})


def tokens(*logprobs: float) -> Tokens:
    return Tokens(
        text="t", ids=list(range(len(logprobs))), logprobs=list(logprobs), finish="length"
    )


# --- a part of the weights -------------------------------------------------------------------

PARTIAL = Partial(
    name="a.weight",
    push=report(),
    changed=["a.weight", "rank1:a.weight"],
    restored=[],
)


def test_a_partial_push_that_changed_its_parameter_alone_passes() -> None:
    assert check("weights/partial-push").judge(PARTIAL) == []


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({"changed": []}, "parameters that changed"),
        ({"changed": ["a.weight", "b.weight"]}, "b.weight"),
        ({"push": report(tensors=2)}, "tensors of the push: expected 1, got 2"),
        ({"push": report(checksums=witness("checksums", "differs"))}, "'differs'"),
        ({"push": report(checksums=witness("checksums", "not available"))}, "'not available'"),
        ({"restored": ["a.weight"]}, "after going back"),
    ],
)
def test_a_partial_push_that_did_more_or_less_is_told(lie: dict[str, Any], told: str) -> None:
    found = check("weights/partial-push").judge(PARTIAL.model_copy(update=lie))
    assert told in words(found)


# --- fifty of them ---------------------------------------------------------------------------

MANY = Many(
    pushes=50,
    seconds=[0.1],
    first="aa",
    last="aa",
    new=["bb"],
    before=tokens(-0.5, -1.0),
    after=tokens(-0.5, -1.0),
    tolerance=TOLERANCE,
)


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({}, ""),
        ({"last": "ac"}, "checksum after all pushes"),
        ({"new": ["bb", "bc"]}, "checksums of the new weights"),
        ({"new": ["aa"]}, "checksums of the new weights"),
        ({"new": []}, "checksums of the new weights"),
        ({"after": tokens(-0.5, -1.1)}, "answer after all pushes"),
        ({"after": tokens()}, "answer after all pushes"),
    ],
)
def test_drift_over_many_pushes_is_told(lie: dict[str, Any], told: str) -> None:
    found = words(check("weights/fifty-pushes").judge(MANY.model_copy(update=lie)))
    assert (told in found) if told else (found == "")


# --- under running requests --------------------------------------------------------------------


def mixed(switched: int = 3, length: int = 6, **changes: Any) -> Segmented:
    """An answer whose first ``switched`` tokens are the old weights'."""
    told: dict[str, Any] = {
        "prompt_ids": [1, 2], "ids": list(range(10, 10 + length)), "served": [-1.0] * length,
        "old": [-1.0] * switched + [-3.0] * (length - switched), "switched": switched,
        "expected": [-1.0] * length, "stated": switched, "finish": "length",
    }  # fmt: skip
    return Segmented.model_validate({**told, **changes})


def under_load(mode: str, answers: list[Segmented], **changes: Any) -> UnderLoad:
    told: dict[str, Any] = {
        "mode": mode, "asked": len(answers), "tokens_asked": 6, "running_at_push": 2,
        "push": report(outcome="unproven", pause=mode), "answers": answers, "failed": [],
        "seconds_held": 0.2, "tolerance": TOLERANCE,
    }  # fmt: skip
    return UnderLoad.model_validate({**told, **changes})


MODES = {"retract": "weights/push-retract", "in_place": "weights/push-in-place"}


@pytest.mark.parametrize("mode", MODES)
def test_answers_of_both_weights_in_their_turn_pass(mode: str) -> None:
    assert check(MODES[mode]).judge(under_load(mode, [mixed(), mixed(2)])) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("answers", "changes", "told"),
    [
        ([mixed(served=[-1.0] * 5 + [-1.01])], {}, "answer 0, token 5 (new weights"),
        ([mixed(served=[-1.01] + [-1.0] * 5)], {}, "answer 0, token 0 (old weights"),
        ([mixed(served=[-1.0] * 5 + [float("nan")])], {}, "token 5"),
        ([mixed(served=[-1.0] * 4)], {}, "6 log-probabilities, one a token"),
        ([mixed(length=4)], {}, "answer 0, tokens: expected 6, got 4"),
        ([mixed(ids=[], served=[], expected=[])], {}, "expected tokens, got none"),
        ([mixed(finish="abort")], {}, "finish: expected 'length', got 'abort'"),
        ([mixed(0), mixed(6)], {}, "expected tokens of both weights, got of one"),
        ([mixed(stated=6)], {}, "tokens with the old label: expected 3, got 6"),
        ([mixed()], {"failed": ["no answer within 120 s"]}, "no answer within 120 s"),
        ([mixed()], {"asked": 2}, "answers: expected 2, got 1"),
        ([mixed()], {"running_at_push": 0}, "requests at the push"),
        ([mixed()], {"push": report(outcome="failed", reason="bucket 1")}, "bucket 1"),
    ],
)
def test_a_push_under_load_that_lost_or_mixed_up_something_is_told(
    mode: str, answers: list[Segmented], changes: dict[str, Any], told: str
) -> None:
    assert told in words(check(MODES[mode]).judge(under_load(mode, answers, **changes)))


def test_a_label_that_is_one_token_off_is_no_lie() -> None:
    """Two weights may agree on a token by chance, and then nobody can tell where they switch."""
    assert check("weights/push-retract").judge(under_load("retract", [mixed(stated=4)])) == []


def test_aborted_requests_keep_the_old_weights_tokens_and_say_that_they_were_ended() -> None:
    aborted = mixed(4, 4, finish="abort")
    judge = check("weights/push-abort").judge
    assert judge(under_load("abort", [aborted, mixed(6)])) == []
    assert "none was" in words(judge(under_load("abort", [mixed(6)])))
    new = words(judge(under_load("abort", [aborted, mixed(3)])))
    assert "expected tokens of the old weights alone, got new ones from 3" in new
    assert "'stop'" in words(judge(under_load("abort", [aborted, mixed(6, finish="stop")])))


# --- under traffic -----------------------------------------------------------------------------


def request(number: int, sent: float, ended: float | None, **changes: Any) -> Request:
    told = {"number": number, "prompt": [1, 2], "sent": sent, "ended": ended, "ids": [1]}
    return Request.model_validate({**told, **changes})


def traffic(**changes: Any) -> PushedUnderTraffic:
    told: dict[str, Any] = {
        "traffic": TrafficRecord(
            requests=[request(0, 0, 1), request(1, 1, 4), request(2, 5, 6)],
            marks=[Mark(name=START, at=2), Mark(name=END, at=4.5)],
        ),
        "answers": [mixed(6), mixed(3), mixed(0)],
        "numbers": [0, 1, 2],
        "push": report(outcome="unproven"),
        "tolerance": TOLERANCE,
    }
    return PushedUnderTraffic.model_validate({**told, **changes})


def record(*requests: Request) -> TrafficRecord:
    return traffic().traffic.model_copy(update={"requests": list(requests)})


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({}, ""),
        ({"answers": [mixed(3), mixed(3), mixed(0)]}, "request 0, ended before the push"),
        ({"answers": [mixed(6), mixed(3), mixed(2)]}, "request 2, sent after the push"),
        ({"answers": [mixed(6), mixed(3, served=[-2.0] * 6), mixed(0)]}, "request 1, token 0"),
        ({"push": report(outcome="failed", reason="end")}, "expected one that arrives, got end"),
        (
            {
                "traffic": record(request(0, 0, 1), request(1, 1, 4), request(2, 5, None, ids=[])),
                "answers": [mixed(6), mixed(3)],
                "numbers": [0, 1],
            },
            "request 2: expected an answer, got none, it never ended",
        ),
        (
            {
                "traffic": record(request(0, 0, 1), request(2, 5, 6)),
                "answers": [mixed(6), mixed(0)],
                "numbers": [0, 2],
            },
            "requests before, across and after",
        ),
    ],
)
def test_every_answer_of_the_traffic_is_accounted_for(lie: dict[str, Any], told: str) -> None:
    found = words(check("weights/push-under-traffic").judge(traffic(**lie)))
    assert (told in found) if told else (found == "")
    check("weights/push-under-traffic").figures(traffic(**lie))


# --- the taught sentence -----------------------------------------------------------------------

TAUGHT = TaughtSentence(
    prompt="The quick",
    answer=" brown fox",
    answer_ids=[7, 8],
    said_before=Said(text="?", ids=[1, 2]),
    said_after=Said(text=" brown fox", ids=[7, 8]),
    said_again=Said(text="?", ids=[1, 2]),
    push=report(),
    steps=3,
    training_seconds=1.0,
)


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({}, ""),
        ({"said_after": Said(text="?", ids=[1, 2])}, "said after the push"),
        ({"said_before": Said(text=" brown fox", ids=[7, 8])}, "said before"),
        ({"said_again": Said(text=" brown fox", ids=[7, 8])}, "said again"),
        ({"said_again": Said(text="!", ids=[1, 3])}, "when the first weights are back"),
        ({"push": report(outcome="failed", reason="no")}, "one that arrives"),
    ],
)
def test_a_sentence_that_was_not_learned_or_not_forgotten_is_told(
    lie: dict[str, Any], told: str
) -> None:
    found = words(check("weights/taught-sentence").judge(TAUGHT.model_copy(update=lie)))
    assert (told in found) if told else (found == "")


# --- weights that are to be refused --------------------------------------------------------------

REFUSED = Refusal(
    status=400,
    said="no",
    death="",
    hung="",
    before=tokens(-0.5),
    after=tokens(-0.5),
    differing=[],
    no_checksums="",
    label_before="default",
    label_after="default",
    tolerance=TOLERANCE,
)
HOSTILE = [name for name in registered() if name.startswith("hostile/weights-")]


def test_there_is_a_check_for_each_kind_of_bad_weights() -> None:
    assert len(HOSTILE) == 8


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({}, ""),
        ({"status": 200, "said": "success True"}, "expected a refusal (4xx), got 200"),
        ({"status": None, "said": "no answer"}, "expected a refusal (4xx), got None"),
        ({"status": 500}, "got 500"),
        ({"death": "It ended."}, "expected one that lives, got It ended."),
        ({"hung": "no answer within 30 s"}, "one that answers"),
        ({"differing": ["a"]}, "checksums that changed"),
        ({"after": tokens(-0.6)}, "answer afterwards"),
        ({"after": tokens(float("nan"))}, "answer afterwards"),
        ({"after": None}, "answer afterwards: expected one, got none"),
        ({"label_after": "harness-refused"}, "weight version"),
    ],
)
def test_a_refusal_that_was_none_or_did_harm_is_told(
    name: str, lie: dict[str, Any], told: str
) -> None:
    found = words(check(name).judge(REFUSED.model_copy(update=lie)))
    assert (told in found) if told else (found == "")
