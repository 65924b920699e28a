"""Parts of gpu-check that do what a part must never do. A table, as the child processes import it.

What a part starts writes its process id to a file of the folder of results, so that a test can see
whether it lives.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from sglang_harness.errors import HarnessError
from sglang_harness.gpu_check.part import Context, NotHere, Part


def holds(context: Context) -> dict[str, Any]:
    context.note("memory", "what was asked", "42 MiB")
    context.headline("42 MiB of 42")
    return {"answer": 42, "not a number": math.nan, "where": Path("/somewhere")}


def asserts(context: Context) -> dict[str, Any]:
    context.put("seen", 7)
    assert context.settings.slow > 100, "7 bytes are in use, expected 0"
    return {}


def asserts_nothing(context: Context) -> dict[str, Any]:
    assert context.settings.slow > 100
    return {}


def is_not_here(context: Context) -> dict[str, Any]:
    raise NotHere("no second kitchen")


def breaks(context: Context) -> dict[str, Any]:
    raise KeyError("a name")


def harness_error(context: Context) -> dict[str, Any]:
    raise HarnessError("The pan is hot.", advice="Wait.")


def leaves_by_exit(context: Context) -> dict[str, Any]:
    sys.exit("enough")


STUBBORN = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if os.fork():
    os._exit(0)            # its parent is gone, and so is its place in the tree
os.setsid()
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(600)
"""


def start_stubborn(context: Context) -> int:
    """A grandchild that ignores every polite signal and has left its parent and its session."""
    file = context.settings.out / "stubborn.pid"
    subprocess.Popen([sys.executable, "-c", STUBBORN, str(file)])
    while not file.exists() or not file.read_text():
        time.sleep(0.02)
    return int(file.read_text())


def hangs(context: Context) -> dict[str, Any]:
    context.put("before", start_stubborn(context))
    context.note("death", "seen before it hung", "yes")
    (context.settings.out / "hung").touch()
    time.sleep(600)
    return {"never": True}


def hangs_deaf(context: Context) -> dict[str, Any]:
    """As in a call of the driver: no signal handler of Python runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    print("the last line before the silence")
    time.sleep(600)
    return {}


def leaves_a_process(context: Context) -> dict[str, Any]:
    return {"pid": start_stubborn(context)}


def is_killed(context: Context) -> dict[str, Any]:
    context.put("before", 1)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def is_killed_with_a_fork(context: Context) -> dict[str, Any]:
    """A fork holds everything open that its parent had open."""
    if not os.fork():
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def segfaults(context: Context) -> dict[str, Any]:
    context.put("before", 2)
    ctypes.string_at(0)
    return {}


def exits_at_once(context: Context) -> dict[str, Any]:
    os._exit(0)


def dies_afterwards(context: Context) -> dict[str, Any]:
    """Its process ends when the part has ended well."""
    import threading

    def later() -> None:
        time.sleep(0.3)
        os._exit(7)

    threading.Thread(target=later).start()
    return {"pid": os.getpid()}


def waits_a_moment(context: Context) -> dict[str, Any]:
    time.sleep(1.0)
    return {"pid": os.getpid()}


def talks(context: Context) -> dict[str, Any]:
    line = "x" * 1023 + "\n"
    for _ in range(12 << 10):
        sys.stdout.write(line)
    sys.stdout.write("y" * (300 << 10))  # and no end of the line
    sys.stdout.flush()
    os.write(2, b"the last of many words")
    return {}


def takes_the_input(context: Context) -> dict[str, Any]:
    """What it starts reads its standard input to the end."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.stdin.read()))"], timeout=20
    )
    return {"code": done.returncode}


def whispers(context: Context) -> dict[str, Any]:
    """Secrets, by every way out."""
    key = os.environ["MADE_UP_API_KEY"]
    context._report({"kind": "secret", "value": "0123456789abcdef" * 4})
    told = f"{key} and {'0123456789abcdef' * 4}"
    print(told)
    (context.out / "own.txt").write_text(told)
    (context.out / "weights.safetensors").write_bytes(b"0" * 100)
    (context.out / "huge.txt").write_bytes(b"0" * (17 << 20))
    context.note("weights", "with", told)
    context.headline(told)
    context.put(told, told)
    raise AssertionError(told)


def pid(context: Context) -> dict[str, Any]:
    return {"pid": os.getpid(), "earlier": context.earlier("pid"), "left": context.left()}


def imports_torch(context: Context) -> dict[str, Any]:
    import torch

    return {"file": torch.__file__}


def server_of(context: Context, **more: Any) -> dict[str, Any]:
    """The shared server, as it says of itself."""
    server = context.server(model="owner/name", **more)
    with urllib.request.urlopen(f"{server.address}/about", timeout=10) as answer:
        return {**json.load(answer), "at": server.address}


def has_a_server(context: Context) -> dict[str, Any]:
    return server_of(context)


def has_another_server(context: Context) -> dict[str, Any]:
    return server_of(context, server_args={"other": True})


def has_no_server(context: Context) -> dict[str, Any]:
    return server_of(context, server_args={"refuses-to-start": True})


def hangs_with_a_server(context: Context) -> dict[str, Any]:
    for key, value in server_of(context).items():
        context.put(key, value)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    time.sleep(600)
    return {}


def leaves_it_unfit(context: Context) -> dict[str, Any]:
    told = server_of(context)
    server = context.server(model="owner/name")
    server.weights.unfit = "the session is open, and could not be closed"
    return told


def has_a_slow_server(context: Context) -> dict[str, Any]:
    return server_of(context, server_args={"takes-its-time": True})


def finds_flags(context: Context) -> dict[str, Any]:
    return {"server_args": {"found": "yes", "release": "found"}}


def would_start(context: Context) -> dict[str, Any]:
    spec = context.spec(model="owner/name", server_args={"own": 1})
    return {"spec": spec.model_dump(exclude_unset=True), "caveats": context.runtime().caveats}


def _part(name: str, run: Any, seconds: float = 20.0, **more: Any) -> Part:
    return Part(name, f"What becomes of {name}?", seconds, run, **more)


PARTS = (
    _part("holds", holds),
    _part("asserts", asserts, group="errors"),
    _part("asserts-nothing", asserts_nothing, group="errors"),
    _part("is-not-here", is_not_here, group="errors"),
    _part("breaks", breaks, group="errors"),
    _part("harness-error", harness_error, group="errors"),
    _part("leaves-by-exit", leaves_by_exit, group="errors"),
    _part("hangs", hangs, 3.0, group="hang"),
    _part("after-hangs", pid, group="hang"),
    _part("hangs-deaf", hangs_deaf, 2.0, group="hang"),
    _part("leaves-a-process", leaves_a_process),
    _part("is-killed", is_killed, group="crash"),
    _part("is-killed-with-a-fork", is_killed_with_a_fork, group="crash"),
    _part("segfaults", segfaults, group="crash"),
    _part("exits-at-once", exits_at_once, group="crash"),
    _part("after-crashes", pid, group="crash"),
    _part("dies-afterwards", dies_afterwards, group="between"),
    _part("after-a-death", pid, group="between"),
    _part("waits-a-moment", waits_a_moment, group="moment"),
    _part("talks", talks),
    _part("takes-the-input", takes_the_input, group="input"),
    _part("after-the-input", pid, group="input"),
    _part("whispers", whispers),
    _part("pid", pid, group="pids"),
    _part("pid-again", pid, group="pids"),
    _part("imports-torch", imports_torch),
    _part("on-cuda", pid, needs=frozenset({"cuda"})),
    _part("on-two", pid, needs=frozenset({"two gpus"})),
    _part("large", pid, disk_bytes=1 << 60),
    _part("long", waits_a_moment, 4000.0, least=3000.0),
    _part("serves", pid, scope="release", group="serving"),
    _part("serves-more", pid, scope="release", group="serving"),
    _part("has-a-server", has_a_server, scope="release", group="server"),
    _part("has-it-still", has_a_server, scope="release", group="server"),
    _part("has-another", has_another_server, scope="release", group="server"),
    _part("hangs-with-it", hangs_with_a_server, 6.0, scope="release", group="server"),
    _part("has-a-fresh-one", has_a_server, scope="release", group="server"),
    _part("leaves-it-unfit", leaves_it_unfit, scope="release", group="fit"),
    _part("has-a-fit-one", has_a_server, scope="release", group="fit"),
    _part("has-no-time", has_a_slow_server, 8.0, scope="release", group="slow"),
    _part("has-time", has_a_slow_server, 40.0, scope="release", group="slow"),
    _part("has-none", has_no_server, scope="release", group="none"),
    _part("has-none-again", has_no_server, scope="release", group="none"),
    _part("has-none-in-another-process", has_no_server, scope="release"),
    _part("server-flags", finds_flags, scope="release", group="flags"),
    _part("would-start", would_start, scope="release"),
    _part("at-last", pid, scope="last"),
)
