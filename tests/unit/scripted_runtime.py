"""A runtime whose servers are scripted ones with a state: a run of the suite over real sockets,
with everything that a server or an engine can do wrong at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from scripted_server import BOUND, Answer, Mortal, ScriptedServer, Seen

from sglang_harness.memory import MemorySource
from sglang_harness.runtime import Order, Sidecar, Started
from sglang_harness.runtime.path_map import SameMachine
from sglang_harness.spec import Argument

GENERATED = {
    "text": "a",
    "output_ids": [5],
    "meta_info": {
        "id": "1",
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": 3,
        "completion_tokens": 1,
    },
}

DONE = Answer(body={"success": True, "message": ""})

#: Answers longer than any test waits: a request that hangs.
HANGS = Answer(delay=6 * BOUND)


class ScriptedSGLang:
    """SGLang's control routes with a state: paused or not, and one weight with a checksum.

    Attributes:
        weights: what the checksum of the weights is.
        disk_works: false: a load from disk answers success and changes nothing.
        wrote: its log.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.weights = "first"
        self.paused = False
        self.disk_works = True
        self.wrote = f"log of server {number}"
        self.mortal = Mortal()
        routes = {
            "/ready": "get",
            "/weights_checker": "post",
            "/pause_generation": "post",
            "/continue_generation": "post",
            "/update_weights_from_disk": "post",
            "/flush_cache": "post",
        }
        self.http = ScriptedServer(
            {
                "GET /openapi.json": Answer(
                    body={"paths": {path: {method: {}} for path, method in routes.items()}}
                ),
                "GET /ready": lambda _: Answer(503 if self.paused else 200, {}),
                "GET /v1/models": Answer(body={"data": [{"id": "tiny"}]}),
                "GET /model_info": Answer(
                    body={"model_path": "/m", "served_model_name": "m", "weight_version": "default"}
                ),
                "GET /server_info": Answer(body={"version": "0.0.1", "dtype": "float32"}),
                "POST /generate": lambda _: HANGS if self.paused else Answer(body=GENERATED),
                "POST /flush_cache": Answer(body="flushed"),
                "POST /pause_generation": self._pause,
                "POST /continue_generation": self._continue,
                "POST /update_weights_from_disk": self._load,
                "POST /weights_checker": lambda _: Answer(
                    body={
                        "success": True,
                        "message": "",
                        "ranks": [{"parallelism_info": {}, "checksums": {"w": self.weights}}],
                    }
                ),
            },
            listening=False,
        )

    def _pause(self, _: Seen) -> Answer:
        self.paused = True
        return DONE

    def _continue(self, _: Seen) -> Answer:
        self.paused = False
        return DONE

    def _load(self, seen: Seen) -> Answer:
        if self.disk_works:
            path = seen.json()["model_path"]
            self.weights = "first" if path == "/m" else path
        return DONE

    def asked(self, path: str) -> int:
        """How often a route was asked for."""
        return sum(seen.path == path for seen in self.http.seen)


class ScriptedRunning:
    """One of them, as a runtime hands it out."""

    def __init__(self, order: Order, sglang: ScriptedSGLang, *, owned: bool, may_change: bool):
        self.order = order
        self.sglang = sglang
        self.owned = owned
        self.may_change = may_change
        self.runtime = "scripted"
        how: Literal["cold", "warm"] = "cold" if order.spec.start == "cold" else "warm"
        self.started = Started(how if owned else "elsewhere")
        self.device: Literal["cpu", "gpu"] = "cpu"
        self.run_id = order.run_id
        self.model = order.model
        self.arguments: dict[str, Argument] = {}
        self.api_key: str | None = None
        self.reach = SameMachine()
        self.shared_folder: Path | None = None
        self.left: list[str] = []
        self.fails_to_end: Exception | None = None
        self.ended_at_once: bool | None = None
        self.ends = 0

    @property
    def watch(self) -> Any:
        return self.sglang.mortal.watch

    @property
    def address(self) -> str:
        return self.sglang.http.url

    def start(self) -> None:
        self.sglang.http.listen()

    def memory(self) -> list[MemorySource]:
        return []

    def cores(self) -> list[int]:
        return [0, 1]

    def why_no_files(self) -> str | None:
        return None

    def why_no_sidecar(self) -> str | None:
        return "a scripted server has none"

    def start_sidecar(self, script: str) -> Sidecar:
        raise NotImplementedError

    def model_path(self) -> str:
        return "/m"

    def logs(self, *, tail: int | None = None) -> str:
        return self.sglang.wrote

    def inspect(self) -> dict[str, Any]:
        return {"image": "an/image"}

    def host_pids(self) -> list[int]:
        return []

    def end(self, *, at_once: bool = False) -> int | None:
        self.ends += 1
        self.ended_at_once = at_once
        self.watch.expected = True
        if self.fails_to_end is not None:
            raise self.fails_to_end
        self.sglang.http.close()
        return 0

    def left_behind(self) -> list[str]:
        return self.left


class ScriptedRuntime:
    """Starts scripted servers.

    Args:
        prepared: what happens to each server before it starts, in order: a function of it, or an
            error that keeps it from being prepared. Servers after these are ordinary ones.

    Attributes:
        running: every server that was handed out.
        parents_kept: how often parents were asked to be kept; ``keeping`` while they are.
    """

    name = "scripted"
    decides_gpus = True
    decides_model = True

    def __init__(
        self,
        *prepared: Callable[[ScriptedRunning], object] | Exception,
        starts: bool = True,
        may_change: bool = True,
        caveats: tuple[str, ...] = (),
    ) -> None:
        self.prepared = list(prepared)
        self.starts = starts
        self.may_change = may_change
        self.caveats = caveats
        self.running: list[ScriptedRunning] = []
        self.orders: list[Order] = []
        self.parents_kept = 0
        self.keeping = False

    def for_another_server(self) -> ScriptedRuntime:
        return self

    def prepare(self, order: Order) -> Any:
        first = self.prepared.pop(0) if self.prepared else lambda _: None
        if isinstance(first, Exception):
            raise first
        made = ScriptedRunning(
            order,
            ScriptedSGLang(len(self.running)),
            owned=self.starts,
            may_change=self.starts or self.may_change,
        )
        self.running.append(made)
        self.orders.append(order)
        first(made)
        if not self.starts:
            made.start()
        return made

    @contextmanager
    def keeping_parents(self) -> Iterator[None]:
        self.parents_kept += 1
        self.keeping = True
        try:
            yield
        finally:
            self.keeping = False

    @property
    def servers(self) -> list[ScriptedSGLang]:
        return [running.sglang for running in self.running]
