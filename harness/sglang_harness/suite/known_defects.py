"""The registry of known defects: data in one file, checked when it is read."""

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
    """One defect of given SGLang versions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    check: str
    versions: list[str] = Field(min_length=1)
    device: Literal["any", "cpu", "gpu"] = "any"
    issue: str
    notice: str
    review_by: date

    def applies(self, version: str | None, device: str, today: date) -> bool:
        return (
            version in self.versions and self.device in ("any", device) and today <= self.review_by
        )


def load(check_ids: set[str], path: Path = FILE) -> list[KnownDefect]:
    """Reads the registry.

    Raises:
        SpecError: it is no such file, an id is there twice, or an entry names no check.
    """
    try:
        entries = [KnownDefect(**item) for item in yaml.safe_load(path.read_text(encoding="utf-8"))]
    except (OSError, yaml.YAMLError, TypeError, ValidationError) as error:
        raise SpecError(f"{path.name} cannot be read: {error}") from None
    ids = [entry.id for entry in entries]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise SpecError(f"{path.name}: the id {', '.join(twice)} is there twice.")
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
        if result.outcome is Outcome.FAIL and result.evidence is None:
            # The check did not come to see what the entry describes: another failure.
            continue
        if result.outcome is Outcome.FAIL:
            changed = Outcome.KNOWN
        elif result.outcome is Outcome.PASS:
            changed = Outcome.FIXED
        else:
            continue
        return result.model_copy(update={"outcome": changed, "known_defect": defect.id})
    return result
