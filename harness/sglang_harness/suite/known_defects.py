"""The registry of known defects: data in one file, validated when it is read.

It is two things at once: what a run is excused for, and the track record of what the suite shows.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_harness.errors import SpecError
from sglang_harness.verdict import CheckResult, Outcome

FILE = Path(__file__).with_suffix(".yaml")


class KnownDefect(BaseModel):
    """One defect of given SGLang versions.

    Attributes:
        versions: those in which it was seen, oldest first.
        issue: address of the upstream issue or pull request, or a sentence where there is none.
        found_by: who reported it upstream; ``None`` where that is not known.
        notice: what a user of the server notices, as a sentence.
        review_by: the last day on which the entry excuses a failure.
        death: words of the exception in the server's log, where the server dies before the check
            has observed anything. Then nothing but such an end is excused.
        own_python: the newest of ``versions`` needs packages of other versions than those of the
            harness's CPU stack: whoever shows it again brings a Python.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    check: str
    versions: list[str] = Field(min_length=1)
    device: Literal["any", "cpu", "gpu"] = "any"
    issue: str
    found_by: str | None = None
    notice: str
    review_by: date
    death: str | None = None
    own_python: bool = False

    @property
    def command(self) -> str:
        """The command that shows it again, on the newest version in which it was seen."""
        device = "" if self.device == "any" else f" --device {self.device}"
        newest = self.versions[-1]
        which = f"--sglang-version {newest}"
        if self.own_python:
            which = f"--runtime process --python PYTHON-WITH-{newest}"
        return f"sglang-harness qualify --model tiny {which}{device} -k {self.check}"

    def explains(self, failed: CheckResult) -> bool:
        """Whether a failure of its check is the listed one, as far as can be told."""
        if self.death is not None:
            return failed.evidence is None and self.death in failed.message
        # Without evidence the check ended before it observed anything: another failure.
        return failed.evidence is not None

    def applies(self, version: str | None, device: str, today: date) -> bool:
        return (
            version in self.versions and self.device in ("any", device) and today <= self.review_by
        )


def load(check_ids: set[str], path: Path = FILE) -> list[KnownDefect]:
    """Reads the registry.

    Raises:
        SpecError: the file is not a registry, has an id twice, or names a check that does not
            exist.
    """
    try:
        entries = [KnownDefect(**item) for item in yaml.safe_load(path.read_text(encoding="utf-8"))]
    except (OSError, yaml.YAMLError, TypeError, ValidationError) as error:
        raise SpecError(f"{path.name} cannot be read: {error}") from None
    ids = [entry.id for entry in entries]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise SpecError(f"{path.name}: the id {', '.join(twice)} occurs more than once.")
    if unknown := [e.id for e in entries if e.check not in check_ids]:
        raise SpecError(f"{path.name}: {', '.join(unknown)} names a check that does not exist.")
    return entries


def apply(
    result: CheckResult,
    defects: list[KnownDefect],
    *,
    version: str | None,
    device: str,
    today: date,
) -> CheckResult:
    """``fail`` becomes ``known`` and ``pass`` becomes ``fixed`` where an entry applies."""
    for defect in defects:
        if defect.check != result.id or not defect.applies(version, device, today):
            continue
        if result.outcome is Outcome.FAIL and not defect.explains(result):
            continue
        if result.outcome is Outcome.FAIL:
            changed = Outcome.KNOWN
        elif result.outcome is Outcome.PASS:
            changed = Outcome.FIXED
        else:
            continue
        return result.model_copy(update={"outcome": changed, "known_defect": defect.id})
    return result


def as_markdown(defects: list[KnownDefect]) -> str:
    """Every defect as a table: the content of ``docs/track-record.md``."""
    rows = [
        f"| `{d.id}` | {', '.join(d.versions)} | {d.notice} | {_upstream(d)} "
        f"| {d.found_by or ''} | `{d.command}` |"
        for d in defects
    ]
    head = (
        "| defect | SGLang | what you notice | upstream | found by | command that shows it again |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def as_short_markdown(defects: list[KnownDefect]) -> str:
    """The same without the commands, for a page that has other things to say."""
    rows = [f"| {d.notice} | {', '.join(d.versions)} | {_upstream(d)} |" for d in defects]
    return "\n".join(["| what you notice | SGLang | upstream |", "|---|---|---|", *rows])


def _upstream(defect: KnownDefect) -> str:
    if not defect.issue.startswith("https://"):
        return "none found"
    return f"[#{defect.issue.rpartition('/')[2]}]({defect.issue})"
