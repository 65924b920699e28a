"""What a person reads: each check as it ends, then the verdict."""

from __future__ import annotations

import io
import time

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.status import Status
from rich.table import Table

from sglang_harness.verdict import CheckResult, Outcome, Verdict

STYLE = {
    Outcome.PASS: ("✓", "green"),
    Outcome.FAIL: ("✗", "bold red"),
    Outcome.ERROR: ("!", "bold magenta"),
    Outcome.KNOWN: ("≈", "yellow"),
    Outcome.FIXED: ("★", "cyan"),
    Outcome.NOT_RUN: ("○", "bold magenta"),
}


def plain(text: str) -> str:
    """``text`` without control characters: what a model says must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Terminal:
    """Prints a line for each step and each check, with the time since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._status: Status | None = None

    def _clock(self) -> str:
        return f"[dim]{time.monotonic() - self._began:6.1f}s[/dim]"

    def say(self, message: str) -> None:
        self._rest()
        self._print(f"{self._clock()}   {escape(message)}")
        self._work(message)

    def begin(self, check_id: str, number: int, total: int) -> None:
        self._work(f"{check_id} ({number} of {total})")

    def end(self, result: CheckResult) -> None:
        self._rest()
        first, *rest = _lines(result)
        self._print(f"{self._clock()} {first}")
        for line in rest:
            self._print(line)

    def _print(self, line: str) -> None:
        _print(self._console, line)

    def _work(self, message: str) -> None:
        # A CI log gets no spinner, which would fill it with control sequences.
        if self._console.is_terminal:
            self._rest()
            self._status = self._console.status(escape(message))
            self._status.start()

    def _rest(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def close(self) -> None:
        self._rest()


def _lines(result: CheckResult) -> list[str]:
    """One check as rich's markup: its line, and its message below."""
    sign, style = STYLE[result.outcome]
    line = f"[{style}]{sign}[/{style}] {escape(result.id)} [dim]{result.seconds:.1f}s[/dim]"
    if result.outcome is not Outcome.PASS:
        about = f" ({escape(result.known_defect)})" if result.known_defect else ""
        line += f" [{style}]{result.outcome.value}{about}[/{style}]"
    if not result.message:
        return [line]
    style = "dim" if result.outcome is Outcome.KNOWN else "default"
    shown = result.message if len(result.message) < 700 else result.message[:700] + " …"
    return [line, f"          [{style}]{escape(shown)}[/{style}]"]


def _print(console: Console, line: str) -> None:
    # Unwrapped outside a terminal: a CI log and a file are searched by line.
    console.print(plain(line), highlight=False, soft_wrap=not console.is_terminal)


def text(verdict: Verdict) -> str:
    """The same as a file: every check, then what :func:`show` shows, without colours."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False, color_system=None)
    for check in verdict.checks:
        for line in _lines(check):
            _print(console, line)
    show(verdict, console)
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue()


def show(verdict: Verdict, console: Console) -> None:
    """The verdict: figures, what is outside the profile, and the result with its reason."""
    if verdict.figures:
        table = Table(title="Figures", title_justify="left", header_style="bold", expand=False)
        table.add_column("figure")
        table.add_column("median", justify="right")
        table.add_column("unit")
        table.add_column("samples", justify="right")
        table.add_column("better")
        for figure in verdict.figures:
            row = (figure.name, f"{figure.value:.4g}", figure.unit, str(len(figure.samples)))
            table.add_row(*(escape(cell) for cell in row), figure.better)
        console.print(table)
    if verdict.outside_profile:
        console.print("[bold]Outside the profile[/bold]")
        for outside in verdict.outside_profile:
            line = f"  {escape(outside.id)}: {escape(plain(outside.reason))}"
            console.print(line, highlight=False, soft_wrap=not console.is_terminal)
    counts = {o: sum(c.outcome is o for c in verdict.checks) for o in Outcome}
    told = ", ".join(f"{n} {o.value}" for o, n in counts.items() if n) or "no checks"
    style = {"pass": "green", "fail": "red", "error": "magenta"}[verdict.verdict]
    model = verdict.model.get("name")
    lines = [
        f"[bold {style}]{verdict.verdict.upper()}[/bold {style}]  "
        f"profile {verdict.profile}: {told}"
        + (f", {len(verdict.outside_profile)} outside" if verdict.outside_profile else ""),
        *([escape(plain(verdict.reason))] if verdict.reason else []),
        escape(
            f"SGLang {verdict.sglang_version or 'unknown'}, {model}, "
            f"{verdict.device.get('kind')}, runtime {verdict.runtime}; "
            f"start {sum(p.seconds for p in verdict.phases):.1f} s, "
            f"checks {sum(c.seconds for c in verdict.checks):.1f} s, "
            f"all {verdict.seconds:.1f} s"
        ),
        *([escape(starts)] if (starts := _starts(verdict)) else []),
        *(f"[dim]{escape(caveat)}[/dim]" for caveat in verdict.caveats),
    ]
    console.print(Panel("\n".join(lines), border_style=style, expand=False))


def _starts(verdict: Verdict) -> str:
    """How many servers were started, and how; empty for one that was started as usual."""
    how = [start.how for start in verdict.servers]
    if len(how) < 2 and "warm" not in how:
        return ""
    told = [f"{how.count(each)} {each}" for each in ("cold", "warm") if each in how]
    plural = "server" if len(how) == 1 else "servers"
    seconds = sum(start.seconds for start in verdict.servers)
    return f"{len(how)} {plural} started ({', '.join(told)}) in {seconds:.1f} s"
