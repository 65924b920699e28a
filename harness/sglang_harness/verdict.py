"""The result of a run as data: the one source of every report. No torch, no Docker, no HTTP.

A later minor version of the schema only adds optional fields, so files of every minor of
``SCHEMA_VERSION``'s major can be read.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import SpecError

SCHEMA_VERSION = "1.1"
"""1.1 added ``strict_known``, and ``because`` to a check."""

ProfileName = Literal["quick", "full", "selected"]


class Outcome(str, Enum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    ERROR = "error"
    """Inconclusive: the harness could not tell whether the server is right."""
    KNOWN = "known"
    """Failed as the registry of known defects expects on this version."""
    FIXED = "fixed"
    """A defect that the registry lists for this version did not reproduce."""
    NOT_RUN = "not-run"
    """The harness could not provide what the check needs. Prevents a pass."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Figure(_Data):
    """A measured number to compare between runs; never judged."""

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
    """The result of one check with its evidence."""

    id: str
    outcome: Outcome
    seconds: float
    message: str = ""
    """What was expected, what was observed, where and by how much; empty for a pass."""
    evidence: dict[str, Any] | None = None
    """The observation: enough to judge the check again without a server."""
    known_defect: str | None = None
    """Id of the entry in the registry of known defects that applies."""
    because: str | None = None
    """Id of the failed check that makes this one ``not-run``: it is counted there, not twice."""
    retries: list[str] = Field(default_factory=list)
    """Empty: every request is sent once. Kept so that older verdicts stay readable."""


class Outside(_Data):
    """A check outside the profile: the target lacks what the check needs."""

    id: str
    reason: str


class PhaseTime(_Data):
    name: str
    seconds: float


class ServerStart(_Data):
    """One server of a run, and how it was started."""

    name: str
    """Its model and flags, and its purpose."""
    how: Literal["cold", "warm", "elsewhere"]
    """``cold``: as its image starts it. ``warm``: forked from a parent process that had already
    imported SGLang. ``elsewhere``: it was running before the run."""
    why: str = ""
    """Why it was not started warm, where a warm start was possible in principle."""
    seconds: float
    """From its creation to its first token; for a warm start without the parent's imports."""


class Reading(BaseModel):
    """Memory at one moment, all figures in bytes.

    Attributes:
        source: ``nvml`` (whole GPUs, by UUID), ``container`` (host memory of the server's
            container as the kernel counts it) or ``process`` (host memory of its processes).
        used_bytes: the figure to compare: device memory in use for ``nvml``; anonymous plus
            shared memory for the others (page cache is not counted, because the kernel reclaims
            it when it needs to).
        parts: what it is made of.
        peak_bytes: the highest value sampled since the previous mark, this one included;
            ``None`` where nothing samples.
    """

    model_config = ConfigDict(frozen=True)

    mark: str
    seconds: float
    """Since the memory ledger began."""
    source: str
    used_bytes: int
    parts: dict[str, int]
    peak_bytes: int | None = None


class Verdict(_Data):
    """A whole run. Written as ``out/verdict.json``."""

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
    strict_known: bool = False
    """A known defect that did not reproduce fails the run (``--strict-known``)."""
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
    """Start phases of the first server, where this run started it."""
    servers: list[ServerStart] = Field(default_factory=list)
    """In the order in which they were started."""
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
        """Reads a saved run, of this minor version of the schema or any other of its major.

        Fields that a later minor has added are ignored, which a caveat says.

        Raises:
            SpecError: the file cannot be read, is not a complete verdict, or has a schema of
                another major version.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"{path}: cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise _not_a_verdict(path, "it is not text") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise _not_a_verdict(path, f"it is not JSON: {error}") from None
        if not isinstance(data, dict) or "schema_version" not in data:
            raise _not_a_verdict(path, "it has no schema_version")
        later = _is_later_minor(path, data)
        ignored: list[str] = []
        try:
            verdict = cls.model_validate(data)
        except ValidationError as error:
            ignored = _drop_unknown(data, error) if later else []
            if not ignored:
                raise _misfit(path, data, error, later=later) from None
            try:
                verdict = cls.model_validate(data)
            except ValidationError as remaining:
                raise _misfit(path, data, remaining, later=later) from None
        if ignored:
            named = ", ".join(ignored[:5]) + (" ..." if len(ignored) > 5 else "")
            verdict.caveats.append(
                f"This file has schema {verdict.schema_version}, and this harness knows "
                f"{SCHEMA_VERSION}: it ignored {named}."
            )
        return verdict


def _not_a_verdict(path: Path, why: str, advice: str = "") -> SpecError:
    return SpecError(
        f"{path} is not a verdict of this harness: {why}.",
        advice=advice
        or "Expected the verdict.json of a run; it may be cut short or be another file.",
    )


def _misfit(path: Path, data: dict[str, Any], error: ValidationError, *, later: bool) -> SpecError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    why = f"{where}: {first['msg']} (schema {data['schema_version']})"
    return _not_a_verdict(path, why, _written_by(data) if later else "")


def _written_by(data: dict[str, Any]) -> str:
    writer = data.get("harness_version", "its version is not in the file")
    return f"Read it with the sglang-harness that wrote it ({writer})."


def _is_later_minor(path: Path, data: dict[str, Any]) -> bool:
    """Whether the file may hold fields that this version does not know.

    Raises:
        SpecError: its major version is another.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)", str(data["schema_version"]))
    if found is None:
        raise _not_a_verdict(path, f"schema_version {data['schema_version']!r} is not a version")
    major, minor = (int(number) for number in SCHEMA_VERSION.split("."))
    if int(found[1]) != major:
        raise SpecError(
            f"{path} has schema {found[0]}, and this harness reads schema {SCHEMA_VERSION} and "
            f"every other {major}.x.",
            advice=_written_by(data),
        )
    return int(found[2]) > minor


def _drop_unknown(data: dict[str, Any], error: ValidationError) -> list[str]:
    """Removes the fields that ``error`` calls unknown from ``data``, and names each once."""
    names: dict[str, None] = {}
    for problem in error.errors():
        if problem["type"] != "extra_forbidden":
            continue
        *places, name = problem["loc"]
        within: Any = data
        for place in places:
            within = within[place]
        del within[name]
        names[".".join(str(p) for p in problem["loc"] if not isinstance(p, int))] = None
    return list(names)


def writable(data: Any) -> Any:
    """The same data in a form that JSON can hold: no lone surrogates, and NaN and the infinities
    as strings, which pydantic reads back as numbers."""
    if isinstance(data, str):
        return data.encode("utf-8", "replace").decode("utf-8")
    if isinstance(data, datetime):
        return data.isoformat()
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else ("Infinity" if data > 0 else "-Infinity")
    if isinstance(data, dict):
        return {writable(key): writable(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [writable(item) for item in data]
    # Whatever a check saw, it costs nobody the verdict.
    return data if data is None or isinstance(data, int | float) else str(data)


def overall(
    checks: list[CheckResult], *, interrupted: bool = False, strict_known: bool = False
) -> tuple[Literal["pass", "fail", "error"], str]:
    """The verdict over all checks, and why it is not a pass. Error outranks fail.

    A run without a single check is an error.
    """
    failed = {check.id for check in checks if check.outcome is Outcome.FAIL}
    by_outcome: dict[Outcome, list[str]] = {}
    for check in checks:
        if check.outcome is Outcome.NOT_RUN and check.because in failed:
            continue
        by_outcome.setdefault(check.outcome, []).append(check.id)

    def named(outcome: Outcome) -> str:
        ids = by_outcome[outcome]
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        return ", ".join(ids[:3]) + more

    if interrupted:
        return "error", f"interrupted after {len(checks)} checks"
    if Outcome.ERROR in by_outcome:
        return "error", f"inconclusive (harness error): {named(Outcome.ERROR)}"
    if Outcome.NOT_RUN in by_outcome:
        return "error", f"not run: {named(Outcome.NOT_RUN)}"
    if not checks:
        return "error", "no check was run"
    if Outcome.FAIL in by_outcome:
        return "fail", f"failed: {named(Outcome.FAIL)}"
    if strict_known and Outcome.FIXED in by_outcome:
        return "fail", f"known defects no longer reproduce (strict): {named(Outcome.FIXED)}"
    return "pass", ""


def json_schema() -> dict[str, Any]:
    """JSON Schema of ``verdict.json``; shipped as ``verdict.schema.json``."""
    schema = Verdict.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
