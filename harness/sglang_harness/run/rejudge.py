"""Judging a saved run again: questioning a tolerance needs no server."""

from __future__ import annotations

from datetime import date

from sglang_harness import suite
from sglang_harness.suite import installed, known_defects
from sglang_harness.suite.check import judge_again
from sglang_harness.verdict import CheckResult, Verdict, overall


def judge_saved(
    saved: Verdict, *, strict_known: bool = False
) -> tuple[Verdict, list[tuple[CheckResult, CheckResult]]]:
    """The verdict as it would be today, and each check whose outcome changed.

    A check that this version does not have, or that has no evidence, keeps its outcome. Known
    defects are applied as of the day of the run.

    Args:
        strict_known: judge strictly a run that was not. A run that was strict stays so.

    Raises:
        SpecError: evidence does not fit its check, or the checks of an installed package cannot
            be added.
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
    strict = strict_known or _was_strict(saved)
    state, reason = overall(again, interrupted=saved.interrupted, strict_known=strict)
    changed = [
        (b, a) for b, a in zip(saved.checks, again, strict=True) if b.outcome is not a.outcome
    ]
    update = {"checks": again, "verdict": state, "reason": reason, "strict_known": strict}
    return saved.model_copy(update=update), changed


def _was_strict(saved: Verdict) -> bool:
    # Schema 1.0 has no field for it, but a strict run is recognisable: it failed without a failure.
    failed = saved.verdict == "fail" and not saved.interrupted
    return saved.strict_known or (failed and overall(saved.checks)[0] == "pass")
