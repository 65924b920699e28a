"""The suite of checks on this machine: ``sglang-harness qualify``, as parts of gpu-check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_harness.gpu_check.budget import within_share
from sglang_harness.gpu_check.part import NotHere, Part
from sglang_harness.gpu_check.served import MODEL_BYTES, memory_share, model
from sglang_harness.run.qualification import TIME_IS_OVER
from sglang_harness.verdict import CheckResult, Outcome, ProfileName, Verdict

if TYPE_CHECKING:
    from sglang_harness.gpu_check.context import Context
    from sglang_harness.spec import ServerSpec
    from sglang_harness.suite.check import Check

#: Seconds that are kept for ending the servers and writing the reports.
KEPT = 25.0

#: Seconds without which a run of the suite is not started: a start, and a check.
LEAST = 45.0

#: Share of what is left of the budget that a quick run may take.
SHARE = 0.4

#: Of profile ``full``, most valuable first: what only a GPU shows, then what needs most servers.
SUBJECTS = ("memory", "weights", "architectures", "lora", "hostile", "parallel")

#: Checks whose reason is in the part's message; all are in its figures.
SHOWN = 5

_WRONG = {Outcome.FAIL, Outcome.ERROR, Outcome.FIXED, Outcome.NOT_RUN}


# --- judging --------------------------------------------------------------------------------------


@dataclass
class Told:
    """What one verdict, or several, say.

    Attributes:
        wrong: checks that stand in the way of a pass, with their reason.
        unasked: ids of those for which the time did not suffice.
        outside: ids of those whose need this target lacks, by the reason.
        counts: checks by outcome.
    """

    wrong: list[str] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)
    outside: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        """Takes one more verdict."""
        cut = cut_short(verdict.checks)
        for check in verdict.checks:
            if check.id in cut:
                self.unasked.append(check.id)
                continue
            self.counts[check.outcome.value] += 1
            # One that is not run because of another's failure is counted there.
            if check.outcome in _WRONG and check.because is None and _in_the_way(check, verdict):
                self.wrong.append(f"{check.id} {check.outcome.value}: {check.message}")
        for each in verdict.outside_profile:
            self.outside.setdefault(each.reason, []).append(each.id)
        nothing_asked = not verdict.checks and verdict.outside_profile
        if verdict.verdict != "pass" and not (self.wrong or cut or nothing_asked):
            self.wrong.append(verdict.reason or f"the verdict is {verdict.verdict}")

    def figures(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "unasked": self.unasked, "outside": self.outside}

    def in_one_line(self) -> str:
        told = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.most_common())
        lacking = f", {len(self.unasked)} without time" if self.unasked else ""
        outside = sum(map(len, self.outside.values()))
        return f"{told}{lacking}, {outside} outside the profile"

    def judge(self) -> None:
        """
        Raises:
            AssertionError: something is wrong.
            NotHere: nothing is, and not everything was asked.
        """
        more = len(self.wrong) - SHOWN
        rest = f"; and {more} more, which the verdicts name" if more > 0 else ""
        assert not self.wrong, f"{len(self.wrong)} checks: {'; '.join(self.wrong[:SHOWN])}{rest}"
        if self.unasked:
            raise NotHere(
                f"the time was over before {len(self.unasked)} checks, nothing failed until then: "
                + ", ".join(self.unasked)
            )


def _in_the_way(check: CheckResult, verdict: Verdict) -> bool:
    """A defect that did not show is a notice, unless the run was strict."""
    return check.outcome is not Outcome.FIXED or verdict.strict_known


def cut_short(checks: Sequence[CheckResult]) -> set[str]:
    """Checks for which the run's time did not suffice: those that were not asked any more, and the
    one before them, where it ended without an answer because the time was over."""
    over = TIME_IS_OVER.split("{")[0]
    late = [
        number
        for number, check in enumerate(checks)
        if check.outcome is Outcome.NOT_RUN and check.message.startswith(over)
    ]
    found = {checks[number].id for number in late}
    if late and late[0] and checks[late[0] - 1].outcome is Outcome.ERROR:
        found.add(checks[late[0] - 1].id)
    return found


def rows(checks: Iterable[CheckResult]) -> list[dict[str, Any]]:
    """Every check that is no pass, with its reason."""
    return [
        {
            "id": check.id,
            "outcome": check.outcome.value,
            "message": check.message,
            "seconds": round(check.seconds, 2),
            "known_defect": check.known_defect,
        }
        for check in checks
        if check.outcome is not Outcome.PASS
    ]


def groups(checks: Sequence[Check[Any]]) -> dict[str, list[str]]:
    """Ids of the checks of profile ``full`` that ``quick`` has not, by subject in the order of
    ``SUBJECTS``. One that shares its server with those of another subject is with them."""
    subject_of: dict[str, str] = {}
    found: dict[str, list[str]] = {subject: [] for subject in SUBJECTS}
    for check in checks:
        if check.profile != "full":
            continue
        own = check.id.split("/")[0]
        subject = subject_of.setdefault(check.alike, own) if check.alike else own
        found.setdefault(subject, []).append(check.id)
    return {subject: ids for subject, ids in found.items() if ids}


# --- running --------------------------------------------------------------------------------------


class _Viewer:
    """What happens, as lines of the part's log."""

    def __init__(self, context: Context) -> None:
        self.say = context.say

    def begin(self, check_id: str, number: int, total: int) -> None:
        self.say(f"{number}/{total} {check_id}")

    def end(self, result: CheckResult) -> None:
        self.say(f"    {result.outcome.value} {result.id} ({result.seconds:.1f} s)")
        if result.message:
            self.say(f"    {result.message}")


def qualify(
    context: Context,
    name: str,
    spec: ServerSpec,
    *,
    profile: ProfileName = "quick",
    patterns: Sequence[str] = (),
) -> Verdict:
    """One run of the suite in this process; its reports are in the results, in the folder ``name``
    with the release's version.

    Raises:
        HarnessError: nothing could be started: the model or the request makes no sense.
        Interrupted: the reports of what was seen are written.
    """
    from sglang_harness.run.qualification import Qualification, Request

    context.close_server()  # it would be in the way of the suite's servers
    version = context.release.version if context.release else ""
    out = context.settings.out / f"{name}-{version}"
    request = Request(
        spec=spec,
        out=out,
        runtime=context.runtime(),
        profile=profile,
        patterns=list(patterns),
    )
    return Qualification(request, _Viewer(context)).run()


def _spec(context: Context, run: float, **fields: Any) -> ServerSpec:
    slow = context.settings.slow
    args = {**fields.pop("server_args", {}), **memory_share(context)}
    limits = {"run": max(1.0, run), "check": 90 * slow}
    return context.spec(server_args=args, start="auto", limits=limits, **fields)


def _figures(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "seconds": round(verdict.seconds, 1),
        "phases": {each.name: round(each.seconds, 2) for each in verdict.phases},
        "servers": [vars(each) for each in verdict.servers],
        "not_passed": rows(verdict.checks),
        "measured": {f"{f.name} [{f.unit}]": f.value for f in verdict.figures},
        "caveats": verdict.caveats,
    }


def _quick(
    context: Context, name: str, served: str, share: float, **server_args: Any
) -> dict[str, Any]:
    left = within_share(context, share, least=LEAST + KEPT)
    run = left - KEPT * context.settings.slow
    spec = _spec(context, run, model=served, server_args=server_args)
    verdict = qualify(context, name, spec)
    told = Told()
    told.add(verdict)
    for key, value in {**_figures(verdict), **told.figures()}.items():
        context.put(key, value)
    context.headline(line := f"{verdict.verdict}: {told.in_one_line()} in {verdict.seconds:.0f} s")
    context.note("serving", name, line)
    told.judge()
    return {}


def tiny(context: Context) -> dict[str, Any]:
    """The part ``qualify-tiny``: profile quick on the tiny model."""
    return _quick(context, "qualify-tiny", "tiny", SHARE)


def large(context: Context) -> dict[str, Any]:
    """The part ``qualify-large``: profile quick on the bf16 model that is made here."""
    return _quick(context, "qualify-large", model(context), SHARE, dtype="bfloat16")


def full(context: Context) -> dict[str, Any]:
    """The part ``qualify-full``: what profile full has beyond quick, a subject at a time, for as
    long as there is time."""
    from sglang_harness import suite

    told, subjects = Told(), dict[str, Any]()
    for subject, ids in groups(suite.select("full", [])).items():
        slow = context.settings.slow
        if subject == "parallel" and context.on_gpu and len(context.settings.gpus) < 2:
            told.outside.setdefault("needs 2 GPUs", []).extend(ids)
            continue
        if context.left() < (KEPT + LEAST) * slow:
            told.unasked += ids
            subjects[subject] = {"verdict": "not run", "reason": f"{context.left():.0f} s left"}
            continue
        context.say(f"{subject}: {', '.join(ids)}")
        spec = _spec(context, context.left() - KEPT * slow, model="tiny")
        verdict = qualify(
            context, f"qualify-full-{subject}", spec, profile="selected", patterns=ids
        )
        told.add(verdict)
        subjects[subject] = _figures(verdict)
        context.put("subjects", subjects)
        context.put("so_far", told.figures())
        context.headline(told.in_one_line())
    context.note("serving", "qualify-full", told.in_one_line())
    told.judge()
    return {**told.figures(), "subjects": subjects}


TINY = Part(
    name="qualify-tiny",
    asks="Does the suite, profile quick, pass on the tiny model?",
    seconds=200,
    run=tiny,
    needs=frozenset({"release"}),
    scope="release",
    least=60,
)

LARGE = Part(
    name="qualify-large",
    asks="Does the suite, profile quick, pass on a model of 1 to 3 B parameters in bfloat16?",
    seconds=300,
    run=large,
    needs=frozenset({"release"}),
    scope="release",
    disk_bytes=2 * MODEL_BYTES,
    least=90,
)

FULL = Part(
    name="qualify-full",
    asks="Does what profile full adds pass, as far as one GPU goes?",
    seconds=1800,
    run=full,
    needs=frozenset({"release"}),
    scope="last",
    least=80,
)
