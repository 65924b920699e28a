"""Leases of a GPU, wanted by several processes at once."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from typing import Any

from sglang_harness._base import bounded
from sglang_harness.gpu_check import probes
from sglang_harness.gpu_check.part import Context, Part

PROCESSES = 6


def run(context: Context) -> dict[str, Any]:
    """Processes that all want the same GPU have it one after another."""
    with tempfile.TemporaryDirectory(dir=context.settings.models) as folder:
        environment = {**os.environ, "SGLANG_HARNESS_GPU_LEASES": folder}
        within = max(5.0, context.left() - 3.0)
        children = [
            subprocess.Popen(
                probes.command("lease", str(number), f"{within:.0f}"),
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for number in range(PROCESSES)
        ]
        try:
            told = []
            for child in children:
                output, _ = child.communicate(timeout=max(1.0, context.left() - 2.0))
                assert child.returncode == 0, (
                    f"a process that wanted the GPU {bounded.ending(child.returncode)}"
                )
                told.append(probes.read(output.strip(), "a process that wanted the GPU"))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not every process had the GPU within {within:.0f} s") from None
        finally:
            for child in children:
                if child.poll() is None:
                    bounded.end(child)
    spans = sorted((one["from"], one["to"]) for one in told)
    waited = max(one["waited"] for one in told)
    context.headline(f"{len(told)} processes one after another, the last waited {waited:.2f} s")
    for (_, ended), (began, _) in itertools.pairwise(spans):
        assert began >= ended, f"two had it at once: {spans}"
    return {
        "processes": len(told),
        "longest_wait_seconds": waited,
        "uuid": told[0]["uuid"],
    }


PART = Part(
    "leases",
    "Do six processes that want the same GPU have it one after another?",
    40.0,
    run,
    needs=frozenset({"cuda"}),
    group="driver",
)
