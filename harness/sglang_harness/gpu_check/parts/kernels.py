"""SGLang's own kernels beside plain torch, and the library that pauses GPU memory."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness._base import headroom
from sglang_harness.gpu_check.part import NotHere, Part
from sglang_harness.gpu_check.release_program import ReleaseProgram

if TYPE_CHECKING:
    from sglang_harness.gpu_check.context import Context

MIB = 1 << 20

PROGRAM = Path(__file__).resolve().parent.parent / "kernels_beside_torch.py"

#: The exit code of the program after a kernel that left CUDA unusable.
UNUSABLE = 77

#: Processes that compile and compare at a time, at most; and bytes of host memory that each may
#: take (torch with CUDA and SGLang, and nvcc beside it).
PROCESSES, EACH_BYTES = 14, 4 << 30

#: Seconds that are kept for writing down what was seen.
KEPT = 5.0

#: Rounds in which what a broken kernel kept from running is run again, and seconds without which
#: another one is not begun: it imports torch and compiles.
ROUNDS, ANOTHER_ROUND = 6, 25.0


# --- judging --------------------------------------------------------------------------------------


def unfinished(plan: Mapping[int, str], rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Numbers of the kernels of a plan that have no row yet."""
    done = {int(row["number"]) for row in rows}
    return [number for number in plan if number not in done]


def blamed(number: int, name: str, why: str) -> dict[str, Any]:
    """The row of a kernel during which the program ended."""
    return {"number": number, "kernel": name, "outcome": "failed", "why": f"the program {why}"}


def judged(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What is wrong with the kernels, and why not all of them were run; each may be empty."""
    if not rows:
        return "no kernel was compared", ""
    bad = [row for row in rows if row["outcome"] in ("wrong", "failed", "missing")]
    left = [row for row in rows if row["outcome"] == "not run"]
    wrong = "; ".join(f"{row['kernel']} {row['outcome']}: {row.get('why', '')}" for row in bad)
    lacking = f"{left[0]['why']} ({len(left)} of {len(rows)} kernels)" if left else ""
    return wrong, lacking


def in_one_line(rows: Sequence[Mapping[str, Any]], seconds: float) -> str:
    counts = Counter(str(row["outcome"]) for row in rows)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    compiled = [row for row in rows if row.get("made") == "nvcc" and row.get("first_seconds")]
    slowest = max((float(row["first_seconds"]) for row in compiled), default=0.0)
    return (
        f"{len(rows)} kernels: {told}; {seconds:.0f} s with compilation"
        f", the slowest compiled one {slowest:.0f} s"
    )


# --- running --------------------------------------------------------------------------------------


def processes(cpus: int, available: int) -> int:
    """How many are run at a time. Args: processors, and bytes of host memory that are free."""
    return max(1, min(PROCESSES, cpus - 1, available // EACH_BYTES))


def compare(context: Context) -> dict[str, Any]:
    """The part ``kernels``: a row for each kernel, compiled and compared in several processes."""
    began, seen = time.monotonic(), Compared()
    count = processes(os.cpu_count() or 1, headroom.memory().available)
    context.put("processes", count)
    orders: list[list[str]] = [["--share", f"{n}/{count}"] for n in range(count)]
    again = 0
    while orders and again < ROUNDS and (again == 0 or context.left() > ANOTHER_ROUND):
        orders = _round(context, orders, again, seen)
        context.put("rows", seen.ordered())
        again += 1
    for number in unfinished(seen.plan, seen.rows):
        row = {"number": number, "kernel": seen.plan[number], "outcome": "not run"}
        seen.rows.append(row | {"why": "kernels broke the processes that were to run it"})
    rows = seen.ordered()
    context.put("rows", rows)
    seconds = time.monotonic() - began
    context.put("seconds_in_all", round(seconds, 1))
    context.headline(line := in_one_line(rows, seconds))
    context.note("kernels", "beside torch", line)
    wrong, lacking = judged(rows)
    if seen.broken:
        wrong = "; ".join([*([wrong] if rows and wrong else []), seen.broken[0]])
    assert not wrong, wrong
    if lacking:
        raise NotHere(lacking)
    return {}


@dataclass
class Compared:
    """What is known so far.

    Attributes:
        plan: names of kernels by their numbers.
        rows: how each did.
        broken: processes that ended before they had said what they will compare.
    """

    plan: dict[int, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def ordered(self) -> list[dict[str, Any]]:
        return sorted(self.rows, key=lambda row: int(row["number"]))


def _visible(context: Context) -> dict[str, str]:
    """CUDA's first device is then the one that NVML is asked about: they count differently."""
    return {"CUDA_VISIBLE_DEVICES": context.settings.gpus[0]} if context.settings.gpus else {}


def _round(
    context: Context, orders: list[list[str]], again: int, seen: Compared
) -> list[list[str]]:
    """Runs programs side by side until all have ended; returns what has to be run again."""
    until = time.monotonic() + max(1.0, context.left() - KEPT)
    device = "cuda" if context.on_gpu else "cpu"
    running = [
        ReleaseProgram(
            context.release,
            PROGRAM,
            ["--device", device, *words],
            out=context.out,
            name=f"kernels-{again}-{number}",
            environment=_visible(context),
        )
        for number, words in enumerate(orders)
    ]
    following = []
    try:
        for program in running:
            how = program.wait(until - time.monotonic())
            told = program.told()
            its_plan = {int(n): str(k) for each in told for n, k in each.get("plan", {}).items()}
            its_rows = [each for each in told if "number" in each]
            seen.plan |= its_plan
            seen.rows += its_rows
            if how:
                context.say(f"{program.name} {how}\n{program.last_words()}")
            if how and not its_plan:
                seen.broken.append(f"{program.name} {how}: {program.last_words(3)}")
            left = unfinished(its_plan, its_rows)
            if left and program.process.returncode != UNUSABLE:
                seen.rows.append(blamed(left[0], its_plan[left[0]], how or "left it out"))
                left = left[1:]
            if left:
                following.append([str(number) for number in left])
    finally:
        for program in running:
            program.end()
    return following


# --- the memory saver -----------------------------------------------------------------------------


def saver_judged(steps: Sequence[Mapping[str, Any]], size: int) -> str:
    """What is wrong with memory that was allocated, paused and resumed; empty where nothing is.

    Args:
        steps: ``empty``, ``allocated``, ``paused`` and ``resumed``, each with ``nvml`` and ``used``
            (bytes in use by NVML and by the CUDA driver) and ``same_address``.
        size: bytes that were allocated.
    """
    told = {str(step["step"]): step for step in steps}
    missing = [name for name in ("empty", "allocated", "paused", "resumed") if name not in told]
    if missing:
        return f"the program ended before memory was {missing[0]}"
    changes = (("empty", "allocated", 1), ("allocated", "paused", -1), ("paused", "resumed", 1))
    for before, after, sign in changes:
        for by in ("nvml", "used"):
            change = sign * (int(told[after][by]) - int(told[before][by]))
            if not abs(change - size) <= size // 16:
                seen = "NVML" if by == "nvml" else "the CUDA driver"
                return (
                    f"{after}: expected {size // MIB} MiB {'more' if sign > 0 else 'less'} in use "
                    f"than {before}, {seen} sees {change // MIB}"
                )
    if not told["resumed"]["same_address"]:
        return "what was resumed is at another address"
    return ""


def followed(
    nvml: Callable[[], int], first: Sequence[Mapping[str, Any]], step: Mapping[str, Any]
) -> tuple[int, float]:
    """NVML's figure once it has moved since the first step as the CUDA driver's has, or after
    ``FOLLOWS_WITHIN`` seconds; and how many seconds that took.

    Args:
        first: the first step, with both figures; empty where this is the first.
    """
    began = time.monotonic()
    while True:
        used, took = nvml(), time.monotonic() - began
        moves = [(int(step["used"]) - int(one["used"]), used - int(one["nvml"])) for one in first]
        if took > FOLLOWS_WITHIN or all(abs(a - b) <= SIZE // 16 for a, b in moves):
            return used, round(took, 3)
        time.sleep(0.01)


#: Seconds by which NVML's figure may come after the CUDA driver's.
FOLLOWS_WITHIN = 2.0


#: What ``torch_memory_saver`` preloads is asked of the package itself: the name of its library
#: differs between versions.
ENVIRONMENT = """
import json, os, torch_memory_saver
before = dict(os.environ)
with torch_memory_saver.configure_subprocess():
    changed = {k: v for k, v in os.environ.items() if before.get(k) != v}
print(json.dumps({"environment": changed}))
"""


def pause(context: Context) -> dict[str, Any]:
    """The part ``memory-saver``: 2 GiB are allocated, paused and resumed, seen by NVML."""
    from sglang_harness.memory.gpu.driver import Driver

    preloaded = context.out / "environment.py"
    preloaded.write_text(ENVIRONMENT, encoding="utf-8")
    with ReleaseProgram(
        context.release, preloaded, [], out=context.out, name="environment"
    ) as asked:
        how = asked.wait(min(60.0, context.left()))
        if "No module named 'torch_memory_saver'" in asked.last_words(1):
            raise NotHere("this SGLang has no torch_memory_saver")
        assert not how, f"torch_memory_saver: asking for its library {how}: {asked.last_words(3)}"
        environment = {k: str(v) for k, v in asked.told()[-1]["environment"].items()}
    context.put("environment", environment)
    uuid = context.settings.gpus[0]
    steps: list[dict[str, Any]] = []
    with (
        Driver() as driver,
        ReleaseProgram(
            context.release,
            PROGRAM,
            ["--memory-saver"],
            out=context.out,
            name="memory-saver",
            environment={**environment, **_visible(context)},
        ) as program,
    ):
        while (step := program.next_line(len(steps), min(60.0, context.left()))) is not None:
            step["nvml"], step["nvml_follows_within"] = followed(
                lambda: driver.memory(uuid).used, steps[:1], step
            )
            steps.append(step)
            context.put("steps", steps)
            program.go_on()
        how = program.wait(min(10.0, context.left()))
        assert not how, f"the program {how}: {program.last_words(4)}"
    wrong = saver_judged(steps, SIZE)
    assert not wrong, wrong
    paused, resumed = steps[2], steps[3]
    line = f"2 GiB paused in {paused['seconds']:.3f} s, resumed in {resumed['seconds']:.3f} s"
    context.headline(line)
    context.note("memory", "torch_memory_saver", line)
    return {}


#: As ``kernels_beside_torch.PAUSED``.
SIZE = 2 << 30

KERNELS = Part(
    name="kernels",
    asks="Do SGLang's own kernels compute what plain torch computes?",
    seconds=150,
    run=compare,
    needs=frozenset({"cuda", "release"}),
    scope="release",
    least=40,
)

MEMORY_SAVER = Part(
    name="memory-saver",
    asks="Does the memory saver give memory back to the GPU, and take it again?",
    seconds=45,
    run=pause,
    needs=frozenset({"cuda", "release"}),
    scope="release",
    least=15,
)
