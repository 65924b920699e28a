"""The judges of a push: each lie is told in words, and silence is not taken for a yes."""

from __future__ import annotations

import math

import pytest

from sglang_harness.client import Checksums
from sglang_harness.weights.proof.checksums import ExpectedChecksums
from sglang_harness.weights.proof.witnesses import (
    judge_checksums,
    judge_label,
    judge_logprobs,
    known_states,
)
from sglang_harness.weights.report import Token


def sums(*ranks: dict[str, str]) -> Checksums:
    return Checksums(ranks, "")


BEFORE = {"a": "a0", "b": "b0", "rope.cos_sin_cache": "r"}
NEW = {"a": "a1", "b": "b1"}
AFTER = {**BEFORE, **NEW}


def expected(*ranks: dict[str, str], partly: tuple[str, ...] = ()) -> ExpectedChecksums:
    return ExpectedChecksums(ranks, frozenset(partly))


def test_all_as_computed_agrees():
    seen = judge_checksums(sums(BEFORE), sums(AFTER), expected(NEW))
    assert (seen.says, seen.wrong) == ("agrees", [])
    assert "2 match" in seen.how


@pytest.mark.parametrize(
    ("after", "wanted", "words"),
    [
        ({**AFTER, "b": "b0"}, NEW, "b: expected b1, got b0, its old value"),
        ({**AFTER, "b": "b9"}, NEW, "neither new nor old"),
        ({"a": "a1"}, NEW, "b: the server has no such parameter"),
        (AFTER, {"a": "a1"}, "b changed, although nothing of it was pushed"),
    ],
)
def test_each_lie_is_named(after, wanted, words):
    seen = judge_checksums(sums(BEFORE), sums(after), expected(wanted))
    assert seen.says == "differs"
    assert words in seen.wrong[0]


def test_a_part_of_a_parameter_has_to_change_it():
    one = expected({"a": "a1"}, partly=("b",))
    assert judge_checksums(sums(BEFORE), sums({**AFTER, "b": "?"}), one).says == "agrees"
    seen = judge_checksums(sums(BEFORE), sums({**AFTER, "b": "b0"}), one)
    assert "a part of it was pushed" in seen.wrong[0]


def test_every_rank_counts():
    two = expected(NEW, {"a": "a2", "b": "b2"})
    right = sums(AFTER, {**AFTER, "a": "a2", "b": "b2"})
    assert judge_checksums(sums(BEFORE, BEFORE), right, two).says == "agrees"
    wrong = judge_checksums(sums(BEFORE, BEFORE), sums(AFTER, AFTER), two)
    assert [w.split(":")[0] for w in wrong.wrong] == ["a (rank 1)", "b (rank 1)"]
    assert judge_checksums(sums(BEFORE), right, two).says == "differs"
    assert judge_checksums(sums(BEFORE), sums(AFTER), two).says == "differs"


def test_a_layout_that_nothing_confirms_proves_nothing():
    """Where the first weights do not give what is computed either, the computation is wrong."""
    strange = sums({"a": "x", "b": "y"})
    args = (sums(BEFORE), strange, expected(NEW))
    assert judge_checksums(*args).says == "differs"
    assert judge_checksums(*args, known_here=lambda: None).says == "differs"
    assert judge_checksums(*args, known_here=lambda: {"a", "b"}).says == "differs"
    seen = judge_checksums(*args, known_here=set)
    assert seen.says == "not available"
    assert "2 cannot be checked: for a, " in seen.how
    half = judge_checksums(*args, known_here=lambda: {"b"})
    assert half.says == "differs"
    assert [w.split(":")[0] for w in half.wrong] == ["b"], "only what can be computed is wrong"
    one = judge_checksums(sums(BEFORE), sums({**AFTER, "b": "y"}), expected(NEW), known_here=set)
    assert one.says == "not available"
    assert "1 match, and 1 cannot be checked" in one.how


def test_what_agrees_is_not_asked_about_twice():
    def never() -> set[str]:
        raise AssertionError("the first weights are read for nothing")

    assert judge_checksums(sums(BEFORE), sums(AFTER), expected(NEW), known_here=never).says == (
        "agrees"
    )


def test_without_a_known_layout_change_alone_is_no_proof():
    seen = judge_checksums(
        sums(BEFORE), sums(AFTER), None, why_none="'x' is not known", pushed=["a", "b", "q"]
    )
    assert seen.says == "not available"
    assert "'x' is not known" in seen.how
    assert "2 changed" in seen.how
    half = judge_checksums(
        sums(BEFORE), sums({**AFTER, "b": "b0"}), None, why_none="w", pushed=["a", "b"]
    )
    assert half.says == "differs"
    assert half.wrong == ["b is unchanged"]


def test_without_checksums_the_reason_is_given():
    seen = judge_checksums(None, None, expected(NEW), why_none="needs CUDA")
    assert (seen.says, seen.how) == ("not available", "needs CUDA")
    assert judge_checksums(sums(BEFORE), sums(BEFORE), expected({})).says == "not available"


def test_states_are_proven_on_every_rank_or_not_at_all():
    parts = {"a": ("q", "k"), "b": ("o",), "c": ("d",)}
    before, wanted = sums({"a": "0", "b": "0", "c": "0"}), expected({"a": "1", "b": "1", "c": "1"})
    after = sums({"a": "1", "b": "0", "c": "?"})
    assert known_states(before, after, wanted, parts) == ({"q", "k"}, {"o"})
    both = sums(*before.ranks, *before.ranks)
    twice = sums({"a": "1", "b": "0", "c": "0"}, {"a": "0", "b": "0", "c": "0"})
    new, old = known_states(both, twice, expected(*wanted.ranks, *wanted.ranks), parts)
    assert new == set()
    assert old == {"o", "d"}
    assert known_states(None, after, wanted, parts) == (set(), set())


# --- log-probabilities ---------------------------------------------------------------------------


def token(served: float, new: float, old: float | None = -9.0) -> Token:
    return Token(prompt=0, place=2, id=17, served=served, new=new, old=old)


def test_inside_of_the_new_and_outside_of_the_old_agrees():
    seen = judge_logprobs([token(-1.0, -1.0001)], "float32", same_weights=False)
    assert seen.says == "agrees"
    assert "off by up to 8.0000" in seen.how


@pytest.mark.parametrize("served", [-1.01, math.nan])
def test_a_token_that_is_off_is_named(served: float):
    seen = judge_logprobs([token(served, -1.0)], "float32", same_weights=False)
    assert seen.says == "differs"
    assert "prompt 0, token 2 (id 17)" in seen.wrong[0]
    assert "tolerance 0.0005" in seen.wrong[0]


def test_the_tolerance_is_the_dtypes():
    assert judge_logprobs([token(-1.05, -1.0)], "bfloat16", same_weights=False).says == "agrees"


def test_old_weights_that_say_the_same_are_no_control():
    seen = judge_logprobs([token(-1.0, -1.0, -1.0002)], "float32", same_weights=False)
    assert seen.says == "not available"
    assert "cannot be told apart" in seen.how
    assert judge_logprobs([token(-1.0, -1.0, None)], "float32", same_weights=False).says == (
        "not available"
    )
    same = judge_logprobs([token(-1.0, -1.0, -1.0)], "float32", same_weights=True)
    assert same.says == "agrees"
    assert "no control" in same.how


def test_no_tokens_say_nothing():
    assert judge_logprobs([], "float32", same_weights=False).says == "not available"


# --- labels ---------------------------------------------------------------------------------------


def test_the_label_is_looked_for_wherever_it_is_stated():
    stated = {"/model_info": "7", "answers": "6", "elsewhere": None}
    seen = judge_label("7", stated)
    assert seen.says == "differs"
    assert seen.wrong == ["answers: expected '7', got '6'"]
    assert judge_label("7", {"/model_info": "7"}).says == "agrees"
    assert judge_label("7", {"/model_info": None}).says == "not available"
