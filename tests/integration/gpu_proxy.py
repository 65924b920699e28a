"""A real server on the CPU, made to look as if it ran on a GPU.

A proxy stands in front of it and hands every request on. What a release or a resume would do to a
GPU, the proxy does to the mock driver: honestly, or not, as :class:`Conduct` says. So the checks
that need a GPU ask a real SGLang, through the real client, with the real binding to NVML.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

from nvml_mock import GIB, MIB, Scenario
from sglang_harness.runtime import Order, Started
from sglang_harness.server import Server

UUID = "GPU-a"
#: What the server is said to hold, and what CUDA itself takes. Bytes.
HELD = {"weights": 2 * GIB, "kv_cache": 20 * GIB, "cuda_graph": GIB // 4}
CONTEXT = 600 * MIB
ALL_TAGS = list(HELD)


@dataclass
class Conduct:
    """What the server does with its GPU, beside what it says. The defaults are honest.

    Attributes:
        saver: it says that it was started with the memory saver.
        releases: by tag, the part of it that a release frees.
        resumes: by tag, the part of it that a resume takes again.
        late: seconds from the answer to a release until the memory is free.
        keeps: bytes that each release leaves behind for ever.
        pushes: a push is handed on; otherwise it is only said to have succeeded.
        says: what it says it holds, where that is not what it holds.
        leaves: it gives the GPU back when it ends.
        before_answer: called before a release is answered.
    """

    saver: bool = True
    releases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(HELD, 1.0))
    resumes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(HELD, 1.0))
    late: float = 0.3
    keeps: int = 0
    pushes: bool = True
    says: dict[str, int] = field(default_factory=lambda: dict(HELD))
    leaves: bool = True
    before_answer: Callable[[], None] = lambda: None


class GpuProxy:
    """Between a client and ``real``; ``url`` is where to ask."""

    def __init__(self, real: Server, conduct: Conduct, scenario: Scenario) -> None:
        self.conduct = conduct
        self._real = real
        self._scenario = scenario
        self._lock = threading.Lock()
        self._on_gpu = dict(HELD)
        self._kept = 0
        self._timers: list[threading.Timer] = []
        self.seen: list[str] = []
        """Calls that came, in their order, with their tags."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, kind, answer = owner.answer(self.command, self.path, self.headers, body)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = _any  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        for timer in self._timers:
            timer.join()
        self._server.shutdown()
        self._server.server_close()

    # --- the GPU ------------------------------------------------------------------------------

    def load(self) -> None:
        """The server comes up: all that it holds is on the GPU."""
        with self._lock:
            self._on_gpu = dict(HELD)
            self._show()

    def unload(self) -> None:
        """The server ends."""
        if self.conduct.leaves:
            self._scenario.use(UUID, os.getpid(), 0)

    def _show(self) -> None:
        used = CONTEXT + self._kept + sum(self._on_gpu.values())
        self._scenario.use(UUID, os.getpid(), used)

    def _release(self, tags: list[str]) -> None:
        def free() -> None:
            with self._lock:
                for tag in tags:
                    self._on_gpu[tag] = int(HELD[tag] * (1 - self.conduct.releases[tag]))
                self._kept += self.conduct.keeps
                self._show()

        timer = threading.Timer(self.conduct.late, free)
        self._timers.append(timer)
        timer.start()

    def _resume(self, tags: list[str]) -> None:
        for timer in self._timers:
            timer.join()
        with self._lock:
            for tag in tags:
                self._on_gpu[tag] = max(
                    self._on_gpu[tag], int(HELD[tag] * self.conduct.resumes[tag])
                )
            self._show()

    # --- HTTP ---------------------------------------------------------------------------------

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, str, bytes]:
        route = path.partition("?")[0]
        tags = []
        if route in ("/release_memory_occupation", "/resume_memory_occupation"):
            tags = json.loads(body).get("tags") or ALL_TAGS
        self.seen.append(f"{route} {'+'.join(tags)}".strip())
        if route == "/update_weights_from_disk" and not self.conduct.pushes:
            said = {"success": True, "message": "Succeeded to update model weights."}
            return 200, "application/json", json.dumps(said).encode()
        real = requests.request(
            method,
            self._real.address + path,
            data=body or None,
            headers={k: v for k, v in headers.items() if k.lower() not in ("host", "connection")},
            timeout=120,
        )
        answer = real.content
        if real.ok and route == "/server_info":
            answer = self._as_on_a_gpu(real.json())
        if real.ok and route == "/release_memory_occupation":
            self.conduct.before_answer()
            self._release(tags)
        if real.ok and route == "/resume_memory_occupation":
            self._resume(tags)
        return real.status_code, real.headers.get("Content-Type", "text/plain"), answer

    def _as_on_a_gpu(self, info: dict[str, Any]) -> bytes:
        info["enable_memory_saver"] = self.conduct.saver
        says = {tag: round(held / GIB, 3) for tag, held in self.conduct.says.items()}
        info["internal_states"][0]["memory_usage"] = {
            "weight": says["weights"],
            "kvcache": says["kv_cache"],
            "graph": {"decode": says["cuda_graph"], "prefill": 0.0},
        }
        return json.dumps(info).encode()


class OnGpu:
    """The real server as a :class:`sglang_harness.runtime.Running` with a GPU. It ends alone:
    the real one goes on."""

    runtime = "proxy"
    device = "gpu"
    started = Started("cold")
    owned = True
    may_change = True

    def __init__(self, real: Server, proxy: GpuProxy, run_id: str, *, host_memory: bool) -> None:
        self.proxy = proxy
        self.run_id = run_id
        self.model = real.model
        self.arguments = real.running.arguments
        self.address = proxy.url
        self.api_key = real.running.api_key
        self.watch = real.running.watch
        self.reach = real.running.reach
        self.shared_folder = real.running.shared_folder
        self._real = real
        self._host_memory = host_memory

    def start(self) -> None:
        self.proxy.load()

    def memory(self) -> list[Any]:
        return self._real.running.memory() if self._host_memory else []

    def cores(self) -> list[int]:
        return self._real.running.cores()

    def why_no_files(self) -> str | None:
        return self._real.running.why_no_files()

    def why_no_sidecar(self) -> str | None:
        return "it stands behind a proxy"

    def model_path(self) -> str:
        return self._real.running.model_path()

    def logs(self, *, tail: int | None = None) -> str:
        return self._real.running.logs(tail=tail)

    def inspect(self) -> dict[str, Any]:
        return {"name": "proxy"}

    def host_pids(self) -> list[int]:
        return [os.getpid()]

    def end(self, *, at_once: bool = False) -> int:
        self.proxy.close()
        self.proxy.unload()
        return 0

    def left_behind(self) -> list[str]:
        return []


class ProxyRuntime:
    """Prepares :class:`OnGpu` servers in front of one real server."""

    name = "proxy"
    starts = True
    decides_gpus = False
    decides_model = True
    caveats: tuple[str, ...] = ()

    def __init__(
        self, real: Server, scenario: Scenario, conduct: Conduct, *, host_memory: bool = False
    ) -> None:
        self._real, self._scenario, self._conduct = real, scenario, conduct
        self._host_memory = host_memory

    def keeping_parents(self) -> AbstractContextManager[None]:
        return nullcontext()

    def for_another_server(self) -> ProxyRuntime:
        return self

    def prepare(self, order: Order) -> OnGpu:
        proxy = GpuProxy(self._real, self._conduct, self._scenario)
        return OnGpu(self._real, proxy, order.run_id, host_memory=self._host_memory)


class Hoarder:
    """Allocates host memory in the server's container, as much as it is told to. What it is told
    lies in the folder that both sides see."""

    CODE = (
        "import time\n"
        "held = []\n"
        "while True:\n"
        "    try: wanted = int(open('/exchange/hoard').read())\n"
        "    except (OSError, ValueError): wanted = 0\n"
        "    if wanted < 0: break\n"
        "    while sum(map(len, held)) < wanted: held.append(bytearray(b'x' * 1000000))\n"
        "    time.sleep(0.05)\n"
    )

    def __init__(self, real: Server) -> None:
        self._file = real.running.shared_folder / "hoard"  # type: ignore[operator]
        self._held = 0
        self._tell(0)
        container = real.running._container  # type: ignore[attr-defined]
        container.exec_run(["python3", "-c", self.CODE], detach=True)

    def more(self, amount: int) -> None:
        """Holds ``amount`` bytes more from now on."""
        self._held += amount
        self._tell(self._held)
        time.sleep(0.2)

    def _tell(self, amount: int) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_text(str(amount))
        beside.chmod(0o644)
        beside.replace(self._file)

    def end(self) -> None:
        self._tell(-1)
