"""A package ``sglang`` that a preloaded parent can import in a second: what it forks does what its
arguments say, so that ends and crashes can be had at will. It generates nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sglang_harness.runtime.warm.protocol import Recipe

LAUNCH = '''
import mmap, multiprocessing, os, signal, sys, threading, time

words = sys.argv[1:]
print("argv", words, flush=True)
print("TMPDIR", os.environ.get("TMPDIR"), os.environ.get("GIVEN"), flush=True)


def say(line):
    # In one piece: the server and its child write to one log, and print writes word by word.
    os.write(1, f"{line}\\n".encode())


def segment():
    """As SGLang makes them: mapped for as long as the process lives."""
    name = f"/dev/shm/sglang_loads_test_{os.getpid()}_{time.time_ns()}.shm"
    file = os.open(name, os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 4096)
    return mmap.mmap(file, 4096), name


def child():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    held = segment()
    say(f"segment {held[1]}")
    time.sleep(600)


if "exit" in words:
    sys.exit(int(words[-1]))
if "raise" in words:
    raise RuntimeError("broken on purpose")
if "signal" in words:
    os.kill(os.getpid(), int(words[-1]))
# As SGLang does it: asked for, and made to do nothing by the parent.
multiprocessing.set_start_method("spawn", force=True)
process = multiprocessing.Process(target=child, daemon=True)
process.start()
signal.signal(signal.SIGTERM, lambda *_: os._exit(0 if "stubborn" not in words else 7))
if "stubborn" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.path.join(os.environ["TMPDIR"], "left"), "w").close()
say(f"serving {process.pid}")
while True:
    time.sleep(600)
'''


def made(folder: Path, *, http_server: str = "", missing: str = "") -> Path:
    """Writes the package; returns the folder for ``PYTHONPATH``.

    Args:
        http_server: code that runs when the server's module is imported.
        missing: a module that this version does not have.
    """
    site = folder / "site"
    for name, text in {
        "sglang/__init__.py": '__version__ = "9.9.9"\n',
        "sglang/launch_server.py": LAUNCH,
        "sglang/srt/__init__.py": "",
        "sglang/srt/entrypoints/__init__.py": "",
        "sglang/srt/entrypoints/http_server.py": http_server,
        "sglang/srt/managers/__init__.py": "",
        "sglang/srt/managers/scheduler.py": "",
        "sglang/srt/managers/detokenizer_manager.py": "",
        "sglang/srt/managers/data_parallel_controller.py": "",
        "sglang/srt/models/__init__.py": "",
        "sglang/srt/models/registry.py": "",
        # Importing the real one takes a second; a parent only looks for this.
        "torch/__init__.py": "",
        "torch/multiprocessing.py": "from multiprocessing import *\n",
    }.items():
        if name == missing:
            continue
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return site


def recipe(site: Path) -> Recipe:
    """Of a parent that imports this package, in this Python."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1"}
    return Recipe(sys.executable, tuple(sorted(environment.items())), version="9.9.9")
