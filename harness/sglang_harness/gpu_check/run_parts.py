"""Runs the parts: in which order, in which processes, within which limits.

The process that does this initialises no CUDA. A part that hangs or crashes takes its child process
with it, and no other part.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from sglang_harness import __version__
from sglang_harness._base import bounded, headroom, paths, temporary
from sglang_harness._base.descent import adopting_orphans
from sglang_harness._base.signals import Interruptions
from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import HarnessError, Interrupted, SpecError
from sglang_harness.gpu_check import record, summary
from sglang_harness.gpu_check.one_child import Child, new_border
from sglang_harness.gpu_check.part import Part
from sglang_harness.gpu_check.part_log import PartLogs
from sglang_harness.gpu_check.results import PARTS, Note, PartResult, Results
from sglang_harness.gpu_check.settings import Job, Order, Release, Settings
from sglang_harness.runtime import shared_memory
from sglang_harness.upkeep.sweep import sweep

#: The module whose ``PARTS`` is the table of parts.
TABLE = "sglang_harness.gpu_check.parts"

#: Seconds that a child has for ending its server after its last part, before ``--slow``.
CLOSES_WITHIN = 60.0


@dataclass(frozen=True)
class Step:
    """One part, asked of one release or of none."""

    part: Part
    release: Release | None

    @property
    def version(self) -> str:
        """SGLang's; empty without a release."""
        return self.release.version if self.release else ""

    @property
    def key(self) -> str:
        """Names its files."""
        return f"{self.part.name}-{self.version}" if self.release else self.part.name

    @property
    def group(self) -> tuple[str, str]:
        """Steps in a row with the same share a child process."""
        return self.part.group or f"={self.key}", self.version

    def result(self, **known: Any) -> PartResult:
        return PartResult(part=self.part.name, release=self.version or None, **known)


def table() -> tuple[Part, ...]:
    """The parts, in their order."""
    return tuple(importlib.import_module(TABLE).PARTS)


def chosen(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """Those of the names, in the table's order; all without names.

    Raises:
        SpecError: there is no such part.
    """
    known = [part.name for part in parts]
    for name in names:
        if name not in known:
            raise SpecError(f"--part {name!r} is not a part. The parts are {', '.join(known)}.")
    return [part for part in parts if not names or part.name in names]


def plan(parts: Sequence[Part], releases: Sequence[Release]) -> list[Step]:
    """Every step in its order. Without a release the parts that need one are in it once."""
    every: Sequence[Release | None] = releases or [None]
    steps = [Step(part, None) for part in parts if part.scope == "once"]
    for scope in ("release", "last"):
        steps += [Step(p, release) for release in every for p in parts if p.scope == scope]
    return steps


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


class Run:
    """One run of gpu-check.

    Args:
        settings: what is to be done.
        parts: which parts, in their order.
        into: where the results go.
        results: what is known of the run before its first part.
        say: told each line for the terminal.
        left_on_gpus: asked after each child process: what is still on a GPU, a sentence each.
    """

    def __init__(
        self,
        settings: Settings,
        parts: Sequence[Part],
        into: record.Record,
        results: Results,
        *,
        say: Callable[[str], None],
        left_on_gpus: Callable[[], list[str]] = list,
    ) -> None:
        self._settings, self._record, self._results = settings, into, results
        self._say, self._left_on_gpus = say, left_on_gpus
        self._steps = plan(parts, settings.releases)
        self._logs = PartLogs(into.folder / PARTS, into.redact)
        self._figures: dict[tuple[str, str], dict[str, Any]] = {}
        self._no_server: dict[str, dict[str, str]] = {}
        self._running: PartResult | None = None
        self._unwritten: HarnessError | None = None

    def run(self, signals: Interruptions) -> Results:
        """Runs every part that can be run.

        Args:
            signals: of the block that this is called in.

        Raises:
            Interrupted: by Ctrl-C or SIGTERM. The child is ended, and the results say so.
            HarnessError: the results could not be written at the end.
        """
        with adopting_orphans():
            try:
                self._write()
                for _, steps in groupby(self._steps, key=lambda step: step.group):
                    self._run_group(list(steps))
            except Interrupted as error:
                signals.calm()
                self._interrupted(error)
                raise
            self._results.ended = f"It ended after {self._passed():.0f} s."
            self._write()
        if self._unwritten is not None:
            raise self._unwritten
        return self._results

    def _passed(self) -> float:
        return time.time() - (self._settings.ends_at - self._settings.budget_seconds)

    def _left(self) -> float:
        return max(0.0, self._settings.ends_at - time.time())

    def _run_group(self, steps: list[Step]) -> None:
        child: Child | None = None
        step = steps[0]
        try:
            for step in steps:
                if why := self._why_not(step):
                    self._done(step, step.result(outcome="not run", message=why))
                    continue
                if child is not None and child.has_ended:
                    self._saw(f"the child process {child.how_it_ended()} between two parts", step)
                    self._look_after(child, step)
                    child = None
                child = child or self._start(step)
                if not self._run_step(step, child):
                    self._look_after(child, step)
                    child = None
            if child is not None:
                self._close(child, step)
                self._look_after(child, step)
                child = None
        finally:
            if child is not None:
                self._tidy(child, step)

    def _start(self, step: Step) -> Child:
        """A child for this part and those of its group that follow."""
        versions = ("", step.version)
        job = Job(
            settings=self._settings,
            table=TABLE,
            release=step.release,
            earlier={n: f for (n, version), f in self._figures.items() if version in versions},
            no_server=self._no_server.get(step.version, {}),
            border=new_border(),
        )
        return Child(job, self._logs, step.key)

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
            for folder, variable in (
                (paths.cache(), "SGLANG_HARNESS_CACHE"),
                (settings.models.parent, "TMPDIR"),
            ):
                free = headroom.disk(folder).free
                if free < part.disk_bytes:
                    return (
                        f"needs {part.disk_bytes / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB "
                        f"are free in {folder} ({variable} names another place)"
                    )
        if self._left() < part.fair_share() * settings.slow:
            return f"{self._left():.0f} s left"
        return ""

    def _run_step(self, step: Step, child: Child) -> bool:
        """Runs one part in ``child``; says whether the child can run another."""
        full, left = step.part.seconds * self._settings.slow, self._left()
        limit = min(full, left)
        result = step.result(outcome="failed", limit=round(limit, 1))
        self._running, began = result, time.monotonic()
        child.order(Order(part=step.part.name, seconds=limit, log=step.key))
        died = False
        try:
            ended = self._listen(step, child, result, began + limit)
            died = not ended
        except TimeoutError:
            ended = False
            child.say_where()
            result.message = f"did not end within {limit:.0f} s (where it was is in its log)"
            if left < full:
                # It had less time than it may take: that says nothing against it.
                result.outcome = "not run"
                result.message = f"did not end within the {left:.0f} s that were left"
        except Interrupted:
            result.seconds = round(time.monotonic() - began, 3)
            child.end()
            for report in child.reports_left():
                self._take(report, step, result)
            raise
        result.seconds = round(time.monotonic() - began, 3)
        if not ended:
            # Before the part counts as done: its log is complete then, and nothing of it runs.
            for each in child.end():
                self._saw(each, step)
            outcome, message = result.outcome, result.message
            for report in child.reports_left():
                self._take(report, step, result)
            result.outcome, result.message = outcome, message
            if self._settings.runtime == "docker":
                self._remove_containers(step)
        if died:
            last = self._logs.last_line(step.key)
            result.message = f"its process {child.how_it_ended()}"
            result.message += f"; the last line of its log: {last[:300]}" if last else ""
        self._running = None
        self._done(step, result)
        return ended

    def _listen(self, step: Step, child: Child, result: PartResult, until: float) -> bool:
        """Takes reports until the part has ended; false where the child has.

        Raises:
            TimeoutError: neither has.
        """
        while True:
            report = child.next_report(until - time.monotonic())
            if report is None:
                return False
            if self._take(report, step, result):
                return True

    def _take(self, report: dict[str, Any], step: Step, result: PartResult | None) -> bool:
        """Takes one report of a child; true for the one that ends the part.

        Args:
            result: of the part that runs; ``None`` after the last one.
        """
        kind = report["kind"]
        if kind == "secret":
            self._record.keep_secret(report["value"])
        elif kind == "no server":
            self._no_server.setdefault(step.version, {})[report["asked"]] = report["why"]
        elif kind == "saw":
            self._saw(report["text"], step)
        elif result is None:
            pass  # A thread of a part that has ended.
        elif kind == "put":
            result.figures[report["key"]] = report["value"]
        elif kind == "note":
            result.notes.append(Note.model_validate({k: report[k] for k in Note.model_fields}))
        elif kind == "headline":
            result.headline = report["text"]
        elif kind == "end":
            result.outcome, result.message = report["outcome"], report["message"]
            result.figures |= report["figures"]
            return True
        return False

    def _close(self, child: Child, step: Step) -> None:
        """Lets the child end its server, then itself."""
        child.no_more()
        within = CLOSES_WITHIN * self._settings.slow
        until = time.monotonic() + within
        try:
            while (report := child.next_report(until - time.monotonic())) is not None:
                self._take(report, step, None)
        except TimeoutError:
            self._saw(f"its server was not ended within {within:.0f} s: killed", step)
        else:
            if (how := child.how_it_ended()) != bounded.ending(0):
                self._saw(f"the child process {how} after its last part", step)

    def _look_after(self, child: Child, step: Step) -> None:
        """Ends a child with everything of it, and sees to what it left."""
        self._tidy(child, step)
        for each in self._left_on_gpus():
            self._saw(each, step)
        self._write()

    def _tidy(self, child: Child, step: Step) -> None:
        """Ends a child, and removes what it left on this machine; the log of its server is kept."""
        for each in child.end():
            self._saw(each, step)
        shared_memory.remove({child.pid, *child.seen}, child.started_at)
        for folder in temporary.left_by(child.pid):
            log = folder / "server.log"
            if log.exists():
                text = log.read_text(encoding="utf-8", errors="replace")
                name = f"{step.key}-{folder.name.rsplit('-', 1)[-1]}-server.log"
                write_whole(self._record.folder / PARTS / name, self._record.redact(text))
            for each in temporary.remove(folder):
                self._saw(each, step)

    def _remove_containers(self, step: Step) -> None:
        """Those of a child that was killed are still there: they are not below this process."""
        swept = sweep()
        for each in swept.removed:
            self._saw(f"{each} was left, and removed", step)
        for each in swept.failed:
            self._saw(f"not removed: {each}", step)

    def _saw(self, what: str, step: Step) -> None:
        note = f"After {step.key}: {what}"
        if note not in self._results.notes:
            self._results.notes.append(note)
            self._say(f"         {note}")

    def _done(self, step: Step, result: PartResult) -> None:
        parts = self._record.folder / PARTS
        own = [self._logs.file(step.key), *parts.glob(f"{step.key}-server*.log")]
        own += [each for each in (parts / step.key).rglob("*") if each.is_file()]
        result.files = sorted(str(f.relative_to(self._record.folder)) for f in own if f.exists())
        for file in own:
            if file.exists() and record.left_out(file) and file.suffix not in record.CHECKPOINTS:
                name = file.relative_to(self._record.folder)
                self._saw(f"{name} has {file.stat().st_size >> 20} MiB: not in the archive", step)
        self._figures[step.part.name, step.version] = result.figures
        self._results.parts.append(result)
        self._write()
        self._say(self._record.redact(summary.line(result)))

    def _interrupted(self, error: Interrupted) -> None:
        """Says of the part that ran and of those that were to come why there is no more of them."""
        for step in self._steps[len(self._results.parts) :]:
            result, self._running = self._running, None
            if result is not None:
                result.outcome = "not run"
                result.message = f"{error} after {result.seconds:.1f} s"
            self._done(step, result or step.result(outcome="not run", message=str(error)))
        self._results.ended = f"It was {error} after {self._passed():.0f} s."
        self._write()

    def _write(self) -> None:
        """What cannot be written is said once, and tried again after the next part: the terminal
        has a line of each part all the same."""
        try:
            self._record.write(self._results, summary.page(self._results))
        except HarnessError as error:
            if self._unwritten is None:
                self._say(str(error))
            self._unwritten = error
        else:
            self._unwritten = None
