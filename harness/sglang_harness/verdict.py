"""What was seen, as data: the one source of every report. No torch, no Docker, no HTTP."""

from __future__ import annotations

import json
import math
import statistics
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import SpecError
from sglang_harness.memory import Reading

SCHEMA_VERSION = "1.0"

ProfileName = Literal["quick", "full", "selected"]


class Outcome(str, Enum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    ERROR = "error"
    """The harness could not find out."""
    KNOWN = "known"
    """Failed, as the registry of known defects says it must on this version."""
    FIXED = "fixed"
    """A defect that the registry lists for this version did not show."""
    NOT_RUN = "not-run"
    """The harness failed to provide what the check needs; stands in the way of a pass."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Figure(_Data):
    """A number that is worth comparing with another run's."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    samples: list[float] = Field(min_length=1)
    value: float
    """The median of the samples."""

    @classmethod
    def of(
        cls, name: str, unit: str, better: Literal["lower", "higher"], *samples: float
    ) -> Figure:
        value = statistics.median(samples)
        return cls(name=name, unit=unit, better=better, samples=list(samples), value=value)


class CheckResult(_Data):
    """One check's answer with the evidence behind it."""

    id: str
    outcome: Outcome
    seconds: float
    message: str = ""
    """What was expected, what came, where and by how much; empty for a pass."""
    evidence: dict[str, Any] | None = None
    """The observation, enough to judge again without a server."""
    known_defect: str | None = None
    """Id of the registry's entry that applies."""
    retries: list[str] = Field(default_factory=list)
    """Requests that were sent again, with the reason."""


class Outside(_Data):
    """A check that is outside the profile because the target lacks what it needs."""

    id: str
    reason: str


class PhaseTime(_Data):
    name: str
    seconds: float


class ServerStart(_Data):
    """One server of a run, and how it was started."""

    name: str
    """Its model and flags, and what it was for."""
    how: Literal["cold", "warm", "elsewhere"]
    """``cold``: as its image starts it. ``warm``: forked from a parent that had imported SGLang.
    ``elsewhere``: it ran already."""
    why: str = ""
    """Why it was not started warm, where it might have been."""
    seconds: float
    """From its creation to its first token; of a warm one without its parent's imports."""


class Verdict(_Data):
    """The whole of a run. Written as ``out/verdict.json``."""

    schema_version: str = SCHEMA_VERSION
    run_id: str
    started: datetime
    seconds: float
    verdict: Literal["pass", "fail", "error"]
    reason: str = ""
    """Why it is not a pass, in one sentence."""
    profile: ProfileName
    selection: str | None = None
    """The expression of ``-k`` where the profile is ``selected``."""
    interrupted: bool = False
    harness_version: str
    sglang_version: str | None = None
    image: dict[str, Any] | None = None
    """Name, digest and how the container was made."""
    model: dict[str, Any]
    device: dict[str, Any]
    runtime: str
    spec: dict[str, Any]
    seed: int
    checks: list[CheckResult]
    outside_profile: list[Outside] = Field(default_factory=list)
    figures: list[Figure] = Field(default_factory=list)
    phases: list[PhaseTime] = Field(default_factory=list)
    """Of the first server, where this run started it."""
    servers: list[ServerStart] = Field(default_factory=list)
    """In the order of their starts."""
    memory: list[Reading] = Field(default_factory=list)
    environment: dict[str, Any] = Field(default_factory=dict)
    caveats: list[str] = Field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"pass": 0, "fail": 1, "error": 2}[self.verdict]

    def as_json(self) -> str:
        data = writable(self.model_dump())
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Replaces ``path`` once the new file is complete. Raises ``OSError``."""
        write_whole(path, self.as_json())

    @classmethod
    def read(cls, path: Path) -> Verdict:
        """Raises :class:`SpecError` for a file that is no whole verdict of this schema."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SpecError(f"{path}: cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise SpecError(f"{path} is no verdict of this harness: it is not text.") from None
        try:
            verdict = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise SpecError(
                f"{path} is no verdict of this harness: {where}: {first['msg']}.",
                advice="It may be cut short or come from another version.",
            ) from None
        if verdict.schema_version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise SpecError(
                f"{path} has schema {verdict.schema_version}, this harness reads {SCHEMA_VERSION}."
            )
        return verdict


def writable(data: Any) -> Any:
    """The same data as files can hold it: no halves of characters, and NaN and the infinities
    as strings, which pydantic reads back as numbers."""
    if isinstance(data, str):
        return data.encode("utf-8", "replace").decode("utf-8")
    if isinstance(data, datetime):
        return data.isoformat()
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else ("Infinity" if data > 0 else "-Infinity")
    if isinstance(data, dict):
        return {writable(key): writable(value) for key, value in data.items()}
    if isinstance(data, list):
        return [writable(item) for item in data]
    return data


def overall(
    checks: list[CheckResult], *, interrupted: bool = False, strict_known: bool = False
) -> tuple[Literal["pass", "fail", "error"], str]:
    """The verdict over all checks, and why it is not a pass. Error outranks fail.

    A run that checked nothing is an error: silence is no pass.
    """
    by_outcome: dict[Outcome, list[str]] = {}
    for check in checks:
        by_outcome.setdefault(check.outcome, []).append(check.id)

    def named(outcome: Outcome) -> str:
        ids = by_outcome[outcome]
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        return ", ".join(ids[:3]) + more

    if interrupted:
        return "error", f"interrupted after {len(checks)} checks"
    if Outcome.ERROR in by_outcome:
        return "error", f"could not be found out: {named(Outcome.ERROR)}"
    if Outcome.NOT_RUN in by_outcome:
        return "error", f"not run: {named(Outcome.NOT_RUN)}"
    if not checks:
        return "error", "no check was run"
    if Outcome.FAIL in by_outcome:
        return "fail", f"failed: {named(Outcome.FAIL)}"
    if strict_known and Outcome.FIXED in by_outcome:
        return "fail", f"listed as known defects, but did not show: {named(Outcome.FIXED)}"
    return "pass", ""


def json_schema() -> dict[str, Any]:
    """JSON Schema of ``verdict.json``; shipped as ``verdict.schema.json``."""
    schema = Verdict.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
