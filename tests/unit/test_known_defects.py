"""Does the registry excuse exactly what it lists, and nothing by mistake?"""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sglang_harness import suite
from sglang_harness._base import assets
from sglang_harness.cli import app
from sglang_harness.errors import SpecError
from sglang_harness.suite import known_defects
from sglang_harness.suite.known_defects import (
    KnownDefect,
    apply,
    as_markdown,
    as_short_markdown,
    load,
)
from sglang_harness.verdict import CheckResult, Outcome

REVIEW = date(2027, 5, 31)
ENTRY: dict[str, Any] = {
    "id": "abort-prefix",
    "check": "stop/abort-whole-id",
    "versions": ["0.5.22", "0.5.23"],
    "device": "any",
    "issue": "none found upstream",
    "notice": "Aborting 'x-1' silently ends 'x-10' as well.",
    "review_by": REVIEW,
}


def defect(**changes: Any) -> KnownDefect:
    return KnownDefect(**{**ENTRY, **changes})


def ended(outcome: Outcome, check_id: str = ENTRY["check"]) -> CheckResult:
    message = "" if outcome is Outcome.PASS else "neighbour: expected 24, got 3"
    seen = {"asked": 400}
    return CheckResult(id=check_id, outcome=outcome, seconds=1.5, message=message, evidence=seen)


def applied(result: CheckResult, *defects: KnownDefect, **circumstances: Any) -> CheckResult:
    usual: dict[str, Any] = {"version": "0.5.23", "device": "cpu", "today": REVIEW}
    return apply(result, list(defects), **{**usual, **circumstances})


# --- what an entry excuses --------------------------------------------------------------------


def test_a_listed_failure_is_known_and_names_its_entry():
    before = ended(Outcome.FAIL)
    after = applied(before, defect())
    assert (after.outcome, after.known_defect) == (Outcome.KNOWN, "abort-prefix")
    # What was seen stays readable, and the result that was handed in stays what it was.
    assert after.message == before.message
    assert (before.outcome, before.known_defect) == (Outcome.FAIL, None)


def test_a_listed_defect_that_does_not_show_is_fixed_and_names_its_entry():
    after = applied(ended(Outcome.PASS), defect())
    assert (after.outcome, after.known_defect) == (Outcome.FIXED, "abort-prefix")


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.NOT_RUN])
def test_what_was_not_found_out_is_never_excused(outcome):
    before = ended(outcome)
    assert applied(before, defect()) == before


@pytest.mark.parametrize("outcome", [Outcome.FAIL, Outcome.PASS])
@pytest.mark.parametrize(
    "version",
    ["0.5.24", "0.5.2", "0.5.230", "0.5.23.post1", "0.5.23rc1", "", None],
)
def test_only_the_very_versions_that_are_listed_are_excused(outcome, version):
    before = ended(outcome)
    assert applied(before, defect(), version=version) == before


@pytest.mark.parametrize("outcome", [Outcome.FAIL, Outcome.PASS])
@pytest.mark.parametrize(("listed", "device"), [("gpu", "cpu"), ("cpu", "gpu"), ("gpu", "unknown")])
def test_a_defect_of_one_device_is_no_excuse_on_another(outcome, listed, device):
    before = ended(outcome)
    assert applied(before, defect(device=listed), device=device) == before


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_defect_of_any_device_is_known_on_each(device):
    assert applied(ended(Outcome.FAIL), defect(), device=device).outcome is Outcome.KNOWN
    own = defect(device=device)
    assert applied(ended(Outcome.FAIL), own, device=device).outcome is Outcome.KNOWN


def test_an_entry_excuses_until_its_day_of_review_and_not_a_day_longer():
    failed, day = ended(Outcome.FAIL), timedelta(days=1)
    assert applied(failed, defect(), today=REVIEW).outcome is Outcome.KNOWN
    assert applied(failed, defect(), today=REVIEW + day) == failed
    # Neither is its silence a notice any more: an expired entry says nothing.
    passed = ended(Outcome.PASS)
    assert applied(passed, defect(), today=REVIEW + day) == passed


@pytest.mark.parametrize("check_id", ["stop/abort", "stop/abort-whole-id-2"])
def test_a_check_of_a_similar_name_is_not_excused(check_id):
    before = ended(Outcome.FAIL, check_id)
    assert applied(before, defect()) == before


def test_of_two_entries_for_one_check_the_one_that_applies_is_named():
    older = defect(id="older", versions=["0.5.20"])
    expired = defect(id="expired", review_by=REVIEW - timedelta(days=1))
    elsewhere = defect(id="elsewhere", device="gpu")
    after = applied(ended(Outcome.FAIL), older, expired, elsewhere, defect())
    assert after.known_defect == "abort-prefix"


def test_without_entries_every_outcome_stays():
    for outcome in Outcome:
        assert applied(ended(outcome)) == ended(outcome)


# --- the file ---------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path):
    """Writes a registry: a text as it is, entries as YAML."""

    def write(content):
        path = tmp_path / "known_defects.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


CHECKS = {"stop/abort-whole-id", "stop/abort"}


def test_entries_are_read_with_their_dates_as_dates(registry):
    (entry,) = load(CHECKS, registry([ENTRY]))
    assert entry == defect()
    assert entry.review_by == REVIEW


def test_an_entry_that_names_no_check_is_refused_by_its_id(registry):
    entries = [ENTRY, {**ENTRY, "id": "renamed", "check": "stop/abort-whole"}]
    with pytest.raises(SpecError, match="renamed names a check that does not exist"):
        load(CHECKS, registry(entries))


def test_two_entries_of_one_id_are_refused_even_for_different_checks(registry):
    entries = [ENTRY, {**ENTRY, "check": "stop/abort"}]
    with pytest.raises(SpecError, match="the id abort-prefix occurs more than once"):
        load(CHECKS, registry(entries))


def without(field: str) -> dict[str, Any]:
    return {k: v for k, v in ENTRY.items() if k != field}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("- id: [unclosed", id="broken YAML"),
        pytest.param("- !!python/object/apply:os.getcwd []", id="YAML that runs code"),
        pytest.param("", id="an empty file"),
        pytest.param("abort-prefix", id="a word"),
        pytest.param({"abort-prefix": ENTRY}, id="a mapping instead of a list"),
        pytest.param(["abort-prefix"], id="an entry that is a word"),
        pytest.param([{**ENTRY, "until": "0.5.24"}], id="a field that does not exist"),
        pytest.param([{**ENTRY, "versions": []}], id="no versions"),
        pytest.param([{**ENTRY, "versions": "0.5.23"}], id="a version that is no list"),
        pytest.param([{**ENTRY, "versions": [0.5]}], id="a version that YAML reads as a number"),
        pytest.param([{**ENTRY, "device": "tpu"}], id="a device that does not exist"),
        pytest.param([{**ENTRY, "review_by": "some day"}], id="a day that does not exist"),
        *[pytest.param([without(f)], id=f"no {f}") for f in ENTRY if f != "device"],
    ],
)
def test_an_invalid_registry_is_refused_by_its_name(registry, content):
    with pytest.raises(SpecError, match=r"^known_defects\.yaml cannot be read"):
        load(CHECKS, registry(content))


def test_a_registry_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"gone\.yaml cannot be read"):
        load(CHECKS, tmp_path / "gone.yaml")


def test_the_registry_that_is_shipped_names_only_checks_that_exist():
    registered = suite.registered()
    entries = load(set(registered))
    assert {e.check for e in entries} <= set(registered)
    # With no check registered it would excuse nothing, so loading it then has to fail.
    with pytest.raises(SpecError, match="names a check that does not exist"):
        load(set())


SHIPPED = load(set(suite.registered()))


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda entry: entry.id)
def test_every_shipped_entry_tells_a_reader_what_it_is_about(entry):
    assert entry.notice.endswith(".")
    assert entry.issue
    assert all(v and v == v.strip() for v in entry.versions)
    assert known_defects.FILE.read_text(encoding="utf-8").count(f"id: {entry.id}\n") == 1


def test_a_failure_without_an_observation_is_not_the_listed_one():
    """A server that died before the check saw anything failed in another way."""
    died = ended(Outcome.FAIL).model_copy(update={"evidence": None})
    assert applied(died, defect()).outcome is Outcome.FAIL


DIES = "the server died during this check: The server ended (exit code 137): {}. Last output: x"


def test_an_end_without_an_observation_is_known_where_the_entry_names_how_the_server_dies():
    listed = defect(death="RuntimeError: Unsupported device: cpu")
    died = ended(Outcome.FAIL).model_copy(
        update={"evidence": None, "message": DIES.format("RuntimeError: Unsupported device: cpu")}
    )
    assert applied(died, listed).outcome is Outcome.KNOWN
    otherwise = died.model_copy(update={"message": DIES.format("MemoryError")})
    assert applied(otherwise, listed).outcome is Outcome.FAIL, "it died of something else"
    wrong = ended(Outcome.FAIL).model_copy(update={"message": died.message})
    assert applied(wrong, listed).outcome is Outcome.FAIL, "it answered, and wrongly"
    assert applied(ended(Outcome.PASS), listed).outcome is Outcome.FIXED


@pytest.mark.parametrize(
    ("check", "message", "evidence"),
    [
        # As 0.5.15 ended here, on a CPU, as a process.
        ("launch/stop", "exit code: expected 0, got 137", {"exit_code": 137}),
        (
            "chat/json-schema",
            DIES.format("RuntimeError: Unsupported device: cpu"),
            None,
        ),
        ("stop/abort-whole-id", "neighbour, tokens: expected 96, got 10", {"asked": 400}),
    ],
)
def test_what_0_5_15_does_wrong_here_is_known(check, message, evidence):
    failed = CheckResult(
        id=check, outcome=Outcome.FAIL, seconds=1.0, message=message, evidence=evidence
    )
    assert applied(failed, *SHIPPED, version="0.5.15").outcome is Outcome.KNOWN
    assert applied(failed, *SHIPPED, version="0.5.16").outcome is Outcome.FAIL


# --- the track record -------------------------------------------------------------------------


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda entry: entry.id)
def test_the_command_of_a_row_asks_that_one_check_of_the_newest_version_listed(entry):
    program, *arguments = entry.command.split()
    assert program == "sglang-harness"
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert [c.id for c in suite.select("quick", [options["-k"]])] == [entry.check]
    newest = max(entry.versions, key=lambda version: [int(part) for part in version.split(".")])
    if entry.own_python:
        assert options["--python"] == f"PYTHON-WITH-{newest}"
    else:
        assert options["--sglang-version"] == newest
    # Whether the command line takes these options.
    asked = CliRunner().invoke(app, [*arguments, "--profile", "no such profile"])
    assert "no such profile" in str(asked.exception)


def test_a_defect_of_one_device_is_shown_again_on_that_device():
    assert defect(device="gpu").command.endswith(
        "--sglang-version 0.5.23 --device gpu -k stop/abort-whole-id"
    )


def test_a_row_names_the_upstream_issue_and_who_found_it():
    reported = defect(issue="https://github.com/sgl-project/sglang/pull/1", found_by="a-user")
    (row,) = as_markdown([reported]).splitlines()[2:]
    assert "[#1](https://github.com/sgl-project/sglang/pull/1) | a-user |" in row
    (row,) = as_markdown([defect()]).splitlines()[2:]
    assert "| none found |  |" in row


def test_the_track_record_lists_every_shipped_entry_as_it_is():
    text = (assets.root() / "docs" / "track-record.md").read_text(encoding="utf-8")
    assert as_markdown(SHIPPED) in text, "sglang-harness known --markdown prints what belongs there"


def test_the_readme_shows_the_first_rows_of_the_track_record():
    text = (assets.root() / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- track record -->\n")[2].partition("<!-- end -->")[0]
    assert shown.strip() == as_short_markdown(SHIPPED[:5])
    assert f"{len(SHIPPED)} defects" in text


def test_the_command_prints_the_track_record():
    printed = CliRunner().invoke(app, ["known", "--markdown"])
    assert (printed.exit_code, printed.output.strip()) == (0, as_markdown(SHIPPED))
    listed = CliRunner().invoke(app, ["known"])
    assert listed.exit_code == 0
    for entry in SHIPPED:
        assert entry.command in listed.output
