"""What came out, as data and as files that are whole at any time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.gpu_check.outcomes import Outcome, Topic

SCHEMA = 1

#: Names of the files in the folder of the results.
RESULTS, SUMMARY, ARCHIVE, PARTS = "results.json", "summary.txt", "results.tar.gz", "parts"


class Note(BaseModel):
    """One line of the summary by topic."""

    topic: Topic
    what: str
    value: str


class PartResult(BaseModel):
    """How one part ended.

    Attributes:
        release: SGLang's version; ``None`` for a part that needs none.
        message: why it failed or did not run; empty for one that held.
        seconds: it took.
        limit: seconds that it had; 0 for one that was not started.
        headline: its figures in one line.
        figures: what it returned; of a part that was stopped, what it had put down by then.
        notes: lines for the summary.
        files: in the folder of the results, relative to it.
    """

    part: str
    release: str | None = None
    outcome: Outcome
    message: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    headline: str = ""
    figures: dict[str, Any] = Field(default_factory=dict)
    notes: list[Note] = Field(default_factory=list)
    files: list[str] = Field(default_factory=list)


class Results(BaseModel):
    """One run of gpu-check.

    Attributes:
        date: of the start, ISO 8601 with the zone.
        device: ``cpu`` for a rehearsal, in which no GPU was seen.
        machine: devices, driver, CUDA, torch, and the host.
        kit: what the kit says of itself; ``None`` without one.
        releases: SGLang's versions, the primary one first, with their caveats.
        notes: what the run itself saw, a sentence each, such as processes that a part left.
        ended: how the run ended; empty while it runs.
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_: int = Field(default=SCHEMA, alias="schema")
    date: str
    device: str
    harness: str
    machine: dict[str, Any] = Field(default_factory=dict)
    kit: dict[str, Any] | None = None
    releases: dict[str, list[str]] = Field(default_factory=dict)
    budget_seconds: float
    parts: list[PartResult] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    ended: str = ""

    @property
    def exit_code(self) -> int:
        """0: every part held. 1: one failed. 3: none failed, and not everything ran."""
        outcomes = {part.outcome for part in self.parts}
        if "failed" in outcomes:
            return 1
        return 0 if outcomes == {"held"} else 3


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers that are not finite, and what JSON does not know,
    become text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)  # numpy's and torch's scalars
    if callable(item) and getattr(value, "ndim", None) == 0:
        return plain(item())
    return str(value)
