"""What does the pytest plugin cost?

* A session of 20 tests that each push other weights: server starts, and seconds of putting the
  first weights back after each, beside what a restart of the same server takes (which is what a
  fixture that starts a server for every test pays each time).
* A pytest run of one empty test that uses none of the fixtures: with the plugin and without
  (``-p no:sglang-harness``), in turns, whole processes.

Prints a table and writes ``bench/results/``.

    python bench/plugin.py [--model tiny] [--runs 15]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_harness import checkpoint
from sglang_harness._base import host
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.sharing.shared_server import LocalKeeper, SessionServer
from sglang_harness.spec import ServerSpec

TESTS = 20
RESULTS = Path(__file__).parent / "results"


def session(model: str) -> dict[str, object]:
    """Seconds of each start, and of each look with putting back, of one session."""
    other = checkpoint.locate("tiny:7" if model == "tiny" else model, print)
    assert other is not None
    keeper = LocalKeeper(ServerSpec(model=model), DockerRuntime())
    lender = SessionServer(keeper)
    try:
        for number in range(TESTS):
            with lender.lent(f"test {number}") as server:
                client = server.client
                client.flush_cache()
                client.update_weights_from_disk(
                    str(server.reach.share(other)), weight_version=f"step-{number}"
                )
        back = list(keeper.tally.restored)
        starts = len(keeper.tally.starts)
        server, _ = keeper.server()
        began = time.monotonic()
        keeper.replace(server, "to see what a restart takes")
        keeper.server()
        restart = time.monotonic() - began
    finally:
        keeper.close()
    return {
        "tests": TESTS,
        "starts": starts,
        "restart_seconds": restart,
        "put_back_seconds": back,
        "put_back_median_part_of_a_restart": statistics.median(back) / restart,
    }


def empty_run(folder: Path, *words: str) -> float:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=folder, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return time.monotonic() - began


def overhead(runs: int) -> dict[str, object]:
    """Seconds of an empty run with and without the plugin, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_empty.py").write_text("def test_nothing(): pass\n")
        without, with_plugin = [], []
        for _ in range(runs + 1):
            without.append(empty_run(Path(folder), "-p", "no:sglang-harness"))
            with_plugin.append(empty_run(Path(folder)))
    # The first of each only warms the disk's cache.
    differences = [b - a for a, b in zip(without[1:], with_plugin[1:], strict=True)]
    return {
        "runs": runs,
        "without_seconds": statistics.median(without[1:]),
        "with_seconds": statistics.median(with_plugin[1:]),
        "added_milliseconds_median": 1000 * statistics.median(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    added, used = overhead(options.runs), session(options.model)
    result = {
        "bench": "plugin",
        "date": date.today().isoformat(),
        "machine": host.describe(),
        "model": options.model,
        "session": used,
        "empty_run": added,
    }
    table = Table(title="pytest plugin", header_style="bold")
    for name in ("figure", "value", "goal"):
        table.add_column(name)
    back = used["put_back_seconds"]
    assert isinstance(back, list)
    part = used["put_back_median_part_of_a_restart"]
    table.add_row(f"server starts of {TESTS} tests", str(used["starts"]), "1")
    table.add_row("restart", f"{used['restart_seconds']:.1f} s", "")
    table.add_row("putting back, median", f"{statistics.median(back):.3f} s", "")
    table.add_row("putting back, part of a restart", f"{100 * part:.2f} %", "at most 5 %")
    table.add_row(
        "added to an empty run, median", f"{added['added_milliseconds_median']:.0f} ms", "50 ms"
    )
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    cpus = host.describe()["cpus"]
    name = f"plugin-{options.model}-{platform.machine()}-{cpus}cpu.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
