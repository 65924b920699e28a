"""Does every judge accept a right server and refuse each of the lies that it is there for?

The right servers are recorded: the evidence of a whole run against SGLang 0.5.23 on a CPU. A
lie is that evidence with one thing changed the way a broken server would have changed it, in one
file a subject. Nothing here starts a server, and a judge that refuses nothing does not get
through. Whether ``observe`` can see such a server: ``../test_checks_see_lies.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import lies_chat
import lies_control
import lies_generate
import lies_hostile
import lies_launch
import lies_memory
import lies_of_own_servers as own_servers
import lies_sample
import lies_stop
import lies_weights
import push_evidence
import pytest
import release_evidence
from alterations import PER_TOKEN, Alteration, at, put
from evidence import BY_HAND, EVIDENCE, KNOWN, RECORDED, good
from pydantic import ValidationError

from sglang_harness import suite
from sglang_harness.suite.check import Check, Mismatch, Observation
from sglang_harness.verdict import writable

CHECKS: dict[str, Check[Any]] = suite.registered()

SUBJECTS = (
    lies_launch,
    lies_generate,
    lies_sample,
    lies_stop,
    lies_chat,
    lies_control,
    lies_weights,
    lies_memory,
    lies_hostile,
)
LIES = [lie for subject in SUBJECTS for lie in subject.LIES]
HARMLESS = [oddity for subject in SUBJECTS for oddity in subject.HARMLESS]
LIES += [Alteration(*lie) for lie in own_servers.LIES]
HARMLESS += [Alteration(*oddity) for oddity in own_servers.HARMLESS]
for told in (release_evidence, push_evidence):
    LIES += [Alteration(t.check, t.name, put(t.values), t.piece) for t in told.LIES]
    HARMLESS += [Alteration(t.check, t.name, put(t.values)) for t in told.HARMLESS]


def named(alterations: list[Alteration]) -> list[Any]:
    return [pytest.param(a, id=f"{a.check}: {a.name}") for a in alterations]


def observed(check_id: str, evidence: dict[str, Any]) -> Observation:
    return CHECKS[check_id].observation.model_validate(evidence)


def judged(check_id: str, evidence: dict[str, Any]) -> list[Mismatch]:
    return CHECKS[check_id].judge(observed(check_id, evidence))


# --- the tests --------------------------------------------------------------------------------


def test_the_recorded_run_answers_every_check_that_its_server_could_be_asked():
    # Where there is no evidence there has to be an observation by hand.
    assert set(CHECKS) - set(EVIDENCE) <= set(BY_HAND)
    assert set(EVIDENCE) <= set(CHECKS)
    assert sorted(KNOWN) == ["hostile/out-of-vocabulary-ids", "stop/abort-whole-id"]


@pytest.mark.parametrize("check_id", CHECKS)
def test_what_a_right_server_does_is_accepted(check_id):
    assert judged(check_id, good(check_id)) == []


@pytest.mark.parametrize("check_id", KNOWN)
def test_a_recorded_defect_is_refused_with_what_was_recorded_of_it(check_id):
    recorded = next(c for c in RECORDED.checks if c.id == check_id)
    assert recorded.evidence is not None
    message = "; ".join(map(str, judged(check_id, EVIDENCE[check_id])))
    assert message
    # The wording may change; how the server ended is a fact.
    assert str(recorded.evidence.get("death", "")) in message


@pytest.mark.parametrize("lie", named(LIES))
def test_a_lie_is_refused_and_the_message_says_what_it_is(lie):
    messages = [str(m) for m in judged(lie.check, lie.altered())]
    assert any(lie.piece in message for message in messages), messages


@pytest.mark.parametrize("oddity", named(HARMLESS))
def test_what_a_right_server_may_also_do_is_accepted(oddity):
    altered = oddity.altered()
    assert altered != good(oddity.check)
    assert judged(oddity.check, altered) == []


@pytest.mark.parametrize("check_id", CHECKS)
def test_every_check_is_shown_at_least_two_lies(check_id):
    # A check that can't fail is a defect: whoever adds a check adds what it must refuse.
    assert len([lie for lie in LIES if lie.check == check_id]) >= 2


def test_no_two_lies_are_the_same():
    told = [(lie.check, lie.name) for lie in LIES + HARMLESS]
    assert len(set(told)) == len(told)
    seen = [(lie.check, repr(lie.altered())) for lie in LIES + HARMLESS]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("check_id", CHECKS)
def test_judging_is_pure(check_id):
    lies = [lie.altered() for lie in LIES if lie.check == check_id]
    for evidence in [good(check_id), *lies]:
        seen = observed(check_id, evidence)
        before = repr(seen)
        first = CHECKS[check_id].judge(seen)
        assert repr(seen) == before
        assert CHECKS[check_id].judge(seen) == first


@pytest.mark.parametrize("check_id", CHECKS)
def test_what_is_written_down_is_judged_as_what_was_seen(check_id):
    # A file holds no NaN and no halves of characters; what it holds must be judged alike.
    for evidence in [good(check_id), *(x.altered() for x in LIES if x.check == check_id)]:
        seen = observed(check_id, evidence)
        written = json.dumps(writable(seen.model_dump()), allow_nan=False)
        read = observed(check_id, json.loads(written))
        assert CHECKS[check_id].judge(read) == CHECKS[check_id].judge(seen)


@pytest.mark.parametrize("check_id", CHECKS)
def test_figures_of_a_right_server_are_numbers(check_id):
    seen = observed(check_id, good(check_id))
    for figure in CHECKS[check_id].figures(seen):
        assert math.isfinite(figure.value)
        assert figure.value >= 0


# --- odd observations -------------------------------------------------------------------------

ODD: tuple[Any, ...] = (0, -1, 10**9, 0.5, math.nan, math.inf, True, "", "other", None, [], {})

#: Lists that hold one value a token, or one entry an answer, beside other such lists. ``observe``
#: makes them equally long; emptied alone they mean nothing. Together they are, further down.
PARALLEL = {*PER_TOKEN, "logprobs", "labels", "before", "after"}

#: Places that hold what the check asked, not what the server said: ``observe`` makes them fit.
OWN_QUESTION = {
    "sample/follows-oracle": ("likely_probability",),
    "stop/conditions": ("stop_string", "stop_id", "whole.text", "whole.ids"),
    "chat/json-schema": ("json_schema*",),
    "weights/disk": ("answers",),
    "memory/updates-do-not-grow": ("used_bytes", "push_seconds"),
}


def is_own_question(check_id: str, way: tuple[str | int, ...]) -> bool:
    place = ".".join(map(str, way))
    return any(fnmatch(place, pattern) for pattern in OWN_QUESTION.get(check_id, ()))


def places(value: Any, way: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place within evidence; of a list the first and the last stand for all."""
    if way:
        yield way
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*way, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from places(value[index], (*way, index))


@pytest.mark.parametrize("check_id", CHECKS)
def test_no_odd_value_anywhere_makes_a_judge_raise(check_id):
    check, asked = CHECKS[check_id], 0
    for way in places(good(check_id)):
        if is_own_question(check_id, way):
            continue
        for odd in ODD:
            if odd == [] and way[-1] in PARALLEL:
                continue
            evidence = good(check_id)
            at(*way[:-1], do=lambda inner, w=way, o=odd: inner.__setitem__(w[-1], o))(evidence)
            try:
                seen = observed(check_id, evidence)
            except ValidationError:
                continue
            asked += 1
            check.judge(seen)
            check.figures(seen)
    assert asked


def without_tokens(value: Any) -> Iterator[dict[str, Any]]:
    """Every answer in evidence, to be emptied of its tokens."""
    if isinstance(value, dict):
        if "output_ids" in value or {"ids", "logprobs"} <= value.keys():
            yield value
        for inner in value.values():
            yield from without_tokens(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from without_tokens(inner)


def empty(answer: dict[str, Any]) -> None:
    for key in (*PER_TOKEN, "ids", "logprobs"):
        if key in answer:
            answer[key] = []


WITH_ANSWERS = [i for i in CHECKS if i != "stop/conditions" and any(without_tokens(good(i)))]


@pytest.mark.parametrize("check_id", WITH_ANSWERS)
def test_an_answer_without_a_token_makes_no_judge_raise(check_id):
    check = CHECKS[check_id]
    for number in range(len(list(without_tokens(good(check_id))))):
        evidence = good(check_id)
        empty(list(without_tokens(evidence))[number])
        check.judge(observed(check_id, evidence))
    evidence = good(check_id)
    for answer in without_tokens(evidence):
        empty(answer)
    check.figures(observed(check_id, evidence))
    check.judge(observed(check_id, evidence))
