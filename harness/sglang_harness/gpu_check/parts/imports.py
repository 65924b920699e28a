"""Whether SGLang's server can be imported, and has every kernel that it calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from sglang_harness._base import bounded
from sglang_harness.gpu_check.context import Context
from sglang_harness.gpu_check.part import NotHere, Part

#: Runs in the release's Python.
SCRIPT = Path(__file__).with_name("imported.py")

#: As servers on the CPU are started; read when their Python starts.
ON_CPU = {"SGLANG_USE_CPU_ENGINE": "1", "TORCH_COMPILE_DISABLE": "1"}

SEEN = {
    "gpu": "on this GPU",
    "pretended": "with an H100 pretended",
    "cpu": "for the CPU; sgl_kernel was not asked, it is a stand-in",
}


def run(context: Context) -> dict[str, Any]:
    """Raises :class:`NotHere` where the release is no Python of this machine, AssertionError where
    something cannot be imported, is missing, or is called with what it does not take."""
    release = context.release
    if release is None or release.python is None:
        raise NotHere("the release is not a Python of this machine")
    words = [str(release.python), "-c", SCRIPT.read_text(encoding="utf-8"), context.settings.device]
    try:
        done = bounded.run(
            words,
            within=context.left() - 1.0,
            cwd=context.out,
            environment={**os.environ, **({} if context.on_gpu else ON_CPU)},
            merged=True,
            line=context.say,
        )
    except subprocess.TimeoutExpired as error:
        last = str(error.output).splitlines()[-1:]
        raise AssertionError(f"the imports did not end in {error.timeout:.0f} s: {last}") from None
    told = answer(done.output)
    if done.code != 0 or not told:
        raise AssertionError(
            f"SGLang {release.version} cannot be imported: exit code {done.code}, "
            f"{reason(done.output)}"
        )
    judge(told)
    seconds = sum(told["seconds"].values())
    symbols = f", {len(told['symbols'])} symbols of sgl_kernel" if "symbols" in told else ""
    context.headline(f"{told['architectures']} models{symbols}, {SEEN[told['kind']]}")
    context.note("kernels", f"SGLang {release.version} is imported in", f"{seconds:.1f} s")
    return told


def answer(output: list[str]) -> dict[str, Any]:
    """What the script told; empty where it did not come so far. Libraries write lines after it when
    the process ends."""
    for line in reversed(output):
        if line.startswith('{"kind":'):
            with suppress(ValueError):
                return dict(json.loads(line))
    return {}


def reason(output: list[str]) -> str:
    """The exception that ended the script, or the last that it said."""
    raised = [line for line in output if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return (raised or output or ["no output"])[-1]


def judge(told: dict[str, Any]) -> None:
    """Raises AssertionError for what does not hold of what the script told."""
    lacking = [name for name, there in told["models"].items() if not there]
    assert not lacking, f"SGLang {told['sglang']} does not register {', '.join(lacking)}"
    if told["kind"] == "cpu":
        return
    # An SGLang that calls nothing of it is one in which the search found nothing.
    assert told["symbols"], "not one call of sgl_kernel was found in SGLang's modules"
    wrong = [*told["missing"], *told["misfits"]]
    assert not wrong, f"{len(wrong)} calls of sgl_kernel cannot work: {'; '.join(wrong)}"


PART = Part(
    "imports",
    "Is everything that SGLang's server imports and calls of its kernels there?",
    120.0,
    run,
    needs=frozenset({"release"}),
    scope="release",
)
