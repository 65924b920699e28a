"""How soon is it noticed that a server is ready, and that one has died?

Three ways to wait, on the same container at the same time:

* ours (``wait_until_ready``: ``/ready`` every 50 ms, and a thread that waits for the end);
* Testcontainers' ``HttpWaitStrategy`` on ``/ready`` (on ``/health``, which takes a second at
  least, it never succeeds: 4.15 gives each look one second, and no way to give more);
* a poller that looks every 10 s, the way SGLang's own test utilities wait.

The truth for readiness is a prober that asks ``/ready`` every 2 ms; for death it is the time
that the engine writes down. Prints a table and writes ``bench/results/``.

    python bench/readiness.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table
from testcontainers.core.wait_strategies import HttpWaitStrategy

from sglang_harness import checkpoint
from sglang_harness._base import host
from sglang_harness.runtime import engine
from sglang_harness.runtime.docker import SGLangServerContainer, prepare
from sglang_harness.server.readiness import wait_until_ready
from sglang_harness.spec import ServerSpec

OURS, TESTCONTAINERS, TEN_SECONDS = "sglang-harness", "HttpWaitStrategy", "poll every 10 s"
#: How long the others may wait for a server that is dead.
GIVE_UP = 45
RESULTS = Path(__file__).parent / "results"


def container() -> SGLangServerContainer:
    spec = ServerSpec(model="tiny")
    device, image = prepare(spec, print)
    model = checkpoint.locate(spec.model, print)
    return SGLangServerContainer(spec, model=model, image=image, device=device)


def ours(server: SGLangServerContainer) -> float:
    started = time.monotonic()
    report = wait_until_ready(
        server.address,
        api_key=server.api_key,
        watch=server.watch,
        limit=300,
        started=started,
    )
    return started + report.ready_after


def testcontainers(server: SGLangServerContainer) -> float:
    strategy = HttpWaitStrategy(30000, "/ready").for_status_code(200)
    strategy.with_startup_timeout(GIVE_UP if server.doomed else 300).wait_until_ready(server)  # type: ignore[attr-defined]
    return time.monotonic()


def every_ten_seconds(server: SGLangServerContainer) -> float:
    """SGLang's ``popen_launch_server``: is the process there, does /health_generate answer."""
    while True:
        if server.watch.death is not None:
            return time.monotonic()
        with suppress(requests.RequestException):
            headers = {"Authorization": f"Bearer {server.api_key}"}
            url = f"{server.address_for_bench}/health_generate"  # type: ignore[attr-defined]
            if requests.get(url, headers=headers, timeout=5).status_code == 200:
                return time.monotonic()
        time.sleep(10)


WAITERS: dict[str, Callable[[SGLangServerContainer], float]] = {
    OURS: ours,
    TESTCONTAINERS: testcontainers,
    TEN_SECONDS: every_ten_seconds,
}


def wait_in_threads(
    server: SGLangServerContainer,
) -> tuple[dict[str, float], list[threading.Thread]]:
    """Starts every waiter; each one's moment of noticing (or giving up) lands in the result."""
    noticed: dict[str, float] = {}

    def run(name: str, wait: Callable[[SGLangServerContainer], float]) -> None:
        try:
            noticed[name] = wait(server)
        except Exception as error:
            # However it gives up, that is the moment its caller hears of it.
            noticed[name] = time.monotonic()
            print(f"  {name}: {type(error).__name__}")

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in WAITERS.items()]
    for thread in threads:
        thread.start()
    return noticed, threads


def ready_round() -> dict[str, float]:
    """Seconds from the first 200 of /ready to each waiter's noticing."""
    server = container()
    server.doomed = False  # type: ignore[attr-defined]
    server.start()
    try:
        server.address_for_bench = server.address  # type: ignore[attr-defined]
        noticed, threads = wait_in_threads(server)
        session = requests.Session()
        session.trust_env = False
        while True:
            with suppress(requests.RequestException):
                if session.get(f"{server.address_for_bench}/ready", timeout=5).status_code == 200:  # type: ignore[attr-defined]
                    break
            time.sleep(0.002)
        truth = time.monotonic()
        for thread in threads:
            thread.join(timeout=120)
        for name in WAITERS:  # one that has not noticed by now: counted as the whole wait
            noticed.setdefault(name, time.monotonic())
        # Two probers race within a millisecond or two: ours may be the first to see it.
        return {name: max(0.0, moment - truth) for name, moment in noticed.items()}
    finally:
        server.end()


def death_round(after: float) -> dict[str, float]:
    """Seconds from the container's end to each waiter's noticing, killed while starting."""
    server = container()
    server.doomed = True  # type: ignore[attr-defined]
    server.start()
    try:
        server.address_for_bench = server.address  # type: ignore[attr-defined]
        noticed, threads = wait_in_threads(server)
        time.sleep(after)
        wrapped = server.get_wrapped_container()
        wrapped.kill()
        wrapped.reload()
        truth = time.monotonic() - (engine.seconds_since(wrapped.attrs["State"]["FinishedAt"]) or 0)
        for thread in threads:
            thread.join(timeout=GIVE_UP + 5)
        # One that has not noticed by now never will: counted as the whole wait.
        for name in WAITERS:
            noticed.setdefault(name, time.monotonic())
        return {name: max(0.0, moment - truth) for name, moment in noticed.items()}
    finally:
        server.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    samples: dict[str, dict[str, list[float]]] = {"ready": {}, "death": {}}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}: ready")
        for name, seconds in ready_round().items():
            samples["ready"].setdefault(name, []).append(seconds)
        print(f"round {number + 1} of {rounds}: death")
        # At different moments of the pollers' rhythm.
        for name, seconds in death_round(4.0 + 3.3 * number).items():
            samples["death"].setdefault(name, []).append(seconds)
    show(samples, rounds)


def show(samples: dict[str, dict[str, list[float]]], rounds: int) -> None:
    machine = host.describe()
    rows: list[dict[str, Any]] = []
    table = Table(title=f"Seconds until noticed, {rounds} rounds, {machine['processor']}")
    for column in ("what", "who", "median", "worst", "times ours"):
        table.add_column(column, justify="left" if column in ("what", "who") else "right")
    for what, by_name in samples.items():
        own = statistics.median(by_name[OURS])
        for name in WAITERS:
            seconds = by_name[name]
            median, worst = statistics.median(seconds), max(seconds)
            ratio = median / max(own, 0.001)
            rows.append(
                {"what": what, "who": name, "seconds": seconds, "median": median, "worst": worst}
            )
            table.add_row(what, name, f"{median:.3f}", f"{worst:.3f}", f"{ratio:.0f}")
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"readiness-{platform.machine()}-{machine['cpus']}cpu.json"
    data = {"date": date.today().isoformat(), "rounds": rounds, "machine": machine, "rows": rows}
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
