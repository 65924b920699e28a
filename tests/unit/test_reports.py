"""Verdict in, reports out: nothing is lost, and no failure is hidden."""

from __future__ import annotations

import io
import json
import math
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from junitparser import Error, Failure, JUnitXml, Skipped
from pydantic import TypeAdapter
from rich.console import Console

from sglang_harness import report
from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import SpecError
from sglang_harness.report import terminal
from sglang_harness.verdict import (
    CheckResult,
    Figure,
    Outcome,
    Outside,
    PhaseTime,
    Reading,
    Verdict,
    json_schema,
    overall,
)

RECORDED = Path(__file__).parent / "data" / "recorded-full-tiny-0.5.23.json"

#: Text as a random model or a stack trace gives it.
NASTY = [
    "[/red]",
    "[/]",
    "[bold",
    "a [red]b[/red] c",
    "[link=https://x]y",
    "[@click=app.quit]z[/]",
    "ends with \\",
    "ends with \\\\",
    ":smile: 100% {braces} <b>&amp;</b> \"quotes\" 'too'",
    "\x00\x01\x08\x0b\x0c\x1b[31mred\x7f\x85\ufffe\uffff",
    "\ud83d half of an emoji",
    "]]> <![CDATA[ -->",
    "日本語 \U0001f600 \u202e right to left",
]


def result(outcome: Outcome, check_id: str | None = None, **fields: Any) -> CheckResult:
    return CheckResult(
        id=check_id or f"subject/{outcome.value}", outcome=outcome, seconds=1.5, **fields
    )


def verdict_of(*checks: CheckResult, **fields: Any) -> Verdict:
    state, reason = overall(list(checks))
    return Verdict(
        **{
            "run_id": "0123456789ab",
            "started": datetime(2026, 11, 23, 14, 49, 26, tzinfo=timezone.utc),
            "seconds": 85.6,
            "verdict": state,
            "reason": reason,
            "profile": "quick",
            "harness_version": "0.1.0",
            "sglang_version": "0.5.23",
            "model": {"name": "tiny", "folder": "tiny-2-seed0"},
            "device": {"kind": "cpu"},
            "runtime": "docker",
            "spec": {"model": "tiny"},
            "seed": 0,
            "checks": list(checks),
            **fields,
        }
    )


ALL = [
    result(Outcome.PASS, "launch/phases"),
    result(Outcome.FAIL, "launch/readiness", message="expected 200, got 503"),
    result(Outcome.ERROR, "weights/a-b-a", message="the oracle could not be loaded"),
    result(Outcome.KNOWN, "weights/bad", message="it died", known_defect="sglang-30749"),
    result(Outcome.FIXED, "hostile/ids", known_defect="sglang-8383"),
    result(Outcome.NOT_RUN, "hostile/other", message="the run's limit was over"),
]


# --- every format ------------------------------------------------------------------------------


def test_a_format_is_one_line_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    added = report.Format("one-word", "word.txt", lambda verdict: verdict.verdict)
    monkeypatch.setattr(report, "FORMATS", (*report.FORMATS, added))
    written = report.write_all(verdict_of(*ALL), tmp_path / "out")
    assert [p.name for p in written] == ["verdict.json", "junit.xml", "verdict.txt", "word.txt"]
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    assert written[-1].read_text() == "error"
    assert [p.name for p in written[:-1]] == list(report.FILES)


def test_a_format_that_fails_leaves_the_others_and_its_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(verdict: Verdict) -> str:
        raise RuntimeError("a defect of this format")

    first, *rest = report.FORMATS
    bad = report.Format("bad", "bad.txt", broken)
    monkeypatch.setattr(report, "FORMATS", (first, bad, *rest))
    (tmp_path / "bad.txt").write_text("of the run before")
    with pytest.raises(RuntimeError, match="of this format"):
        report.write_all(verdict_of(*ALL), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*report.FILES, "bad.txt"}
    assert (tmp_path / "bad.txt").read_text() == "of the run before"


@pytest.mark.parametrize("name", [each.name for each in report.FORMATS])
def test_a_report_that_cannot_be_written_says_so_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    file = tmp_path / "report"
    file.write_text("of the run before")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(SpecError, match=r"report cannot be written: No space left on device"):
        report.write(name, verdict_of(*ALL), file)
    assert file.read_text() == "of the run before"
    assert list(tmp_path.iterdir()) == [file]


def test_an_unknown_format_is_refused_with_the_names_of_those_there_are(tmp_path: Path):
    with pytest.raises(SpecError, match="junit") as caught:
        report.write("html", verdict_of(), tmp_path / "x")
    assert "'html' is not a report format" in str(caught.value)


def test_a_reader_during_a_replacement_gets_a_whole_file(tmp_path: Path):
    file = tmp_path / "verdict.json"
    old, new = "o" * 300_000, "n" * 300_000
    write_whole(file, old)
    with file.open() as reader:
        started = reader.read(10)
        write_whole(file, new)
        assert started + reader.read() == old
    assert file.read_text() == new


def test_a_link_and_a_device_are_written_through(tmp_path: Path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "latest.json"
    link.symlink_to(tmp_path / "real" / "verdict.json")
    write_whole(link, "a")
    write_whole(link, "b")
    assert link.is_symlink()
    assert (tmp_path / "real" / "verdict.json").read_text() == "b"
    write_whole(Path("/dev/null"), "c")
    assert not Path("/dev/null").is_file()


def test_the_text_report_holds_every_check_and_the_result_in_plain_text(tmp_path: Path):
    path = report.write("terminal", full_verdict(), tmp_path / "verdict.txt")
    told = path.read_text(encoding="utf-8")
    assert "\x1b" not in told
    for check in full_verdict().checks:
        assert check.id in told
        assert check.message in told
    assert "ERROR  profile quick" in told
    assert "ttft" in told


@pytest.mark.parametrize("text", NASTY)
def test_no_text_of_a_model_breaks_any_format(tmp_path: Path, text: str):
    nasty = verdict_of(
        result(Outcome.FAIL, message=text), reason=text, caveats=[text], model={"name": text}
    )
    for path in report.write_all(nasty, tmp_path):
        assert path.read_text(encoding="utf-8")


# --- JUnit --------------------------------------------------------------------------------------


def page_of(verdict: Verdict, path: Path) -> tuple[JUnitXml, dict[str, Any]]:
    report.write("junit", verdict, path)
    page = JUnitXml.fromfile(str(path))
    return page, {case.name: case for suite in page for case in suite}


def test_a_ci_page_counts_what_the_verdict_counts(tmp_path: Path):
    outside = [Outside(id="weights/gpu-push", reason="the target has no GPU")]
    page, cases = page_of(verdict_of(*ALL, outside_profile=outside), tmp_path / "junit.xml")
    assert (page.tests, page.failures, page.errors, page.skipped) == (8, 1, 3, 2)
    assert page.time == pytest.approx(9.0)
    by_suite = {s.name: (s.tests, s.failures, s.errors, s.skipped) for s in page}
    assert by_suite == {
        "launch": (2, 1, 0, 0),
        "weights": (3, 0, 1, 2),
        "hostile": (2, 0, 1, 0),
        "run": (1, 0, 1, 0),
    }
    kinds = {name: [type(r) for r in case.result] for name, case in cases.items()}
    assert kinds == {
        "launch/phases": [],
        "launch/readiness": [Failure],
        "weights/a-b-a": [Error],
        "weights/bad": [Skipped],
        "hostile/ids": [],
        "hostile/other": [Error],
        "weights/gpu-push": [Skipped],
        "verdict": [Error],
    }


def test_a_ci_page_says_why(tmp_path: Path):
    outside = [Outside(id="weights/gpu-push", reason="the target has no GPU")]
    _, cases = page_of(verdict_of(*ALL, outside_profile=outside), tmp_path / "junit.xml")
    told = {name: case.result[0].message for name, case in cases.items() if case.result}
    assert told["launch/readiness"] == "expected 200, got 503"
    assert "not-run" in told["hostile/other"]
    assert "sglang-30749" in told["weights/bad"]
    assert "it died" in told["weights/bad"]
    assert "no GPU" in told["weights/gpu-push"]
    # A fix is worth reading about in a case that passed.
    assert "sglang-8383" in cases["hostile/ids"].system_out
    assert cases["launch/phases"].classname == "launch"


@pytest.mark.parametrize("text", NASTY)
def test_no_text_of_a_model_breaks_the_page(tmp_path: Path, text: str):
    checks = [
        result(o, f"s/{o.value}", message=text, known_defect="d-1")
        for o in (Outcome.FAIL, Outcome.ERROR, Outcome.KNOWN, Outcome.NOT_RUN)
    ]
    outside = [Outside(id="s/outside", reason=text)]
    page, cases = page_of(verdict_of(*checks, outside_profile=outside), tmp_path / "junit.xml")
    assert page.tests == 6
    # What XML can carry arrives as it was.
    visible = "".join(c for c in text if c.isalnum() and c.isascii())
    for name, case in cases.items():
        if name == "verdict":
            continue
        got = "".join(c for c in case.result[0].message if c.isalnum() and c.isascii())
        assert visible in got


@pytest.mark.parametrize("text", NASTY)
def test_no_reason_breaks_the_page_of_a_run_without_checks(tmp_path: Path, text: str):
    page, _ = page_of(verdict_of(reason=text), tmp_path / "junit.xml")
    assert (page.tests, page.errors) == (1, 1)


def test_a_run_without_checks_is_not_an_empty_page_without_errors(tmp_path: Path):
    page, cases = page_of(verdict_of(), tmp_path / "junit.xml")
    assert (page.tests, page.errors) == (1, 1)
    (case,) = cases.values()
    assert "no check was run" in case.result[0].message


def test_a_run_with_everything_outside_has_an_error_on_its_page(tmp_path: Path):
    outside = [Outside(id="launch/phases", reason="the server never came up")]
    page, _ = page_of(verdict_of(outside_profile=outside), tmp_path / "junit.xml")
    assert page.errors == 1


@pytest.mark.parametrize(
    ("check", "fields"),
    [
        pytest.param(
            result(Outcome.PASS),
            {"verdict": "error", "reason": "interrupted after 1 checks", "interrupted": True},
            id="interrupted",
        ),
        pytest.param(
            result(Outcome.FIXED, known_defect="d-1"),
            {"verdict": "fail", "reason": "known defects no longer reproduce (strict): a/b"},
            id="--strict-known",
        ),
    ],
)
def test_a_run_that_did_not_pass_never_has_a_page_without_failures(
    tmp_path: Path, check: CheckResult, fields: dict[str, Any]
):
    page, _ = page_of(verdict_of(check, **fields), tmp_path / "junit.xml")
    assert page.failures + page.errors > 0


def test_a_page_in_a_folder_that_is_not_there_yet_is_written_all_the_same(tmp_path: Path):
    report.write("junit", verdict_of(*ALL), tmp_path / "reports" / "junit.xml")


# --- verdict.json -------------------------------------------------------------------------------


def full_verdict() -> Verdict:
    return verdict_of(
        *ALL,
        result(
            Outcome.PASS,
            "a/evidence",
            evidence={"text": "\x00\x1b日本語 \U0001f600", "deep": [{"x": [1, 2.5, None, True]}]},
            retries=["GET /a: try 1: connection refused"],
        ),
        outside_profile=[Outside(id="b/c", reason="no GPU")],
        figures=[Figure.of("ttft", "s", "lower", 0.3, 0.1, 0.2)],
        phases=[PhaseTime(name="create", seconds=0.4)],
        memory=[Reading(mark="ready", seconds=1, source="nvml", used_bytes=3, parts={"a": 3})],
        caveats=["CPU stand-in kernels."],
        selection="weights or launch",
        image={"image": "sglang:1", "digest": "sha256:00"},
    )


def test_a_verdict_reads_back_as_it_was_written(tmp_path: Path):
    verdict, path = full_verdict(), tmp_path / "verdict.json"
    verdict.write(path)
    assert Verdict.read(path) == verdict
    # For people too: several lines, and one that ends.
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_what_is_written_fits_the_schema_that_is_shipped(tmp_path: Path):
    shipped = json.loads((files("sglang_harness") / "verdict.schema.json").read_text())
    assert shipped == json_schema()
    checker = jsonschema.Draft202012Validator
    checker.check_schema(shipped)
    full_verdict().write(tmp_path / "verdict.json")
    for file in (tmp_path / "verdict.json", RECORDED):
        checker(shipped).validate(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "maybe"},
        {"checks": None},
        {"unknown": 1},
        {"checks": [{"id": "a/b", "outcome": "great", "seconds": 1}]},
        {"figures": [{**Figure.of("a", "s", "lower", 1.0).model_dump(), "samples": []}]},
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(tmp_path: Path, change: dict[str, Any]):
    data = {**json.loads(full_verdict().model_dump_json()), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json_schema()).validate(data)
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecError) as caught:
        Verdict.read(path)
    assert next(iter(change)) in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 200, 2000])
def test_a_file_that_is_cut_short_is_told_as_such(tmp_path: Path, length: int):
    path = tmp_path / "verdict.json"
    path.write_bytes(RECORDED.read_bytes()[:length])
    with pytest.raises(SpecError, match="not a verdict of this harness") as caught:
        Verdict.read(path)
    assert str(path) in str(caught.value)
    assert "cut short" in caught.value.advice
    assert "\n" not in str(caught.value)


def test_a_verdict_that_is_not_there_is_told_in_one_line(tmp_path: Path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(SpecError, match="cannot be read"):
            Verdict.read(path)


def test_a_binary_file_is_not_a_verdict(tmp_path: Path):
    path = tmp_path / "verdict.json"
    path.write_bytes(b"\x1f\x8b\x08\x00\xff\xfe")
    with pytest.raises(SpecError):
        Verdict.read(path)


@pytest.mark.parametrize("number", [-math.inf, math.nan], ids=str)
def test_a_probability_of_zero_can_be_judged_again(tmp_path: Path, number: float):
    verdict = verdict_of(result(Outcome.FAIL, evidence={"logprob": number}))
    verdict.write(tmp_path / "verdict.json")
    again = Verdict.read(tmp_path / "verdict.json").checks[0].evidence
    assert again is not None
    # As an observation reads it, whose field is a float.
    assert repr(TypeAdapter(float).validate_python(again["logprob"])) == repr(number)


def test_a_lone_surrogate_does_not_prevent_the_verdict(tmp_path: Path):
    verdict = verdict_of(result(Outcome.FAIL, message="\ud83d", evidence={"text": "\ud83d"}))
    verdict.write(tmp_path / "verdict.json")
    assert Verdict.read(tmp_path / "verdict.json").checks[0].outcome is Outcome.FAIL


def test_a_figure_is_the_median_of_its_samples():
    assert Figure.of("a", "s", "lower", 9.0, 1.0, 2.0).value == 2.0
    assert Figure.of("a", "s", "lower", 1.0, 2.0).value == 1.5
    with pytest.raises(ValueError, match="median"):
        Figure.of("a", "s", "lower")


# --- the verdict over all checks ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([Outcome.PASS], "pass"),
        ([Outcome.PASS, Outcome.KNOWN, Outcome.FIXED], "pass"),
        ([Outcome.PASS, Outcome.FAIL], "fail"),
        # Error outranks fail, and a check that was not run prevents a pass.
        ([Outcome.FAIL, Outcome.ERROR, Outcome.PASS], "error"),
        ([Outcome.PASS, Outcome.NOT_RUN], "error"),
        ([Outcome.FAIL, Outcome.NOT_RUN], "error"),
        ([], "error"),
    ],
)
def test_the_worst_outcome_decides_and_is_named(outcomes: list[Outcome], state: str):
    got, reason = overall([result(o) for o in outcomes])
    assert got == state
    assert bool(reason) is (state != "pass")
    worst = next((o for o in (Outcome.ERROR, Outcome.NOT_RUN, Outcome.FAIL) if o in outcomes), None)
    if worst is not None:
        assert f"subject/{worst.value}" in reason
    assert verdict_of(*map(result, outcomes)).exit_code == {"pass": 0, "fail": 1, "error": 2}[got]


def test_interruption_and_strictness_take_a_pass_away():
    assert overall([result(Outcome.PASS)], interrupted=True)[0] == "error"
    assert overall([result(Outcome.FAIL)], interrupted=True)[0] == "error"
    assert overall([result(Outcome.FIXED)], strict_known=True)[0] == "fail"
    assert overall([result(Outcome.KNOWN)], strict_known=True)[0] == "pass"


def test_a_long_list_of_failures_is_counted_and_not_poured_out():
    _, reason = overall([result(Outcome.FAIL, f"s/{n}") for n in range(9)])
    assert reason == "failed: s/0, s/1, s/2 and 6 more"


# --- the terminal -------------------------------------------------------------------------------


def recording() -> Console:
    return Console(record=True, file=io.StringIO(), width=400)


def test_a_person_reads_the_verdict_its_reason_and_every_figure():
    console = recording()
    terminal.show(full_verdict(), console)
    text = console.export_text()
    for part in (
        "ERROR",
        "inconclusive (harness error): weights/a-b-a",
        "profile quick",
        "2 pass, 1 fail, 1 error, 1 known, 1 fixed, 1 not-run, 1 outside",
        "SGLang 0.5.23, tiny, cpu, runtime docker",
        "CPU stand-in kernels.",
        "b/c: no GPU",
        "ttft",
    ):
        assert part in text
    row = next(line for line in text.splitlines() if "ttft" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["ttft", "0.2", "s", "3", "lower"]


def test_a_verdict_with_nothing_in_it_can_be_shown():
    console = recording()
    terminal.show(verdict_of(sglang_version=None, device={}, model={}), console)
    text = console.export_text()
    assert "no check was run" in text
    assert "SGLang unknown" in text


@pytest.mark.parametrize("text", [t for t in NASTY if "\ud83d" not in t])
def test_text_that_looks_like_markup_is_shown_and_not_obeyed(text: str):
    console = recording()
    nasty = verdict_of(
        reason=text,
        verdict="fail",
        caveats=[text],
        sglang_version=text,
        model={"name": text},
        device={"kind": text},
        runtime=text,
        outside_profile=[Outside(id="a/b", reason=text)],
        figures=[Figure.of(text, text, "lower", 1.0)],
    )
    terminal.show(nasty, console)
    view = terminal.Terminal(console)
    view.say(text)
    view.begin("a/b", 1, 2)
    for outcome in Outcome:
        view.end(result(outcome, message=text))
    view.close()
    shown = console.export_text()
    # Brackets survive: what was printed is what came.
    for word in ("[/red]", "[/]", "[bold", "[red]b[/red]", "[link=https://x]y", "[@click"):
        if word in text:
            assert shown.count(word) >= 1 + len(Outcome)


def test_what_a_model_says_cannot_steer_the_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=200)
    terminal.Terminal(console).end(result(Outcome.FAIL, message="got \x1b[2J\x1b]0;owned\x07"))
    assert "\x1b" not in out.getvalue()


def test_each_outcome_has_its_word_and_its_reason_while_the_run_goes_on():
    console = recording()
    view = terminal.Terminal(console)
    for check in ALL:
        view.end(check)
    lines = console.export_text().splitlines()
    assert "launch/phases" in lines[0]
    assert "pass" not in lines[0]
    text = "\n".join(lines)
    for check in ALL[1:]:
        line = next(x for x in lines if check.id in x)
        assert check.outcome.value in line
        assert check.message in text
        assert (check.known_defect or "") in line


def test_a_very_long_message_is_cut_on_the_terminal():
    console = recording()
    terminal.Terminal(console).end(result(Outcome.FAIL, message="x" * 50_000))
    assert 500 < console.export_text().count("x") < 1000


def test_a_ci_log_gets_lines_and_no_spinner():
    out = io.StringIO()
    view = terminal.Terminal(Console(file=out, force_terminal=False, width=100))
    view.begin("a/b", 1, 2)
    view.say("starting")
    view.close()
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count("\n") == 1
