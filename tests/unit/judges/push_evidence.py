"""What the checks of pushes and of refused weights see of right servers, and the lies that they
have to refuse; each lie is good evidence with other values at some places."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pydantic import BaseModel

from sglang_harness.suite.checks.hostile.weights import Refusal
from sglang_harness.suite.checks.weights.parallel import PushedByRoutes
from sglang_harness.suite.checks.weights.pushes import (
    END,
    START,
    Many,
    Partial,
    PushedUnderTraffic,
    SentenceAnswer,
    TaughtSentence,
    UnderLoad,
)
from sglang_harness.suite.lib.scored import Tokens
from sglang_harness.suite.lib.segments import Segmented
from sglang_harness.traffic import Mark, SentRequest, TrafficRecord
from sglang_harness.weights.report import PushReport, Witness

TOLERANCE = 5e-4


class Told(NamedTuple):
    """One lie: what is wrong, the values at places, and a piece of the message; an empty piece
    for what is odd and still right."""

    check: str
    name: str
    values: dict[str, Any]
    piece: str


def dumped(value: Any) -> Any:
    """Plain data, as evidence holds it."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, list):
        return [dumped(each) for each in value]
    if isinstance(value, dict):
        return {key: dumped(each) for key, each in value.items()}
    return value


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
    ids = list(range(len(logprobs)))
    return Tokens(text="t", ids=ids, logprobs=list(logprobs), finish="length")


def mixed(switched: int = 3, length: int = 6, **changes: Any) -> Segmented:
    """An answer whose first ``switched`` tokens are the old weights'."""
    told: dict[str, Any] = {
        "prompt_ids": [1, 2], "ids": list(range(10, 10 + length)), "served": [-1.0] * length,
        "old": [-1.0] * switched + [-3.0] * (length - switched), "switched": switched,
        "expected": [-1.0] * length, "stated": switched, "finish": "length",
    }  # fmt: skip
    return Segmented.model_validate({**told, **changes})


def under_load(mode: str, answers: list[Segmented]) -> UnderLoad:
    told: dict[str, Any] = {
        "mode": mode, "asked": len(answers), "tokens_asked": 6, "running_at_push": 2,
        "push": report(outcome="unproven", pause=mode), "answers": answers, "failed": [],
        "seconds_held": 0.2, "tolerance": TOLERANCE,
    }  # fmt: skip
    return UnderLoad.model_validate(told)


def request(number: int, sent: float, ended: float | None, **changes: Any) -> SentRequest:
    told = {"number": number, "prompt": [1, 2], "sent": sent, "ended": ended, "ids": [1]}
    return SentRequest.model_validate({**told, **changes})


MARKS = [Mark(name=START, at=2), Mark(name=END, at=4.5)]
TRAFFIC = PushedUnderTraffic(
    traffic=TrafficRecord(
        requests=[request(0, 0, 1), request(1, 1, 4), request(2, 5, 6)], marks=MARKS
    ),
    answers=[mixed(6), mixed(3), mixed(0)],
    numbers=[0, 1, 2],
    push=report(outcome="unproven"),
    tolerance=TOLERANCE,
)
PARTIAL = Partial(
    name="a.weight", push=report(), changed=["a.weight", "rank1:a.weight"], restored=[]
)
MANY = Many(
    pushes=50, seconds=[0.1] * 50, first="aa", last="aa", new=["bb"], before=tokens(-0.5, -1.0),
    after=tokens(-0.5, -1.0), tolerance=TOLERANCE,
)  # fmt: skip
TAUGHT = TaughtSentence(
    prompt="The quick",
    answer=" brown fox",
    answer_ids=[7, 8],
    said_before=SentenceAnswer(text="?", ids=[1, 2]),
    said_after=SentenceAnswer(text=" brown fox", ids=[7, 8]),
    said_again=SentenceAnswer(text="?", ids=[1, 2]),
    push=report(),
    steps=3,
    training_seconds=1.0,
)
REFUSED = Refusal(
    status=400, said="no", death="", hung="", before=tokens(-0.5), after=tokens(-0.5),
    differing=[], no_checksums="", label_before="default", label_after="default",
    tolerance=TOLERANCE,
)  # fmt: skip


def by_routes(ranks: int, *routes: str) -> PushedByRoutes:
    return PushedByRoutes(
        ranks=ranks,
        routes=list(routes),
        pushes={route: report(route=route) for route in routes},
        changed=dict.fromkeys(routes, 15),
        unlike={route: [] for route in routes},
    )


UNDER_LOAD = {"weights/push-retract": "retract", "weights/push-in-place": "in_place"}
REFUSALS = [
    f"hostile/weights-{kind}"
    for kind in (
        "unknown-names", "wrong-shape", "not-finite", "wrong-dtype", "garbage",
        "unknown-load-format", "truncated-file", "group-never-joined",
    )
]  # fmt: skip
ONTO = {
    "weights/on-tensor-2": by_routes(2, "disk", "tensor", "tensor-bucket", "distributed"),
    "weights/on-pipeline-2": by_routes(1, "disk", "tensor"),
    "weights/on-experts": by_routes(1, "disk", "tensor", "distributed"),
}


def evidence() -> dict[str, dict[str, Any]]:
    """Good evidence by check."""
    seen: dict[str, BaseModel] = {
        "weights/partial-push": PARTIAL,
        "weights/fifty-pushes": MANY,
        "weights/push-under-traffic": TRAFFIC,
        "weights/taught-sentence": TAUGHT,
        "weights/push-abort": under_load("abort", [mixed(4, 4, finish="abort"), mixed(6)]),
        **{c: under_load(mode, [mixed(), mixed(2)]) for c, mode in UNDER_LOAD.items()},
        **dict.fromkeys(REFUSALS, REFUSED),
        **ONTO,
    }
    # By way of text, so that nothing is shared between places.
    return {name: json.loads(json.dumps(dumped(each))) for name, each in seen.items()}


def _told(check: str, *lies: tuple[str, dict[str, Any], str]) -> list[Told]:
    return [Told(check, name, dumped(values), piece) for name, values, piece in lies]


def _record(*requests: SentRequest) -> TrafficRecord:
    return TrafficRecord(requests=list(requests), marks=MARKS)


_LIES = [
    *_told(
        "weights/partial-push",
        ("nothing changed", {"changed": []}, "parameters that changed"),
        ("another changed too", {"changed": ["a.weight", "b.weight"]}, "b.weight"),
        ("the wrong content", {"push.checksums.says": "differs"}, "'differs'"),
        ("no witness", {"push.checksums.says": "not available"}, "'not available'"),
        ("it stayed", {"restored": ["a.weight"]}, "after going back"),
    ),
    *_told(
        "weights/fifty-pushes",
        ("drift of the weights", {"last": "ac"}, "checksum after all pushes"),
        ("two kinds of new", {"new": ["bb", "bc"]}, "checksums of the new weights"),
        ("new is old", {"new": ["aa"]}, "checksums of the new weights"),
        ("nothing was new", {"new": []}, "checksums of the new weights"),
        ("drift of the answers", {"after": tokens(-0.5, -1.1)}, "answer after all pushes"),
        ("no answer", {"after": tokens()}, "answer after all pushes"),
        ("one was refused", {"failed": "push 7: bucket 0: no"}, "push 7: bucket 0: no"),
    ),
    *(
        lie
        for check in UNDER_LOAD
        for lie in _told(
            check,
            ("a wrong new token", {"answers.0.served.5": -1.01}, "token 5 (new weights"),
            ("a wrong old token", {"answers.0.served.0": -1.01}, "token 0 (old weights"),
            ("a token of NaN", {"answers.0.served.5": float("nan")}, "answer 0, token 5"),
            ("no scores", {"answers.0.served": [-1.0]}, "6 log-probabilities, one a token"),
            ("cut short", {"answers.0": mixed(length=4)}, "tokens: expected 6, got 4"),
            ("no tokens", {"answers.0": mixed(0, 0)}, "expected tokens, got none"),
            ("ended", {"answers.0.finish": "abort"}, "expected 'length', got 'abort'"),
            ("never mixed", {"answers": [mixed(0), mixed(6)]}, "tokens of both weights"),
            ("a false label", {"answers.0.stated": 6}, "the old label: expected 3, got 6"),
            ("a lost request", {"failed": ["no answer within 120 s"]}, "within 120 s"),
            ("none ran", {"running_at_push": 0}, "requests at the push"),
            ("it did not arrive", {"push.outcome": "failed", "push.reason": "b 1"}, "got b 1"),
            ("a label one token off", {"answers.0.stated": 4}, ""),
            ("a label not stated", {"answers.0.stated": None}, ""),
        )
    ),
    *_told(
        "weights/push-abort",
        ("none was ended", {"answers": [mixed(6), mixed(6)]}, "none was"),
        ("new tokens", {"answers.1": mixed(3)}, "new ones from 3"),
        ("another reason", {"answers.1.finish": "stop"}, "got 'stop'"),
    ),
    *_told(
        "weights/push-under-traffic",
        ("new too early", {"answers.0": mixed(3)}, "request 0, ended before the push"),
        ("old too late", {"answers.2": mixed(2)}, "request 2, sent after the push"),
        ("a wrong token", {"answers.1.served.0": -2.0}, "request 1, token 0"),
        ("no push", {"push.outcome": "failed", "push.reason": "end"}, "got end"),
        (
            "one never ended",
            {
                "traffic": _record(request(0, 0, 1), request(1, 1, 4), request(2, 5, None, ids=[])),
                "answers": [mixed(6), mixed(3)],
                "numbers": [0, 1],
            },
            "request 2: expected an answer, got none, it never ended",
        ),
        (
            "none across",
            {
                "traffic": _record(request(0, 0, 1), request(2, 5, 6)),
                "answers": [mixed(6), mixed(0)],
                "numbers": [0, 2],
            },
            "requests before, across and after",
        ),
    ),
    *_told(
        "weights/taught-sentence",
        (
            "not learned",
            {"said_after": SentenceAnswer(text="?", ids=[1, 2])},
            "said after the push",
        ),
        ("known before", {"said_before": SentenceAnswer(text="b", ids=[7, 8])}, "said before"),
        ("not forgotten", {"said_again": SentenceAnswer(text="b", ids=[7, 8])}, "said again"),
        ("not the first", {"said_again": SentenceAnswer(text="!", ids=[1, 3])}, "weights are back"),
        ("no push", {"push.outcome": "failed", "push.reason": "no"}, "expected to arrive"),
    ),
    *(
        lie
        for check in REFUSALS
        for lie in _told(
            check,
            ("success", {"status": 200, "said": "success True"}, "a refusal (4xx), got 200"),
            ("no answer", {"status": None, "said": "none came"}, "a refusal (4xx), got None"),
            ("a crash of the request", {"status": 500}, "got 500"),
            ("it died", {"death": "It ended."}, "expected to stay up, got It ended."),
            ("it hangs", {"hung": "no answer within 30 s"}, "expected to keep answering"),
            ("other weights", {"differing": ["a"]}, "checksums that changed"),
            ("another answer", {"after": tokens(-0.6)}, "answer afterwards"),
            ("an answer of NaN", {"after": tokens(float("nan"))}, "answer afterwards"),
            ("no answer afterwards", {"after": None}, "answer afterwards: expected one"),
            ("the label moved on", {"label_after": "harness-refused"}, "weight version"),
        )
    ),
    *(
        lie
        for check in ONTO
        for lie in _told(
            check,
            ("it never came up", {"never_came_up": "It ended."}, "expected to come up"),
            ("no push", {"pushes.tensor.outcome": "failed", "pushes.tensor.reason": "b"}, "got b"),
            ("no oracle", {"pushes.disk.logprobs.says": "not available"}, "log-probabilities"),
            ("nothing changed", {"changed.tensor": 0}, "changed ones"),
            ("unlike disk", {"unlike.tensor": ["rank1:a"]}, "unlike the first route"),
            ("not restored", {"restored": ["a"]}, "after restoring"),
            ("one route alone", {"pushes": {"disk": report()}}, "routes: expected two or more"),
        )
    ),
    *_told("weights/on-tensor-2", ("one rank alone", {"ranks": 1}, "ranks: expected 2, got 1")),
    *_told(
        "weights/on-experts",
        ("no checksums", {"pushes.tensor.checksums.says": "not available"}, "checksums"),
    ),
]
LIES = [lie for lie in _LIES if lie.piece]
HARMLESS = [lie for lie in _LIES if not lie.piece]
