"""One question of gpu-check, as data and a function.

A part is a function of a :class:`~sglang_harness.gpu_check.context.Context` that returns figures::

    def release(context: Context) -> dict[str, Any]:
        server = context.server(model="tiny")
        ...
        assert after < before, f"{after} bytes are still in use, expected fewer than {before}"
        context.note("memory", "freed after the answer", f"{seconds:.2f} s")
        return {"before": before, "after": after}

How it ends is its outcome:

=================  ===============================================================
it returns         ``held``
``NotHere``        ``not run``, with the reason
``AssertionError`` ``failed``, with its message
``HarnessError``   ``failed``, with its message
anything else      ``failed``, with type and message; the traceback is in the log
=================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sglang_harness.gpu_check.context import Context
from sglang_harness.gpu_check.outcomes import TOPICS, NotHere, Outcome, Topic

__all__ = ["TOPICS", "Context", "Need", "NotHere", "Outcome", "Part", "Scope", "Topic"]

#: What a part needs; where it is missing the part is ``not run``, and is not started.
#:
#: ``cuda``: a GPU; never in a rehearsal. Whether torch can use it, Context.torch() finds out.
#: ``release``: an SGLang to start servers with.
#: ``two gpus``: a second GPU.
Need = Literal["cuda", "release", "two gpus"]

#: When a part runs. ``once``: before all others, without a release. ``release``: for each release,
#: all parts of one before those of the next. ``last``: for each release, when all others have run.
Scope = Literal["once", "release", "last"]


@dataclass(frozen=True)
class Part:
    """One question.

    Attributes:
        name: as ``--part`` names it; small letters and dashes.
        asks: the question, one sentence that ends with a question mark.
        seconds: it may take at most, on an H100 with nothing else to do. ``--slow`` multiplies it.
        run: see the module's description.
        needs: what has to be here.
        group: consecutive parts of the same group (and release) run in one child process, and
            share its servers. Empty: a child process of its own.
        scope: when it runs.
        disk_bytes: it needs so much disk in the harness's cache, where models are made, and in
            ``settings.models``; with less the part is ``not run``.
        least: seconds without which starting it is no use; ``None``: a quarter of ``seconds``.
    """

    name: str
    asks: str
    seconds: float
    run: Callable[[Context], dict[str, Any]]
    needs: frozenset[Need] = field(default_factory=frozenset)
    group: str = ""
    scope: Scope = "once"
    disk_bytes: int = 0
    least: float | None = None

    def fair_share(self) -> float:
        """Seconds, before ``--slow``, below which the part is not started."""
        return self.seconds / 4 if self.least is None else self.least


def as_markdown(parts: Sequence[Part]) -> str:
    """The table of docs/gpu-check.md."""
    rows = [f"| `{part.name}` | {part.asks} | {part.seconds:.0f} |" for part in parts]
    return "\n".join(["| part | question | seconds at most |", "|---|---|---|", *rows])
