"""Is a saved run judged again as it was, and differently only where something is different?"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sglang_harness import suite
from sglang_harness.cli import app
from sglang_harness.errors import SpecError
from sglang_harness.run.rejudge import judge_saved
from sglang_harness.suite import known_defects
from sglang_harness.verdict import SCHEMA_VERSION, CheckResult, Outcome, Verdict, overall

RECORDING = Path(__file__).parent / "data" / "recorded-full-tiny-0.5.23.json"


@pytest.fixture
def recorded() -> Verdict:
    """A whole run against SGLang 0.5.23 on a CPU: passed, with two known defects."""
    return Verdict.read(RECORDING)


def result_of(verdict: Verdict, check_id: str) -> CheckResult:
    return next(c for c in verdict.checks if c.id == check_id)


def evidence_of(verdict: Verdict, check_id: str) -> dict[str, Any]:
    evidence = result_of(verdict, check_id).evidence
    assert evidence is not None
    return evidence


def outcomes(verdict: Verdict) -> dict[str, Outcome]:
    return {c.id: c.outcome for c in verdict.checks}


# --- judging again ----------------------------------------------------------------------------


def test_judging_the_recorded_run_again_changes_nothing(recorded):
    again, changed = judge_saved(recorded)
    assert changed == []
    assert again == recorded
    assert (again.verdict, again.exit_code) == ("pass", 0)


def test_a_run_that_is_written_and_read_back_is_the_same_run(recorded, tmp_path):
    recorded.write(tmp_path / "verdict.json")
    assert Verdict.read(tmp_path / "verdict.json") == recorded


def test_evidence_that_is_no_longer_good_enough_fails_the_run_and_is_listed(recorded):
    evidence_of(recorded, "generate/logprobs")["sampled"]["served"][5] += 0.01
    again, changed = judge_saved(recorded)
    assert (again.verdict, again.exit_code) == ("fail", 1)
    assert again.reason == "failed: generate/logprobs"
    ((before, after),) = changed
    assert (before.id, before.outcome) == ("generate/logprobs", Outcome.PASS)
    assert (after.id, after.outcome) == ("generate/logprobs", Outcome.FAIL)
    assert "sampled, token 5" in after.message
    # Nothing else moved, and the saved run itself is still what was saved.
    rest = {i: o for i, o in outcomes(again).items() if i != "generate/logprobs"}
    assert rest.items() <= outcomes(recorded).items()
    assert recorded.verdict == "pass"


def test_a_tolerance_that_is_loosened_turns_a_failure_into_a_pass(recorded):
    # What the command is for: the run failed by a bound that was questioned since.
    failed = result_of(recorded, "generate/ids-equal-text")
    failed.outcome, failed.message = Outcome.FAIL, "token 4: off by 0.01, tolerance 0.001"
    recorded.verdict, recorded.reason = "fail", "failed: generate/ids-equal-text"
    again, changed = judge_saved(recorded)
    assert [(b.outcome, a.outcome) for b, a in changed] == [(Outcome.FAIL, Outcome.PASS)]
    assert (again.verdict, again.reason) == ("pass", "")
    assert result_of(again, "generate/ids-equal-text").message == ""


def test_a_log_probability_that_is_no_number_is_still_none_in_the_saved_run(recorded, tmp_path):
    # JSON has no NaN; written as null, the run that shows the worst could not be judged again.
    evidence_of(recorded, "generate/logprobs")["sampled"]["served"][3] = math.nan
    recorded.write(tmp_path / "verdict.json")
    again, changed = judge_saved(Verdict.read(tmp_path / "verdict.json"))
    assert again.verdict == "fail"
    assert [a.id for _, a in changed] == ["generate/logprobs"]
    assert "got nan" in changed[0][1].message


def test_known_defects_are_those_of_the_day_of_the_run(recorded):
    # A verdict from before the review stays what it was, however late it is judged again...
    reviews = [e.review_by for e in known_defects.load(set(suite.registered()))]
    recorded.started += min(reviews) - recorded.started.date()
    assert judge_saved(recorded)[1] == []
    # ... and one from after it had no excuse.
    recorded.started += max(reviews) - min(reviews) + timedelta(days=1)
    again, changed = judge_saved(recorded)
    assert again.verdict == "fail"
    assert {a.id: (b.outcome, a.outcome) for b, a in changed} == {
        c.id: (Outcome.KNOWN, Outcome.FAIL) for c in recorded.checks if c.outcome is Outcome.KNOWN
    }
    assert all(a.known_defect is None for _, a in changed)


@pytest.mark.parametrize("version", ["0.5.99", None])
def test_on_a_version_that_the_registry_does_not_list_a_failure_is_a_failure(recorded, version):
    recorded.sglang_version = version
    again, changed = judge_saved(recorded)
    assert again.verdict == "fail"
    assert {a.outcome for _, a in changed} == {Outcome.FAIL}


def test_a_known_defect_that_does_not_show_in_the_evidence_is_fixed(recorded):
    whole_id = result_of(recorded, "stop/abort-whole-id")
    whole_id.evidence = evidence_of(recorded, "stop/abort")
    again, changed = judge_saved(recorded)
    assert [a.outcome for _, a in changed] == [Outcome.FIXED]
    assert changed[0][1].known_defect == "abort-prefix"
    assert again.verdict == "pass"
    assert judge_saved(recorded, strict_known=True)[0].verdict == "fail"


def test_a_run_that_failed_by_strictness_is_not_judged_a_pass_again(recorded, tmp_path):
    whole_id = result_of(recorded, "stop/abort-whole-id")
    whole_id.evidence = evidence_of(recorded, "stop/abort")
    strict, _ = judge_saved(recorded, strict_known=True)
    strict.write(tmp_path / "verdict.json")
    again, changed = judge_saved(Verdict.read(tmp_path / "verdict.json"))
    assert changed == []
    assert (again.verdict, again.exit_code) == ("fail", 1)
    assert again.reason == "known defects no longer reproduce (strict): stop/abort-whole-id"
    assert again.strict_known


def test_the_command_judges_strictly_where_it_is_asked_to(recorded, tmp_path):
    whole_id = result_of(recorded, "stop/abort-whole-id")
    whole_id.evidence = evidence_of(recorded, "stop/abort")
    recorded.write(tmp_path / "verdict.json")
    for options, code in (([], 0), (["--strict-known"], 1)):
        ended = CliRunner().invoke(app, ["judge", str(tmp_path), *options])
        assert ended.exit_code == code, ended.output


def test_a_strict_run_of_schema_1_0_is_recognised_by_its_failing_without_a_failure(recorded):
    # That schema had no field for it.
    whole_id = result_of(recorded, "stop/abort-whole-id")
    whole_id.evidence = evidence_of(recorded, "stop/abort")
    whole_id.outcome, whole_id.known_defect = Outcome.FIXED, "abort-prefix"
    recorded.verdict, recorded.reason = "fail", "listed as known defects, but did not show: ..."
    again, _ = judge_saved(recorded)
    assert (again.verdict, again.strict_known) == ("fail", True)


def test_a_check_that_this_version_does_not_know_keeps_its_outcome(recorded):
    stranger = CheckResult(id="later/check", outcome=Outcome.FAIL, seconds=1, evidence={"a": 1})
    recorded.checks.append(stranger)
    again, changed = judge_saved(recorded)
    assert changed == []
    assert (again.verdict, again.reason) == ("fail", "failed: later/check")


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [(Outcome.FAIL, "fail"), (Outcome.ERROR, "error"), (Outcome.NOT_RUN, "error")],
)
def test_a_check_that_saw_nothing_keeps_its_outcome(recorded, outcome, verdict):
    unseen = result_of(recorded, "weights/disk")
    unseen.outcome, unseen.evidence, unseen.message = outcome, None, "the server ended"
    again, changed = judge_saved(recorded)
    assert changed == []
    assert again.verdict == verdict
    assert result_of(again, "weights/disk") == unseen


def test_an_interrupted_run_is_never_a_pass_however_good_its_evidence(recorded):
    recorded.interrupted = True
    again, changed = judge_saved(recorded)
    assert changed == []
    assert (again.verdict, again.exit_code) == ("error", 2)
    assert "interrupted" in again.reason


def spoil_a_field(evidence: dict[str, Any]) -> None:
    evidence["completion_tokens"] = "many"


def add_a_field(evidence: dict[str, Any]) -> None:
    evidence["since_0_9"] = True


def lose_a_field(evidence: dict[str, Any]) -> None:
    del evidence["whole"]


@pytest.mark.parametrize(
    ("spoil", "place"),
    [(spoil_a_field, "completion_tokens"), (add_a_field, "since_0_9"), (lose_a_field, "whole")],
)
def test_evidence_that_does_not_fit_its_check_is_refused_in_one_line(recorded, spoil, place):
    spoil(evidence_of(recorded, "generate/stream-equals-whole"))
    with pytest.raises(SpecError) as caught:
        judge_saved(recorded)
    message = str(caught.value)
    assert "generate/stream-equals-whole" in message
    assert place in message
    assert "\n" not in message


def test_judging_needs_neither_torch_nor_transformers():
    # In a process of its own: here other tests may have imported them already.
    program = f"""
import sys
from pathlib import Path
sys.modules["torch"] = None
sys.modules["transformers"] = None
from sglang_harness.run.rejudge import judge_saved
from sglang_harness.verdict import Verdict
saved = Verdict.read(Path({str(RECORDING)!r}))
again, changed = judge_saved(saved)
assert again == saved and not changed
loaded = sorted(m for m in sys.modules if m.split(".")[0] in ("torch", "transformers"))
assert loaded == ["torch", "transformers"], loaded
print(again.verdict, len(again.checks))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["pass", str(len(json.loads(RECORDING.read_text())["checks"]))]


# --- files that are not a verdict ----------------------------------------------------------------


def refused(path: Path) -> str:
    """The message with which ``path`` is refused, on one line and with its name."""
    with pytest.raises(SpecError) as caught:
        Verdict.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("kept", [0, 1, 200, 0.5, -2], ids=lambda kept: f"up to {kept}")
def test_a_verdict_that_is_cut_short_is_refused(tmp_path, kept):
    text = RECORDING.read_text(encoding="utf-8").rstrip()
    path = tmp_path / "verdict.json"
    end = int(kept * len(text)) if isinstance(kept, float) else kept
    path.write_text(text[:end], encoding="utf-8")
    assert "cut short" in refused(path)


@pytest.mark.parametrize("content", ["null", "[]", "{}", '"pass"', "Traceback", '{"verdict": 1}'])
def test_another_file_is_not_taken_for_a_verdict(tmp_path, content):
    path = tmp_path / "verdict.json"
    path.write_text(content)
    assert "not a verdict of this harness" in refused(path)


def test_a_binary_file_is_not_taken_for_a_verdict(tmp_path):
    path = tmp_path / "verdict.json"
    path.write_bytes(b"\xff\xfe\x00{}")
    assert "not text" in refused(path)


@pytest.fixture
def of_schema(tmp_path):
    """Writes the recorded run as a file of another schema, changed by ``spoil``."""

    def write(version: object, spoil: Callable[[Any], None] = lambda data: None) -> Path:
        data = json.loads(RECORDING.read_text(encoding="utf-8"))
        data["schema_version"] = version
        spoil(data)
        path = tmp_path / "verdict.json"
        path.write_text(json.dumps(data))
        return path

    return write


def add_fields(data: Any) -> None:
    data["energy"] = {"joules": 3}
    data["checks"][0]["owner"] = "somewhere"
    for phase in data["phases"]:
        phase["node"] = 1
    data["figures"][0]["baseline"] = 0.5


def test_a_file_of_the_first_schema_is_read(of_schema, recorded):
    assert Verdict.read(of_schema("1.0")) == recorded
    assert not recorded.caveats[1:]


def test_a_later_minor_is_read_without_its_new_fields_and_says_so(of_schema, recorded):
    read = Verdict.read(of_schema("1.7", add_fields))
    assert (read.checks, read.figures) == (recorded.checks, recorded.figures)
    (notice,) = (c for c in read.caveats if c not in recorded.caveats)
    for part in ("1.7", SCHEMA_VERSION, "energy", "checks.owner", "figures.baseline", "phases"):
        assert part in notice
    assert judge_saved(read)[0].verdict == "pass"


def test_a_later_minor_without_new_fields_needs_no_notice(of_schema, recorded):
    assert Verdict.read(of_schema("1.7")).caveats == recorded.caveats


def test_a_later_minor_that_is_not_additive_is_refused_by_the_version_that_wrote_it(of_schema):
    def spoil(data: Any) -> None:
        add_fields(data)
        data["checks"][0]["outcome"] = "flaky"

    message = refused(of_schema("1.7", spoil))
    assert "checks.0.outcome" in message
    assert "schema 1.7" in message
    assert "sglang-harness that wrote it (0.1.0)" in message


def test_unknown_fields_are_not_ignored_in_a_file_of_this_schema(of_schema):
    assert "checks.0.owner" in refused(of_schema(SCHEMA_VERSION, add_fields))


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.1"])
def test_another_major_is_refused_with_both_versions_before_its_fields_are_looked_at(
    of_schema, version
):
    message = refused(of_schema(version, add_fields))
    assert f"has schema {version}" in message
    assert f"reads schema {SCHEMA_VERSION}" in message
    assert "cut short" not in message


@pytest.mark.parametrize("version", [None, 1, 1.1, "", "1", "one", "1.0.0", [1, 0]])
def test_a_schema_version_that_is_not_one_is_refused(of_schema, version):
    assert "schema_version" in refused(of_schema(version)).removeprefix(str(of_schema(version)))


@pytest.mark.parametrize("change", [{"checks": []}, {"verdict": "maybe"}, {"later": 1}])
def test_only_a_whole_verdict_with_words_that_exist_is_read(tmp_path, change):
    data = {**json.loads(RECORDING.read_text(encoding="utf-8")), **change}
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(data))
    if change == {"checks": []}:
        # Nothing wrong with the file: that nothing was checked is for the judge to say.
        again, _ = judge_saved(Verdict.read(path))
        assert again.verdict == "error"
    else:
        assert next(iter(change)) in refused(path)


def test_a_verdict_that_is_not_there_is_refused(tmp_path):
    assert "cannot be read" in refused(tmp_path / "verdict.json")
    assert "cannot be read" in refused(tmp_path)


# --- the verdict over all checks --------------------------------------------------------------


def ended(*found: Outcome) -> list[CheckResult]:
    return [
        CheckResult(id=f"example/{n}-{o.value}", outcome=o, seconds=0) for n, o in enumerate(found)
    ]


ALONE = {
    Outcome.PASS: "pass",
    Outcome.KNOWN: "pass",
    Outcome.FIXED: "pass",
    Outcome.FAIL: "fail",
    Outcome.ERROR: "error",
    Outcome.NOT_RUN: "error",
}
SEVERITY = ["pass", "fail", "error"]


@pytest.mark.parametrize("outcome", Outcome)
def test_each_outcome_alone_makes_its_verdict(outcome):
    state, reason = overall(ended(outcome))
    assert state == ALONE[outcome]
    # A verdict other than pass says why, and names the check.
    assert ("example/0" in reason) == (state != "pass")


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(Outcome, 2)))
def test_the_severer_of_two_outcomes_decides_in_any_order(one, other):
    severer = max(ALONE[one], ALONE[other], key=SEVERITY.index)
    assert overall(ended(one, other))[0] == severer


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from(list(Outcome)), min_size=1, max_size=6),
    st.sampled_from(list(Outcome)),
    st.booleans(),
)
def test_one_more_check_never_makes_a_verdict_better(found, more, strict):
    before, _ = overall(ended(*found), strict_known=strict)
    after, _ = overall(ended(*found, more), strict_known=strict)
    assert SEVERITY.index(after) >= SEVERITY.index(before)


def test_a_run_that_checked_nothing_is_an_error():
    assert overall([]) == ("error", "no check was run")


@pytest.mark.parametrize("found", [(), (Outcome.PASS,), (Outcome.FAIL,), (Outcome.ERROR,)])
def test_an_interrupted_run_is_an_error_whatever_it_had_found(found):
    state, reason = overall(ended(*found), interrupted=True)
    assert (state, reason) == ("error", f"interrupted after {len(found)} checks")


def test_a_fixed_defect_fails_a_run_only_where_it_is_strict():
    found = ended(Outcome.PASS, Outcome.FIXED, Outcome.KNOWN)
    assert overall(found) == ("pass", "")
    state, reason = overall(found, strict_known=True)
    assert state == "fail"
    assert "example/1-fixed" in reason
    # Known defects that still reproduce never fail a run.
    assert overall(ended(Outcome.PASS, Outcome.KNOWN), strict_known=True) == ("pass", "")


def test_a_long_reason_names_three_checks_and_counts_the_rest():
    state, reason = overall(ended(*[Outcome.FAIL] * 5))
    assert state == "fail"
    assert reason == "failed: example/0-fail, example/1-fail, example/2-fail and 2 more"
    assert "more" not in overall(ended(*[Outcome.FAIL] * 3))[1]
