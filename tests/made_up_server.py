"""A package ``sglang`` that answers a generation and does nothing else, for the runtime 'process'.

It prints its key as SGLang does, and starts a process of its own that ends only when it is killed.
"""

from __future__ import annotations

import sys
from pathlib import Path

LAUNCH = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

words = dict(w.split("=", 1) if "=" in w else (w, "") for w in sys.argv[1:])
port = int(sys.argv[sys.argv.index("--port") + 1])
print("server_args=ServerArgs(api_key=%r)" % words["--api-key"], flush=True)
if "--refuses-to-start" in sys.argv:
    print("ValueError: this flag is not for this GPU", flush=True)
    sys.exit(1)
if "--takes-its-time" in sys.argv:
    time.sleep(10)
below = subprocess.Popen(["sleep", "600"], start_new_session=True)
print("scheduler", below.pid, flush=True)
# Open for as long as it lives, as SGLang has it.
shared = open("/dev/shm/sglang_loads_%s_%x.shm" % (os.urandom(6).hex(), os.getpid()), "w")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"pid": os.getpid(), "scheduler": below.pid})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        meta = {"id": "a", "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0,
                "finish_reason": {"type": "length", "length": 2}, "weight_version": "default"}
        self.answer({"text": "ab", "output_ids": [1, 2], "meta_info": meta})


def end(*_):
    below.kill()
    os._exit(0)


signal.signal(signal.SIGTERM, end)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def python(folder: Path) -> Path:
    """A Python that has it."""
    (folder / "site" / "sglang").mkdir(parents=True)
    (folder / "site" / "sglang" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    (folder / "site" / "sglang" / "launch_server.py").write_text(LAUNCH)
    made = folder / "python-with-sglang"
    made.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/site exec {sys.executable} "$@"\n')
    made.chmod(0o755)
    return made
