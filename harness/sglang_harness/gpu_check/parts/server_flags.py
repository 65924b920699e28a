"""With which flags a server comes up and answers right: the fewest fallbacks first."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sglang_harness.errors import HarnessError
from sglang_harness.gpu_check.part import NotHere, Part
from sglang_harness.spec import Argument

if TYPE_CHECKING:
    from sglang_harness.gpu_check.context import Context
    from sglang_harness.oracle import Scores
    from sglang_harness.server import Server

MIB = 1 << 20


@dataclass(frozen=True)
class Rung:
    """Flags to try beside those of the release.

    Attributes:
        without: what a server started so does not have.
    """

    flags: Mapping[str, Argument]
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"without {', '.join(self.without)}" if self.without else "everything on"


#: CUDA graphs of the prefill are compiled piece by piece, of the decoding captured: either can fail
#: alone. 0.5.15 to 0.5.23 have both flags.
_NO_PREFILL = {"cuda-graph-backend-prefill": "disabled"}
_NO_GRAPHS = {**_NO_PREFILL, "cuda-graph-backend-decode": "disabled"}
_SAVER = {"enable-memory-saver": True}
_NO_OVERLAP = {"disable-overlap-schedule": True}

LADDER: dict[Literal["gpu", "cpu"], tuple[Rung, ...]] = {
    # The memory saver is given up late: without it nothing is to be seen of release and resume.
    "gpu": (
        Rung(_SAVER),
        Rung({**_SAVER, **_NO_PREFILL}, ("prefill graphs",)),
        Rung({**_SAVER, **_NO_GRAPHS}, ("CUDA graphs",)),
        Rung({}, ("memory saver",)),
        Rung(_NO_PREFILL, ("memory saver", "prefill graphs")),
        Rung(_NO_GRAPHS, ("memory saver", "CUDA graphs")),
        Rung({**_NO_GRAPHS, **_NO_OVERLAP}, ("memory saver", "CUDA graphs", "overlap schedule")),
        Rung(
            {**_NO_GRAPHS, **_NO_OVERLAP, "attention-backend": "torch_native"},
            ("memory saver", "CUDA graphs", "overlap schedule", "an attention kernel"),
        ),
    ),
    "cpu": (Rung({}),),
}

#: Where a start takes longer than this (seconds), graphs of fewer sizes are captured from then on:
#: each part of the check starts servers of its own.
SLOW_START = 60.0
FEWER_GRAPHS: dict[str, Argument] = {
    "cuda-graph-max-bs-decode": 32,
    "cuda-graph-max-bs-prefill": 512,
}

#: Seconds without which another start is not tried, and those of one start at most.
LEAST, ONE_START = 20.0, 120.0

#: Last lines of a log that are kept of a start that failed.
LAST_LINES = 12

TOKENS = 8
PROMPT = "In the beginning there was a checkpoint"


@dataclass
class Tried:
    """One start.

    Attributes:
        outcome: ``right``: it came up, and its answer is the reference model's.
        phases: seconds of the start, by phase.
        last_lines: of the log of one that failed.
        passes: it failed for want of time, or because of its GPU: other flags change nothing.
    """

    name: str
    server_args: dict[str, Argument]
    outcome: Literal["right", "wrong answer", "did not start"] = "did not start"
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    why: str = ""
    last_lines: list[str] = field(default_factory=list)
    passes: bool = False
    server: dict[str, Any] = field(default_factory=dict)


# --- judging --------------------------------------------------------------------------------------


def wrong_answer(ids: Sequence[int], scores: Scores, tolerance: float) -> str:
    """Where a greedy answer leaves the reference model; empty where it does not.

    Args:
        tolerance: nats that a log-probability may be off; a near tie is within twice of it.
    """
    if len(ids) != TOKENS:
        return f"expected {TOKENS} tokens, got {len(ids)}"
    for place, (token, its, best, best_is) in enumerate(
        zip(ids, scores.logprobs, scores.best_logprobs, scores.best_ids, strict=True)
    ):
        if token != best_is and not best - its <= 2 * tolerance:
            return (
                f"token {place}: expected {best_is}, the reference model's, got {token}, "
                f"{best - its:.3f} nats less probable"
            )
    return ""


def configuration(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a server says of how it runs, by the names of ``/server_info`` (SGLang 0.5.15 to
    0.5.23); those that it does not have are left out."""
    names = (
        "version",
        "dtype",
        "attention_backend",
        "prefill_attention_backend",
        "decode_attention_backend",
        "sampling_backend",
        "grammar_backend",
        "mem_fraction_static",
        "max_total_num_tokens",
        "chunked_prefill_size",
        "cuda_graph_config",
        "cuda_graph_backend_decode",
        "cuda_graph_backend_prefill",
        "disable_cuda_graph",
        "enable_memory_saver",
        "disable_overlap_schedule",
        "disable_radix_cache",
    )
    return {name: info[name] for name in names if info.get(name) is not None}


def in_one_line(chosen: Tried, failed: Sequence[Tried]) -> str:
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in chosen.phases.items())
    before = f"; {len(failed)} starts before it failed" if failed else ""
    return f"{chosen.name}, up in {chosen.seconds:.1f} s ({phases}){before}"


# --- starting -------------------------------------------------------------------------------------


def choose(context: Context) -> dict[str, Any]:
    """The part ``server-flags``. Its figure ``server_args`` is used by all parts after it."""
    tried: list[Tried] = []
    chosen: Tried | None = None
    for rung in LADDER[context.settings.device]:
        if context.left() < LEAST * context.settings.slow:
            context.say(f"{rung.name}: not tried, {context.left():.0f} s are left")
            break
        tried.append(_try(context, rung.name, dict(rung.flags), len(tried)))
        context.put("tried", tried)
        if tried[-1].outcome == "right":
            chosen = tried[-1]
        if chosen or tried[-1].passes:
            break
    if len(tried) == 1 and tried[0].passes:
        raise NotHere(f"the server had no chance to start: {tried[0].why}")
    assert chosen is not None, _why_none(tried)
    context.put("server_args", chosen.server_args)
    if _takes_long(context, chosen):
        flags = {**chosen.server_args, **FEWER_GRAPHS}
        tried.append(_try(context, f"{chosen.name}, graphs of fewer sizes", flags, len(tried)))
        context.put("tried", tried)
        if tried[-1].outcome == "right" and tried[-1].seconds < chosen.seconds:
            chosen = tried[-1]
    failed = [each for each in tried if each.outcome != "right"]
    context.headline(line := in_one_line(chosen, failed))
    context.note("serving", "flags", line)
    memory = chosen.server.get("nvml_mib")
    if memory:
        context.note("serving", "GPU memory before the start, and ready", f"{memory} MiB")
    return {"server_args": chosen.server_args, "chosen": chosen.name, **chosen.server}


def _why_none(tried: Sequence[Tried]) -> str:
    reasons = "; ".join(f"{each.name}: {each.why}" for each in tried)
    return f"expected a server that comes up and answers right; {reasons or 'no start was tried'}"


def _takes_long(context: Context, chosen: Tried) -> bool:
    graphs = context.on_gpu and "cuda-graph-backend-decode" not in chosen.server_args
    slow = chosen.seconds > SLOW_START * context.settings.slow
    return graphs and slow and context.left() > 1.5 * chosen.seconds


def _try(context: Context, name: str, flags: dict[str, Argument], number: int) -> Tried:
    from sglang_harness.gpu_check.servers import passes
    from sglang_harness.server import Server

    given = context.settings.server_args
    row = Tried(name, {key: value for key, value in flags.items() if key not in given})
    began = time.monotonic()
    slow = context.settings.slow
    context.say(f"{name}: {row.server_args}")
    within = max(1.0, min(context.left() - 5.0, ONE_START * slow))
    try:
        spec = context.spec(server_args={**row.server_args, **given})
        with Server.start(
            spec, runtime=context.runtime(), say=context.say, within=within
        ) as server:
            row.seconds = round(time.monotonic() - began, 2)
            row.phases = {each.name: round(each.seconds, 2) for each in server.report.phases}
            row.why = _ask(server, row)
            row.outcome = "wrong answer" if row.why else "right"
            (context.out / f"server-{number}.log").write_text(server.logs(), encoding="utf-8")
    except HarnessError as error:
        row.outcome, row.why = "did not start", error.message
        row.passes = passes(error, within, slow)
        row.seconds = round(time.monotonic() - began, 2)
        if log := getattr(error, "log", ""):
            row.last_lines = log.strip().splitlines()[-LAST_LINES:]
            (context.out / f"server-{number}.log").write_text(log, encoding="utf-8")
    context.say(f"{name}: {row.outcome} after {row.seconds:.1f} s {row.why}")
    return row


def _ask(server: Server, row: Tried) -> str:
    """What is wrong with its answer; notes how it runs."""
    from sglang_harness import oracle
    from sglang_harness.memory.analysis.explained import said

    info = server.client.server_info()
    row.server = {"server": configuration(info)}
    readings = {r.mark: round(r.used_bytes / MIB) for r in server.memory.readings if _of_gpu(r)}
    if readings:
        row.server["nvml_mib"] = readings
    row.server["says_mib"] = {
        name: None if value is None else round(value / MIB)
        for name, value in vars(said(info)).items()
    }
    assert server.model is not None, "it serves a model of this machine"
    reference = oracle.for_folder(server.model)
    prompt = reference.encode(PROMPT)
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    answer = server.client.generate(prompt, sampling=sampling)
    ids = list(answer.output_ids)
    tolerance = oracle.tolerance(str(info.get("dtype", "")))
    return wrong_answer(ids, reference.score(prompt, ids), tolerance) if ids else "no tokens"


def _of_gpu(reading: Any) -> bool:
    return bool(reading.source == "nvml")


PART = Part(
    name="server-flags",
    asks="With which flags does a server come up and answer right?",
    seconds=300,
    run=choose,
    needs=frozenset({"release"}),
    scope="release",
    least=30,
)
