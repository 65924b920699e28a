"""JUnit XML for a CI's test page, made from a verdict."""

from __future__ import annotations

import io

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from sglang_harness.verdict import CheckResult, Outcome, Verdict


def text(verdict: Verdict) -> str:
    """One suite per subject, one case per check, and one case for the verdict.

    A known defect is a skipped case with its id and what was seen; so is a check outside the
    profile, with the reason. ``error`` and ``not-run`` are JUnit errors.
    """
    page = JUnitXml("sglang-harness")
    subjects: dict[str, TestSuite] = {}

    def suite_of(check_id: str) -> TestSuite:
        subject = check_id.split("/")[0]
        if subject not in subjects:
            subjects[subject] = TestSuite(subject)
            subjects[subject].timestamp = verdict.started.isoformat()
        return subjects[subject]

    for check in verdict.checks:
        suite_of(check.id).add_testcase(_case(check))
    for outside in verdict.outside_profile:
        case = TestCase(_printable(outside.id), classname=outside.id.split("/")[0])
        case.result = [Skipped(_printable(f"outside the profile: {outside.reason}"))]
        suite_of(outside.id).add_testcase(case)
    suite_of("run/verdict").add_testcase(_verdict_case(verdict))
    for suite in subjects.values():
        page.add_testsuite(suite)
    written = io.BytesIO()
    page.write(written, pretty=True)
    return written.getvalue().decode("utf-8")


def _verdict_case(verdict: Verdict) -> TestCase:
    """The verdict itself: an interrupted run with three passes must not look like a success."""
    case = TestCase("verdict", classname="run")
    if verdict.verdict == "fail":
        case.result = [Failure(_printable(verdict.reason))]
    elif verdict.verdict == "error":
        case.result = [Error(_printable(verdict.reason))]
    return case


def _case(check: CheckResult) -> TestCase:
    case = TestCase(check.id, classname=check.id.split("/")[0], time=round(check.seconds, 3))
    message = _printable(check.message)
    if check.outcome is Outcome.FAIL:
        case.result = [Failure(message)]
    elif check.outcome in (Outcome.ERROR, Outcome.NOT_RUN):
        case.result = [Error(f"{check.outcome.value}: {message}")]
    elif check.outcome is Outcome.KNOWN:
        case.result = [Skipped(f"known defect {check.known_defect}: {message}")]
    elif check.outcome is Outcome.FIXED:
        case.system_out = f"known defect {check.known_defect} did not reproduce"
    return case


def _printable(text: str) -> str:
    """XML 1.0 takes no control characters, and a random model's answers are full of them."""
    return "".join(
        c
        if c in "\t\n"
        or (ord(c) >= 32 and not 0xD800 <= ord(c) <= 0xDFFF and ord(c) not in (0xFFFE, 0xFFFF))
        else "\ufffd"
        for c in text
    )
