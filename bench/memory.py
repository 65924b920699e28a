"""What does it cost to watch GPU memory, and is a leak told from noise?

* sampling 8 devices at 10 Hz: share of one core (goal: under 1%);
* a planted leak of 2 MB a cycle, in 20 cycles, under noise: found in how many runs (goal: all);
* no leak, the same noise: claimed in how many of 200 runs (goal: none).

The driver is the mock of the tests, so this says what the harness costs, and not what a real
driver takes for its answers: ``make gpu-check`` measures that. Writes ``bench/results/``.

    PYTHONPATH=tests python bench/memory.py [--seconds 20]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from rich.console import Console
from rich.table import Table

from nvml_mock import GIB, Device, Scenario, installed
from sglang_harness._base import host
from sglang_harness.memory import MemoryLedger
from sglang_harness.memory.analysis.leak import MB, slope
from sglang_harness.memory.gpu.nvml import NvmlMemory

RESULTS = Path(__file__).parent / "results"
DEVICES, CYCLES, RUNS = 8, 20, 200
PAGE = 2 << 20

#: Noise of a kind that memory has, in bytes; ``chance`` makes one run of it.
Noise = Callable[[random.Random], list[float]]
NOISE: dict[str, Noise] = {
    "gaussian, 3 MB": lambda c: [c.gauss(0, 3 * MB) for _ in range(CYCLES)],
    "pages of 2 MiB": lambda c: [PAGE * round(c.gauss(0, 1.5)) for _ in range(CYCLES)],
    "drifting (AR 0.5), 2 MB": lambda c: _drifting(c, 0.5, 2 * MB),
    "spikes of 512 MB": lambda c: [
        512 * MB if c.random() < 0.1 else c.gauss(0, MB) for _ in range(CYCLES)
    ],
    "one step of 64 MB": lambda c: _step(c),
}
#: Where a leak of 2 MB a cycle has to be found; under spikes it is found when they let it.
QUIET = ("gaussian, 3 MB", "pages of 2 MiB", "drifting (AR 0.5), 2 MB")


def _drifting(chance: random.Random, keeps: float, loud: float) -> list[float]:
    values, now = [], 0.0
    for _ in range(CYCLES):
        now = keeps * now + chance.gauss(0, loud)
        values.append(now)
    return values


def _step(chance: random.Random) -> list[float]:
    where = chance.randrange(1, CYCLES)
    return [(64 * MB if n >= where else 0) + chance.gauss(0, MB) for n in range(CYCLES)]


def sampling(seconds: float) -> dict[str, Any]:
    source = NvmlMemory()
    ledger = MemoryLedger([source])
    source.read()
    cpu, wall = time.process_time(), time.monotonic()
    sampler = ledger.watch(source)
    time.sleep(seconds)
    ledger.close()
    share = (time.process_time() - cpu) / (time.monotonic() - wall)
    source.close()
    return {"share_of_a_core": share, "samples": sampler.taken, "missed": sampler.missed}


def leaks() -> list[dict[str, Any]]:
    rows = []
    for kind, noise in NOISE.items():
        chance = random.Random(f"bench {kind}")  # noqa: S311 -- the same each time
        claimed = sum(slope(noise(chance)).leaks for _ in range(RUNS))
        planted = [[v + n * 2 * MB for n, v in enumerate(noise(chance))] for _ in range(RUNS)]
        found = sum(slope(values).leaks for values in planted)
        rows.append({"noise": kind, "runs": RUNS, "claimed": claimed, "found": found})
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=20.0)
    seconds = options.parse_args().seconds
    devices = [Device(f"GPU-{number}", base=number * GIB) for number in range(DEVICES)]
    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(Path(folder) / "scenario", devices)
        scenario.processes.update({(d.uuid, 1000 + n): GIB for n, d in enumerate(devices)})
        with installed(scenario):
            cost = sampling(seconds)
    rows = leaks()

    table = Table("what", "measured", "goal")
    table.add_row("8 devices at 10 Hz", f"{cost['share_of_a_core']:.2%} of a core", "under 1%")
    for row in rows:
        goal = "all" if row["noise"] in QUIET else ""
        table.add_row(f"leak under {row['noise']}", f"{row['found']} of {RUNS} found", goal)
        table.add_row(f"no leak, {row['noise']}", f"{row['claimed']} of {RUNS} claimed", "none")
    Console().print(table)
    result = {
        "date": date.today().isoformat(),
        "machine": host.describe(),
        "load": os.getloadavg()[0],
        "driver": "mock: no GPU",
        "sampling": cost,
        "leaks": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"memory-{platform.machine()}-{os.cpu_count()}cpu.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
