"""Does the engine turn whatever a check does into one honest outcome?

The checks here are made by hand and are not part of the suite; of a server they are given only
what the engine itself touches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import Field
from scripted_server import BOUND, Answer, ScriptedServer

from sglang_harness import suite
from sglang_harness._base.secrets import REDACTED, Redactor
from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import (
    BadAnswer,
    DidNotComeUp,
    EngineError,
    HarnessError,
    Interrupted,
    MissingExtra,
    NoAnswerInTime,
    NotEnoughRoom,
    Refused,
    RequestFailed,
    ServerDied,
    ServerLost,
    SpecError,
    StartTimeout,
    TimeIsOver,
    Unreachable,
)
from sglang_harness.oracle import TOLERANCE
from sglang_harness.runtime.death import Death, Unknown
from sglang_harness.suite import check as engine
from sglang_harness.suite.check import (
    Check,
    Mismatch,
    NotProvided,
    Observation,
    expect,
    judge_again,
    register,
    run_check,
)
from sglang_harness.suite.lib.scored import (
    Scored,
    Tokens,
    largest_error,
    not_greedy,
    unequal,
    wrong_counts,
    wrong_logprobs,
)
from sglang_harness.verdict import CheckResult, Figure, Outcome

GENERATED = {
    "text": "a",
    "output_ids": [5],
    "meta_info": {
        "id": "1",
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "cached_tokens": 0,
    },
}

SECRET = "k9-a-key-that-nobody-may-read"  # a key of no server


class Seen(Observation):
    answers: list[int]
    words: dict[str, str] = Field(default_factory=dict)


class AllTwos(Check[Seen]):
    """Every answer has to be 2."""

    id = "example/all-twos"
    sentence = "Every answer is 2."
    observation = Seen

    def __init__(self, observe: Callable[[Any], Seen]) -> None:
        self._observe = observe

    def observe(self, context: Any) -> Seen:
        return self._observe(context)

    def judge(self, seen: Seen) -> list[Mismatch]:
        return [m for n, a in enumerate(seen.answers) for m in expect(f"answer {n}", 2, a)]

    def figures(self, seen: Seen) -> list[Figure]:
        return [Figure.of("answers", "1", "higher", len(seen.answers))]


def seeing(*answers: int, **words: str) -> AllTwos:
    return AllTwos(lambda _: Seen(answers=list(answers), words=words))


def raising(error: BaseException) -> AllTwos:
    def observe(_: Any) -> Seen:
        raise error

    return AllTwos(observe)


@pytest.fixture
def context() -> Any:
    """Of a context, what the engine itself touches."""
    server = SimpleNamespace(client=SimpleNamespace(), redactor=Redactor(SECRET))
    return SimpleNamespace(server=server)


# --- outcomes ---------------------------------------------------------------------------------


def test_a_check_that_sees_nothing_wrong_passes_with_its_evidence_and_its_figures(context):
    result, figures = run_check(seeing(2, 2), context)
    assert result.outcome is Outcome.PASS
    assert result.message == ""
    assert result.evidence == {"answers": [2, 2], "words": {}}
    assert [(f.name, f.value) for f in figures] == [("answers", 2)]
    assert result.id == "example/all-twos"
    assert result.seconds >= 0


def test_a_failure_says_everything_that_is_wrong(context):
    result, figures = run_check(seeing(2, 3, 4), context)
    assert result.outcome is Outcome.FAIL
    assert result.message == "answer 1: expected 2, got 3; answer 2: expected 2, got 4"
    # What was seen and measured is worth keeping above all when it is wrong.
    assert result.evidence == {"answers": [2, 3, 4], "words": {}}
    assert figures


@pytest.mark.parametrize(("wrong", "end"), [(5, "got 1"), (6, "and 1 more"), (40, "and 35 more")])
def test_a_long_failure_is_cut_after_five_mismatches_and_counts_the_rest(context, wrong, end):
    result, _ = run_check(seeing(*[1] * wrong), context)
    assert result.message.count("expected 2, got 1") == 5
    assert result.message.endswith(end)
    assert result.evidence is not None
    assert len(result.evidence["answers"]) == wrong


def test_a_server_that_dies_under_a_check_fails_it_and_its_last_words_are_kept(context):
    death = Death(137, False, "", "IndexError: out of range", ("loading", "out of range"))
    result, figures = run_check(raising(ServerDied(death)), context)
    assert result.outcome is Outcome.FAIL
    assert result.message.startswith("the server died during this check: The server ended")
    assert "IndexError: out of range" in result.message
    assert "Last output: loading | out of range" in result.message
    assert (result.evidence, figures) == (None, [])


@pytest.mark.parametrize(
    "error",
    [
        Unreachable("POST /generate", "connection reset"),
        NoAnswerInTime("POST /generate", "no answer within 20 s"),
        Refused("POST /generate", 500, "Internal Server Error"),
        Refused("POST /generate", 200, "an error after the stream had begun"),
        BadAnswer("POST /generate", "an answer that cannot be read"),
        StartTimeout("no generation succeeded within 900 s"),
        DidNotComeUp("The check's own server did not come up."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_server_that_hangs_fails_or_cuts_off_has_failed_the_check(context, error):
    result, _ = run_check(raising(error), context)
    assert result.outcome is Outcome.FAIL
    assert result.message == str(error)


@pytest.mark.parametrize("stuck", [True, False], ids=["stuck", "slow"])
def test_when_the_checks_time_is_over_the_server_is_asked_whether_it_still_generates(stuck: bool):
    answer = Answer(delay=BOUND) if stuck else Answer(body=json.dumps(GENERATED))
    with ScriptedServer({"POST /generate": answer}) as server:
        client = Client(RequestsTransport(server.url), timeout=0.3)
        asked = SimpleNamespace(server=SimpleNamespace(client=client, redactor=Redactor("")))
        with client.within(-1):
            result, _ = run_check(raising(TimeIsOver("GET /a", "the time was over")), asked)
        client.close()
    assert result.outcome is (Outcome.FAIL if stuck else Outcome.ERROR)
    assert ("does not generate any more" in result.message) is stuck
    assert ("Raise limits.check" in result.message) is not stuck


def test_a_package_that_is_missing_makes_a_check_not_run(context):
    result, _ = run_check(raising(MissingExtra("The oracle", "torch")), context)
    assert result.outcome is Outcome.NOT_RUN
    assert "sglang-harness[torch]" in result.message


@pytest.mark.parametrize(
    "error",
    [
        RequestFailed("POST /generate", "no usable answer"),
        Refused("POST /generate", 401, "Unauthorized"),
        EngineError("The Docker engine does not answer."),
        ServerLost(Unknown("its container was removed from outside this run")),
        HarnessError("No usable stop string in the answer ''."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_keeps_the_harness_from_finding_out_is_an_error_in_its_own_words(context, error):
    result, _ = run_check(raising(error), context)
    assert result.outcome is Outcome.ERROR
    assert result.message == str(error)


def test_what_the_harness_cannot_provide_is_not_run_with_reason_and_advice(context):
    missing = NotProvided("The oracle cannot read it.", advice="Give the model as a folder.")
    result, _ = run_check(raising(missing), context)
    assert result.outcome is Outcome.NOT_RUN
    assert result.message == "The oracle cannot read it. Give the model as a folder."


def test_a_package_that_is_not_installed_is_not_run_without_any_check_saying_so(context):
    result, _ = run_check(raising(MissingExtra("The oracle", "torch")), context)
    assert result.outcome is Outcome.NOT_RUN
    assert "pip install 'sglang-harness[torch]'" in result.message


def test_a_model_for_which_this_machine_is_too_small_is_not_run_with_reason_and_advice(context):
    small = NotEnoughRoom("It needs 64.0 GB of memory.", advice="Take a smaller model.")
    result, _ = run_check(raising(small), context)
    assert result.outcome is Outcome.NOT_RUN
    assert result.message == "It needs 64.0 GB of memory. Take a smaller model."


def test_an_unexpected_exception_is_an_error_that_names_its_place_and_shows_no_traceback(context):
    def observe(_: Any) -> Seen:
        def deeper() -> Seen:
            return {}["choices"]

        return deeper()

    result, _ = run_check(AllTwos(observe), context)
    line = observe.__code__.co_firstlineno + 2
    assert result.outcome is Outcome.ERROR
    assert result.message == f"KeyError in {Path(__file__).name}:{line}: 'choices'"
    assert "Traceback" not in result.message


def test_an_interruption_is_not_mistaken_for_a_finding(context):
    with pytest.raises(Interrupted):
        run_check(raising(Interrupted(2)), context)


# --- secrets ----------------------------------------------------------------------------------


def test_a_key_in_the_evidence_is_written_nowhere(context):
    result, _ = run_check(seeing(2, key=f"--api-key {SECRET}", plain="of no interest"), context)
    assert SECRET not in result.model_dump_json()
    assert result.evidence is not None
    assert result.evidence["words"] == {"key": f"--api-key {REDACTED}", "plain": "of no interest"}


@pytest.mark.parametrize(
    "error",
    [
        Refused("POST /generate", 401, f"not your key: {SECRET}"),
        NotProvided(f"no model for {SECRET}"),
        ServerDied(Death(1, False, "", f"ValueError: --api-key {SECRET}", (f"key {SECRET}",))),
        ValueError(f"bad header {SECRET}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_key_in_an_error_is_not_shown(context, error):
    result, _ = run_check(raising(error), context)
    assert SECRET not in result.model_dump_json()
    assert REDACTED in result.message


def test_a_key_in_a_mismatch_is_not_shown(context):
    class KeepsItsKey(AllTwos):
        def judge(self, seen: Seen) -> list[Mismatch]:
            return [Mismatch("info", "no key", seen.words["key"])]

    check = KeepsItsKey(lambda _: Seen(answers=[], words={"key": SECRET}))
    result, _ = run_check(check, context)
    assert result.message == f"info: expected no key, got {REDACTED}"


# --- judging again ----------------------------------------------------------------------------


def saved(**changes: Any) -> CheckResult:
    values: dict[str, Any] = {
        "id": "example/all-twos",
        "outcome": Outcome.PASS,
        "seconds": 3.5,
        "evidence": {"answers": [2, 1]},
        "retries": ["GET /ready: try 1: refused"],
    }
    return CheckResult(**{**values, **changes})


def test_judging_again_changes_what_is_judged_and_nothing_that_was_seen():
    before = saved(outcome=Outcome.KNOWN, known_defect="twos")
    after = judge_again(seeing(), before)
    assert (after.outcome, after.message) == (Outcome.FAIL, "answer 1: expected 2, got 1")
    # Whether the registry excuses it is asked afresh, by the caller.
    assert after.known_defect is None
    kept = ("id", "seconds", "evidence", "retries")
    assert [getattr(after, k) for k in kept] == [getattr(before, k) for k in kept]


def test_a_result_without_evidence_keeps_its_outcome_when_judged_again():
    died = saved(outcome=Outcome.FAIL, message="expected a server that lives", evidence=None)
    assert judge_again(seeing(), died) == died


@pytest.mark.parametrize(
    ("evidence", "place"),
    [
        ({}, "answers: "),
        ({"answers": [2, "two"]}, "answers.1: "),
        ({"answers": [2], "seconds": 1.5}, "seconds: "),
    ],
    ids=["lacks a field", "a field of another type", "a field that the check does not know"],
)
def test_evidence_of_another_check_is_refused_in_one_line_that_says_where(evidence, place):
    with pytest.raises(SpecError) as caught:
        judge_again(seeing(), saved(evidence=evidence))
    message = str(caught.value)
    assert "example/all-twos" in message
    assert place in message
    assert "\n" not in message


# --- the registry and the selection -----------------------------------------------------------


@pytest.fixture
def own_registry(monkeypatch):
    """A registry for this test alone; the suite's own comes back afterwards."""
    monkeypatch.setattr(engine, "_REGISTRY", {})


@pytest.mark.usefixtures("own_registry")
def test_two_checks_cannot_have_the_same_id():
    class First(AllTwos):
        id = "example/first"

        def __init__(self) -> None:
            super().__init__(lambda _: Seen(answers=[]))

    class Second(First):
        pass

    assert register(First) is First
    with pytest.raises(SpecError, match="Two checks have the id 'example/first'"):
        register(Second)
    assert isinstance(suite.registered()["example/first"], First)
    assert not isinstance(suite.registered()["example/first"], Second)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("bad", ["example", "example/of/three", ""])
def test_an_id_that_is_not_subject_and_name_is_refused(bad):
    class Misnamed(AllTwos):
        id = bad

    with pytest.raises(SpecError, match="not of the form subject/name"):
        register(Misnamed)
    assert suite.registered() == {}


def test_whoever_is_given_the_registry_cannot_change_it():
    suite.registered().clear()
    assert suite.registered()


@pytest.mark.parametrize("check", suite.registered().values(), ids=lambda check: check.id)
def test_every_check_says_what_must_hold_in_one_sentence(check):
    assert check.sentence.endswith(".")
    assert "\n" not in check.sentence
    assert check.profile in ("quick", "full")


def ids(checks: list[Check[Any]]) -> list[str]:
    return [check.id for check in checks]


def test_the_full_profile_is_everything_and_the_quick_one_leaves_out_what_costs_a_server():
    full, quick = ids(suite.select("full", [])), ids(suite.select("quick", []))
    assert sorted(full) == sorted(suite.registered())
    assert set(full) - set(quick) == {
        c.id for c in suite.registered().values() if c.profile == "full"
    }
    assert "hostile/out-of-vocabulary-ids" not in quick
    assert not any(c.own_server for c in suite.select("quick", []))


def test_checks_that_can_share_a_server_of_their_own_come_after_one_another():
    chosen = suite.select("full", [])
    words = [c.alike for c in chosen if c.alike]
    assert {"tensor-2", "pipeline-2", "qwen3-moe"} <= set(words)
    runs = [word for n, word in enumerate(words) if n == 0 or words[n - 1] != word]
    assert len(runs) == len(set(words))
    alone = [c.id for c in chosen if not c.alike and not c.ends_its_server]
    assert alone == [i for i in suite.registered() if i in set(alone)], (
        "the others keep their order"
    )


def test_a_part_of_an_id_selects_whatever_the_profile():
    assert ids(suite.select("quick", ["out-of-vocab"])) == ["hostile/out-of-vocabulary-ids"]
    assert ids(suite.select("quick", ["stop/abort"])) == ["stop/abort", "stop/abort-whole-id"]


def test_a_glob_selects_by_the_whole_id():
    assert ids(suite.select("quick", ["*/abort"])) == ["stop/abort"]
    weights = ids(suite.select("quick", ["weights/*"]))
    assert len(weights) > 2
    assert all(i.startswith("weights/") for i in weights)


def test_selected_checks_run_once_each_and_in_the_order_of_the_suite():
    # 'launch/stop' comes with two patterns, and generate before stop whatever is typed first.
    found = ids(suite.select("quick", ["stop", "generate/*", "launch/stop"]))
    assert found == [i for i in suite.registered() if "stop" in i or i.startswith("generate/")]


@pytest.mark.parametrize("patterns", [["nonsense"], ["generate", "nonsense"]])
def test_a_pattern_that_matches_nothing_is_an_error_even_beside_one_that_does(patterns):
    with pytest.raises(SpecError, match="No check matches") as caught:
        suite.select("full", patterns)
    assert repr(patterns[-1]) in str(caught.value)


# --- what most judges are made of -------------------------------------------------------------

# The same examples in every run, and no files left behind: a red run can be repeated as it is.
steady = settings(derandomize=True, database=None, deadline=None, max_examples=100)

logprob = st.floats(min_value=-30.0, max_value=0.0)
tolerances = st.sampled_from(sorted(TOLERANCE.values()))


@st.composite
def right_answers(draw: st.DrawFn, min_size: int = 0) -> Scored:
    """A greedy answer that the oracle agrees with to the last bit."""
    ids = draw(st.lists(st.integers(0, 50), min_size=min_size, max_size=8))
    values = draw(st.lists(logprob, min_size=len(ids), max_size=len(ids)))
    return Scored(
        prompt="p",
        prompt_ids=[1, 2],
        text="t",
        output_ids=ids,
        served=values,
        served_ids=ids,
        oracle=values,
        best_ids=ids,
        best=values,
        prompt_tokens=2,
        completion_tokens=len(ids),
        cached_tokens=0,
        finish="length",
        tolerance=draw(tolerances),
    )


def moved(values: list[float], place: int, by: float) -> list[float]:
    return [v + by if n == place else v for n, v in enumerate(values)]


@steady
@given(right_answers())
def test_an_answer_that_equals_the_oracles_is_never_refused(seen):
    assert not [*wrong_logprobs("w", seen), *not_greedy("w", seen)]
    assert not [*wrong_counts("w", seen, len(seen.output_ids))]
    assert largest_error([seen]) == 0


@steady
@given(right_answers(), st.data())
def test_noise_within_the_tolerance_is_never_refused(seen, data):
    noise = st.floats(-0.99, 0.99)
    served = [v + data.draw(noise) * seen.tolerance for v in seen.served]
    noisy = seen.model_copy(update={"served": served})
    assert not list(wrong_logprobs("w", noisy))
    assert largest_error([noisy]) <= seen.tolerance


@steady
@given(right_answers(min_size=1), st.data())
def test_any_one_log_probability_off_by_more_than_the_tolerance_is_refused_alone(seen, data):
    place = data.draw(st.integers(0, len(seen.served) - 1))
    by = data.draw(st.floats(1.01, 1000.0)) * seen.tolerance * data.draw(st.sampled_from([-1, 1]))
    wrong = list(
        wrong_logprobs("w", seen.model_copy(update={"served": moved(seen.served, place, by)}))
    )
    assert [m.where for m in wrong] == [f"w, token {place} ({seen.output_ids[place]})"]


@steady
@given(right_answers(min_size=1), st.data(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_log_probability_that_is_no_finite_number_is_refused_wherever_it_is(seen, data, bad):
    place = data.draw(st.integers(0, len(seen.served) - 1))
    served = [bad if n == place else v for n, v in enumerate(seen.served)]
    (wrong,) = wrong_logprobs("w", seen.model_copy(update={"served": served}))
    assert str(bad) in str(wrong)


@steady
@given(right_answers(min_size=1), st.data())
def test_a_log_probability_of_another_token_is_refused_however_close_it_is(seen, data):
    place = data.draw(st.integers(0, len(seen.output_ids) - 1))
    others = [i + 1 if n == place else i for n, i in enumerate(seen.served_ids)]
    assert list(wrong_logprobs("w", seen.model_copy(update={"served_ids": others})))


@steady
@given(right_answers(min_size=1), st.data())
def test_a_less_probable_token_is_refused_at_the_first_place_where_it_stands(seen, data):
    places = data.draw(st.sets(st.integers(0, len(seen.output_ids) - 1), min_size=1))
    gap = data.draw(st.floats(2.02, 500.0)) * seen.tolerance
    ids = [i + 1 if n in places else i for n, i in enumerate(seen.output_ids)]
    its = [v - gap if n in places else v for n, v in enumerate(seen.best)]
    (wrong,) = not_greedy("w", seen.model_copy(update={"output_ids": ids, "oracle": its}))
    assert wrong.where == f"w, token {min(places)}"


@steady
@given(right_answers(min_size=1), st.data())
def test_a_near_tie_may_go_either_way(seen, data):
    place = data.draw(st.integers(0, len(seen.output_ids) - 1))
    gap = data.draw(st.floats(0.0, 1.98)) * seen.tolerance
    ids = [i + 1 if n == place else i for n, i in enumerate(seen.output_ids)]
    tied = seen.model_copy(
        update={"output_ids": ids, "oracle": moved(seen.best, place, -gap)},
    )
    assert not list(not_greedy("w", tied))


@steady
@given(right_answers(), st.integers(-3, 3), st.integers(-3, 3), st.integers(-2, 2))
def test_any_count_that_lies_is_refused(seen, asked, completion, prompt):
    lied = seen.model_copy(
        update={
            "completion_tokens": seen.completion_tokens + completion,
            "prompt_tokens": seen.prompt_tokens + prompt,
        }
    )
    wrong = list(wrong_counts("w", lied, len(seen.output_ids) + asked))
    assert len(wrong) == sum(map(bool, (asked, completion, prompt)))


@st.composite
def plain_answers(draw: st.DrawFn, min_size: int = 0) -> Tokens:
    ids = draw(st.lists(st.integers(0, 50), min_size=min_size, max_size=8))
    values = draw(st.lists(logprob, min_size=len(ids), max_size=len(ids)))
    return Tokens(text=draw(st.text(max_size=5)), ids=ids, logprobs=values, finish="length")


@steady
@given(plain_answers(), tolerances)
def test_equal_answers_are_never_unequal(answer, tolerance):
    assert not list(unequal("w", answer, answer.model_copy(deep=True), tolerance))


@steady
@given(plain_answers(min_size=1), tolerances, st.data())
def test_one_log_probability_that_differs_makes_answers_unequal_there(answer, tolerance, data):
    place = data.draw(st.integers(0, len(answer.ids) - 1))
    by = data.draw(st.floats(2.02, 1000.0)) * tolerance * data.draw(st.sampled_from([-1, 1]))
    other = answer.model_copy(update={"logprobs": moved(answer.logprobs, place, by)})
    (wrong,) = unequal("w", answer, other, tolerance)
    assert wrong.where == f"w, token {place} ({answer.ids[place]})"


@steady
@given(plain_answers(min_size=1), tolerances, st.data())
def test_a_log_probability_that_is_no_number_is_unequal_even_to_itself(answer, tolerance, data):
    place = data.draw(st.integers(0, len(answer.ids) - 1))
    bad = [math.nan if n == place else v for n, v in enumerate(answer.logprobs)]
    broken = answer.model_copy(update={"logprobs": bad})
    assert list(unequal("w", broken, broken, tolerance))
    assert list(unequal("w", answer, broken, tolerance))


@steady
@given(plain_answers(), plain_answers(), tolerances)
def test_it_does_not_matter_which_of_two_answers_is_called_the_expected_one(one, two, tolerance):
    one_way = [m.where for m in unequal("w", one, two, tolerance)]
    assert one_way == [m.where for m in unequal("w", two, one, tolerance)]


@steady
@given(plain_answers(min_size=1), tolerances, st.data())
def test_a_cut_answer_and_a_changed_text_are_unequal(answer, tolerance, data):
    length = data.draw(st.integers(0, len(answer.ids) - 1))
    short = answer.model_copy(
        update={"ids": answer.ids[:length], "logprobs": answer.logprobs[:length]}
    )
    assert list(unequal("w", answer, short, tolerance))
    text = data.draw(st.text(max_size=5))
    assume(text != answer.text)
    assert list(unequal("w", answer, answer.model_copy(update={"text": text}), tolerance))


def test_what_may_end_its_server_is_asked_when_all_others_have_been():
    asked = suite.select("full", [])
    ends = [check.ends_its_server for check in asked]
    assert ends == sorted(ends)
    assert any(ends)
    assert all(check.own_server for check in asked if check.ends_its_server)
