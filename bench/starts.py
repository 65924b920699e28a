"""What does a server cost, cold and warm?

* Cold and warm starts in turns, from the call to the first real generation: the same spec, the
  same image; the parent of the warm ones is there already, and its own start is a figure too.
* Four warm servers of one parent together: the memory of their container.
* Two tests of a user's own, whole commands, from the shell to its prompt: with a parent kept
  (``sglang-harness warm``), without one, and cold (``--sglang-start cold``, as it was before).
* ``--full``: the profile 'full' with the tiny model, whole commands, cold and warm.

Prints a table and writes ``bench/results/``.

    python bench/starts.py [--rounds 5] [--full]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_harness._base import host
from sglang_harness.memory.host.container import parse
from sglang_harness.runtime import engine
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec

RESULTS = Path(__file__).parent / "results"

TOGETHER = 4

TESTS = """
def test_it_answers(generate):
    assert generate("Hello", max_new_tokens=4).completion_tokens == 4


def test_new_weights_are_served(generate, push_weights):
    before = generate("Hello", max_new_tokens=8)
    push_weights("tiny:7", version="step-1")
    after = generate("Hello", max_new_tokens=8)
    assert after.weight_version == "step-1"
    assert after.output_ids != before.output_ids
"""

HARNESS = [sys.executable, "-c", "from sglang_harness.cli import main; main()"]


def one_start(runtime: DockerRuntime, **fields: Any) -> float:
    """Seconds from the call to the first generation."""
    began = time.monotonic()
    server = Server.start(ServerSpec(model="tiny", **fields), runtime=runtime)
    took = time.monotonic() - began
    assert server.running.started.how == fields.get("start", "warm"), server.running.started
    server.stop(at_once=True)
    return took


def starts(rounds: int) -> dict[str, Any]:
    runtime = DockerRuntime()
    found: dict[str, Any] = {"cold_seconds": [], "warm_seconds": [], "warm_tensor_2_seconds": []}
    with runtime.keeping_parents():
        first = one_start(runtime)
        for _ in range(rounds):
            found["cold_seconds"].append(one_start(runtime, start="cold"))
            found["warm_seconds"].append(one_start(runtime))
            found["warm_tensor_2_seconds"].append(one_start(runtime, server_args={"tp-size": 2}))
        found["first_with_its_parent_seconds"] = first
        found["together"] = together(runtime)
    found["times_faster"] = statistics.median(found["cold_seconds"]) / statistics.median(
        found["warm_seconds"]
    )
    return found


def together(runtime: DockerRuntime) -> dict[str, Any]:
    """Several warm servers at once: how long until all answer, and what they hold."""
    began = time.monotonic()
    with ThreadPoolExecutor(TOGETHER) as pool:
        servers = list(
            pool.map(
                lambda _: Server.start(ServerSpec(model="tiny"), runtime=runtime), range(TOGETHER)
            )
        )
    took = time.monotonic() - began
    try:
        (container,) = {server.about()["container"] for server in servers}
        client = engine.connect()
        used, parts = parse(client.api.stats(container, stream=False, one_shot=True))
        client.close()
        shares = [server.memory.mark("together")[0].used_bytes for server in servers]
    finally:
        for server in servers:
            server.stop(at_once=True)
    return {
        "servers": TOGETHER,
        "seconds": took,
        "container_bytes": used,
        "container_parts": parts,
        "proportional_share_bytes": shares,
    }


def command(words: Sequence[str], folder: Path, expect: int = 0) -> float:
    began = time.monotonic()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-2000:]
    return time.monotonic() - began


def two_tests(rounds: int) -> dict[str, list[float]]:
    """Whole pytest runs of two tests, from the command to the prompt."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found: dict[str, list[float]] = {"cold": [], "without_a_kept_parent": [], "with_one": []}
    with tempfile.TemporaryDirectory(prefix="bench-starts-") as name:
        folder = Path(name)
        (folder / "test_mine.py").write_text(TESTS)
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        for _ in range(rounds):
            found["cold"].append(command([*pytest, "--sglang-start", "cold"], folder))
            found["without_a_kept_parent"].append(command(pytest, folder))
            command([*HARNESS, "warm"], folder)
            try:
                found["with_one"].append(command(pytest, folder))
            finally:
                command([*HARNESS, "down"], folder)
    return found


def full() -> dict[str, float]:
    """The profile 'full', whole commands."""
    words = [*HARNESS, "qualify", "--model", "tiny", "--profile", "full"]
    with tempfile.TemporaryDirectory(prefix="bench-starts-") as name:
        folder = Path(name)
        return {
            "cold_seconds": command([*words, "--start", "cold"], folder),
            "warm_seconds": command(words, folder),
        }


def show(result: dict[str, Any]) -> None:
    table = Table(header_style="bold")
    for column in ("figure", "median", "samples"):
        table.add_column(column)

    def row(name: str, seconds: list[float]) -> None:
        told = ", ".join(f"{s:.1f}" for s in seconds)
        table.add_row(name, f"{statistics.median(seconds):.2f} s", told)

    each = result["starts"]
    row("cold start to the first generation", each["cold_seconds"])
    row("warm start to the first generation", each["warm_seconds"])
    row("warm, two tensor ranks", each["warm_tensor_2_seconds"])
    row("the first warm one, with its parent", [each["first_with_its_parent_seconds"]])
    table.add_row("warm is faster", f"{each['times_faster']:.1f} times", "")
    four = each["together"]
    table.add_row(
        f"{four['servers']} warm servers together",
        f"{four['container_bytes'] / 2**30:.2f} GiB",
        f"all answer after {four['seconds']:.1f} s",
    )
    for name, seconds in result["two_tests"].items():
        row(f"two tests, {name.replace('_', ' ')}", seconds)
    for name, seconds in result.get("full", {}).items():
        row(f"profile full, {name.removesuffix('_seconds')}", [seconds])
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    result = {
        "bench": "starts",
        "date": date.today().isoformat(),
        "machine": host.describe(),
        "load_before": load,
        "model": "tiny",
        "starts": starts(options.rounds),
        "two_tests": two_tests(max(1, options.rounds // 2)),
        **({"full": full()} if options.full else {}),
    }
    show(result)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"starts-tiny-{platform.machine()}-{os.cpu_count()}cpu.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
