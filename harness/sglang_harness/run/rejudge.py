"""Judging a saved run again: when a tolerance is questioned, no server is needed."""

from __future__ import annotations

from datetime import date

from sglang_harness import suite
from sglang_harness.suite import installed, known_defects
from sglang_harness.suite.check import judge_again
from sglang_harness.verdict import CheckResult, Verdict, overall


def judge_saved(saved: Verdict) -> tuple[Verdict, list[tuple[CheckResult, CheckResult]]]:
    """The verdict as it would be today, and each check whose outcome changed.

    A check that this version does not know, or whose evidence is not there, keeps its
    outcome. Known defects are applied as of the day of the run.

    Raises:
        SpecError: evidence that does not fit its check, or an installed package's checks that
            cannot be added.
    """
    installed.load()
    registered = suite.registered()
    defects = known_defects.load(set(registered))
    device = str(saved.device.get("kind"))
    ran_on: date = saved.started.date()
    again = []
    for before in saved.checks:
        check = registered.get(before.id)
        if check is None or before.evidence is None:
            again.append(before)
            continue
        after = judge_again(check, before)
        again.append(
            known_defects.apply(
                after, defects, version=saved.sglang_version, device=device, today=ran_on
            )
        )
    state, reason = overall(again, interrupted=saved.interrupted)
    changed = [
        (b, a) for b, a in zip(saved.checks, again, strict=True) if b.outcome is not a.outcome
    ]
    update = {"checks": again, "verdict": state, "reason": reason}
    return saved.model_copy(update=update), changed
