"""Runs the parts: in which order, in which processes, within which limits.

The process that does this initialises no CUDA. A part that hangs or crashes takes its child process
with it, and no other part.
"""

from __future__ import annotations

import importlib
import queue
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from sglang_harness import __version__
from sglang_harness._base.descent import adopting_orphans
from sglang_harness._base.signals import interruptions
from sglang_harness.errors import Interrupted, SpecError
from sglang_harness.gpu_check import summary
from sglang_harness.gpu_check.one_child import Child, new_border
from sglang_harness.gpu_check.part import Part
from sglang_harness.gpu_check.part_log import PartLogs
from sglang_harness.gpu_check.record import Record
from sglang_harness.gpu_check.results import PARTS, Note, PartResult, Results
from sglang_harness.gpu_check.settings import Job, Order, Release, Settings

TABLE = "sglang_harness.gpu_check.parts"

#: Seconds that a child has for ending its server after its last part.
CLOSES_WITHIN = 45.0


@dataclass(frozen=True)
class Step:
    """One part, asked of one release or of none."""

    part: Part
    release: Release | None

    @property
    def key(self) -> str:
        return (
            self.part.name if self.release is None else f"{self.part.name}-{self.release.version}"
        )

    @property
    def group(self) -> tuple[str, str]:
        """Steps in a row with the same share a child process."""
        return self.part.group or f"={self.key}", self.release.version if self.release else ""


def plan(parts: Sequence[Part], releases: Sequence[Release]) -> list[Step]:
    """Every step in its order. Without a release the parts that need one are in it once."""
    every: Sequence[Release | None] = releases or [None]
    steps = [Step(part, None) for part in parts if part.scope == "once"]
    for scope in ("release", "last"):
        steps += [Step(p, release) for release in every for p in parts if p.scope == scope]
    return steps


def table(module: str = TABLE) -> tuple[Part, ...]:
    """The parts of a table, in its order."""
    return tuple(importlib.import_module(module).PARTS)


def chosen(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """Those of the names, in the table's order; all without names.

    Raises:
        SpecError: there is no such part.
    """
    known = [part.name for part in parts]
    for name in names or ():
        if name not in known:
            raise SpecError(f"--part {name!r} is not a part. The parts are {', '.join(known)}.")
    return [part for part in parts if not names or part.name in names]


class Run:
    """One run of gpu-check.

    Args:
        settings: what is to be done.
        parts: which parts, in their order.
        record: where the results go.
        results: what is known of the run before its first part.
        say: told each line for the terminal.
        leftovers: asked after each child process: what is still on a GPU, a sentence each.
    """

    def __init__(
        self,
        settings: Settings,
        parts: Sequence[Part],
        record: Record,
        results: Results,
        *,
        say: Callable[[str], None],
        leftovers: Callable[[], list[str]] = list,
        table: str = TABLE,
    ) -> None:
        self._settings, self._record, self.results = settings, record, results
        self._say, self._leftovers, self._table = say, leftovers, table
        self._steps = plan(parts, settings.releases)
        self._logs = PartLogs(record.folder / PARTS, record.redact)
        self._figures: dict[str, dict[str, Any]] = {}
        self._no_server: dict[str, dict[str, str]] = {}
        self._current: tuple[PartResult, float] | None = None

    def run(self) -> Results:
        """Runs every part that can be run.

        Raises:
            Interrupted: by Ctrl-C or SIGTERM; the results say so.
            HarnessError: the results cannot be written.
        """
        with adopting_orphans(), interruptions() as signals:
            try:
                self._write()
                for _, steps in groupby(self._steps, key=lambda step: step.group):
                    self._run_group(list(steps))
            except Interrupted as error:
                signals.calm()
                self._interrupted(error)
                raise
            self.results.ended = f"Ended after {self._passed():.0f} s."
            self._write()
        return self.results

    def _passed(self) -> float:
        return time.time() - (self._settings.ends_at - self._settings.budget_seconds)

    def _left(self) -> float:
        return self._settings.ends_at - time.time()

    def _run_group(self, steps: list[Step]) -> None:
        child: Child | None = None
        try:
            for step in steps:
                if why := self._why_not(step):
                    self._done(
                        step, PartResult(part=step.part.name, outcome="not run", message=why)
                    )
                    continue
                child = self._run_step(step, child or self._start(step))
            if child is not None:
                self._close(child, steps[-1])
                child = None
        finally:
            if child is not None:
                child.end()

    def _start(self, step: Step) -> Child:
        version = step.release.version if step.release else ""
        suffix = f"-{version}"
        earlier = {
            key.removesuffix(suffix) if version else key: figures
            for key, figures in self._figures.items()
        }
        job = Job(
            settings=self._settings,
            table=self._table,
            release=step.release,
            earlier=earlier,
            no_server=self._no_server.get(version, {}),
            border=new_border(),
        )
        return Child(job, self._logs)

    def _why_not(self, step: Step) -> str:
        """Why a step is not started; empty where nothing is in its way."""
        settings, part = self._settings, step.part
        if settings.device == "cpu" and part.needs & {"cuda", "two gpus"}:
            return "a rehearsal on the CPU"
        if "two gpus" in part.needs and len(settings.gpus) < 2:
            return "one GPU"
        if step.release is None and (part.scope != "once" or "release" in part.needs):
            return "there is no SGLang here (--python names a Python that has it)"
        if part.disk_bytes:
            free = shutil.disk_usage(settings.models).free
            if free < part.disk_bytes:
                return (
                    f"needs {part.disk_bytes / 1e9:.1f} GB of disk in {settings.models}, and "
                    f"{free / 1e9:.1f} GB are free (TMPDIR names another place)"
                )
        left = self._left()
        if left < part.fair_share() * settings.slow:
            return f"{max(0.0, left):.0f} s left"
        return ""

    def _run_step(self, step: Step, child: Child) -> Child | None:
        """Runs one part in ``child``; returns the child, unless it has ended."""
        limit = min(step.part.seconds * self._settings.slow, self._left())
        result = PartResult(
            part=step.part.name,
            release=step.release.version if step.release else None,
            outcome="failed",
            limit=round(limit, 1),
        )
        began = time.monotonic()
        self._current = result, began
        child.order(Order(part=step.part.name, seconds=limit, log=step.key))
        until = began + limit
        survives = self._listen(step, child, result, until)
        result.seconds = round(time.monotonic() - began, 3)
        if not survives:
            child.end()
        self._current = None
        self._done(step, result)
        if not survives:
            self._look_at_gpus(step)
        return child if survives else None

    def _listen(self, step: Step, child: Child, result: PartResult, until: float) -> bool:
        """Takes reports until the part has ended; says whether the child lives on."""
        while True:
            try:
                report = child.reports.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                result.message = (
                    f"did not end within {result.limit:g} s; it and what it started were killed"
                )
                return False
            if report is None:
                last = self._logs.last_line(step.key)
                result.message = f"its process {child.how_it_ended()}"
                result.message += f" (last line of its log: {last[:300]})" if last else ""
                return False
            if self._take(report, step, result):
                return True

    def _take(self, report: dict[str, Any], step: Step, result: PartResult) -> bool:
        """Takes one report; true for the one that ends the part."""
        kind = report["kind"]
        if kind == "put":
            result.figures[report["key"]] = report["value"]
        elif kind == "note":
            result.notes.append(Note.model_validate({k: report[k] for k in Note.model_fields}))
        elif kind == "headline":
            result.headline = report["text"]
        elif kind == "secret":
            self._record.keep_secret(report["value"])
        elif kind == "no server":
            version = step.release.version if step.release else ""
            self._no_server.setdefault(version, {})[report["asked"]] = report["why"]
        elif kind == "end":
            result.outcome, result.message = report["outcome"], report["message"]
            result.figures |= report["figures"]
            return True
        return False

    def _close(self, child: Child, step: Step) -> None:
        """Lets the child end its server and itself."""
        child.no_more()
        until = time.monotonic() + CLOSES_WITHIN * self._settings.slow
        while True:
            try:
                report = child.reports.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                self.results.notes.append(
                    f"After {step.key} the child process did not end its server within "
                    f"{CLOSES_WITHIN * self._settings.slow:g} s: both were killed."
                )
                break
            if report is None:
                break
        self.results.notes += [
            f"After {step.key} {left} was left, and killed." for left in child.end()
        ]
        self._look_at_gpus(step)

    def _look_at_gpus(self, step: Step) -> None:
        self.results.notes += [f"After {step.key}: {told}" for told in self._leftovers()]
        self._write()

    def _done(self, step: Step, result: PartResult) -> None:
        result.release = step.release.version if step.release else None
        log = self._logs.file(step.key)
        if log.exists():
            result.files.append(str(log.relative_to(self._record.folder)))
        self._figures[step.key] = result.figures
        self.results.parts.append(result)
        self._say(summary.line(result))
        self._write()

    def _interrupted(self, error: Interrupted) -> None:
        why = str(error)
        done = len(self.results.parts)
        for number, step in enumerate(self._steps[done:]):
            result = PartResult(part=step.part.name, outcome="not run", message=why)
            if number == 0 and self._current is not None:
                result, began = self._current
                result.seconds = round(time.monotonic() - began, 3)
                result.outcome = "not run"
                result.message = f"{why} after {result.seconds:.1f} s"
            result.release = step.release.version if step.release else None
            self.results.parts.append(result)
        self.results.ended = f"It was {why} after {self._passed():.0f} s."
        self._write()

    def _write(self) -> None:
        self._record.write(self.results, summary.page(self.results))


def results_of(settings: Settings, machine: dict[str, Any], kit: dict[str, Any] | None) -> Results:
    """The results before the first part."""
    return Results(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        device=settings.device,
        harness=__version__,
        machine=machine,
        kit=kit,
        releases={r.version: r.caveats for r in settings.releases},
        budget_seconds=settings.budget_seconds,
    )
