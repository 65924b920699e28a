"""SGLang's control of weights as a double with a state: it takes tensors, holds them fused, and
states their checksums. What a test wants to go wrong goes wrong where it says."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripted_server import Answer, Mortal, ScriptedServer, Seen

from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.memory import MemoryLedger
from sglang_harness.runtime.path_map import SameMachine
from sglang_harness.server import Server
from sglang_harness.server.readiness import StartReport
from sglang_harness.spec import ServerSpec
from sglang_harness.weights.proof.checksums import ServedLayout, expected_checksums

ROUTES = [
    "/generate",
    "/flush_cache",
    "/pause_generation",
    "/continue_generation",
    "/weights_checker",
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
]
SESSION = ["/begin_weight_update", "/end_weight_update"]


def done(**more: Any) -> Answer:
    return Answer(body={"success": True, "message": "", **more})


def refused(message: str) -> Answer:
    return Answer(400, {"success": False, "message": message})


class WeightServer:
    """A server with the weights of ``model``.

    Attributes:
        state: tensors by the checkpoint's names.
        spoil: what to do with each bucket of tensors before it is loaded; returns an answer in
            place of the ordinary one, or ``None``.
        log: what was done, in order.
    """

    def __init__(self, model: Path, *, sessions: bool = True, checksums: bool = True) -> None:
        self.model = model
        self.sessions = sessions
        self.paused = False
        self.open = False
        self.version = "default"
        self.path = str(model)
        self.state = dict(open_checkpoint(model).read())
        self.spoil: Callable[[int, list[Any]], Answer | None] = lambda number, tensors: None
        self.disk_works = True
        self.buckets = 0
        self.log: list[str] = []
        self.mortal = Mortal()
        self.served = ServedLayout.of(model, {"dtype": "float32"}, "cpu")
        paths = [*ROUTES, *(SESSION if sessions else [])]
        script: dict[str, Any] = {
            "GET /openapi.json": Answer(body={"paths": {p: {"post": {}} for p in paths}}),
            "GET /server_info": Answer(body={"dtype": "float32", "tp_size": 1, "dp_size": 1}),
            "GET /model_info": lambda _: Answer(
                body={"model_path": self.path, "weight_version": self.version}
            ),
        }
        for path in paths:
            script[f"POST {path}"] = getattr(self, path[1:])
        if not checksums:
            script["POST /weights_checker"] = refused("Torch not compiled with CUDA enabled")
        self.http = ScriptedServer(script)
        self.server = Server(
            ServerSpec.make(model=str(model), limits={"check": 5.0, "request": 5.0}),
            _Running(self),  # type: ignore[arg-type]
            report=StartReport(),
            memory=MemoryLedger([]),
        )

    # --- the routes -----------------------------------------------------------------------

    def generate(self, seen: Seen) -> Answer:
        if self.paused:
            return Answer(ending="silence")
        return Answer(
            body={
                "text": "x",
                "output_ids": [1],
                "meta_info": {
                    "id": "1",
                    "finish_reason": {"type": "length"},
                    "prompt_tokens": 1,
                    "completion_tokens": 1,
                    "weight_version": self.version,
                },
            }
        )

    def flush_cache(self, seen: Seen) -> Answer:
        self.log.append("flush")
        return Answer(body="flushed")

    def pause_generation(self, seen: Seen) -> Answer:
        self.log.append(f"pause {seen.json()['mode']}")
        self.paused = True
        return done()

    def continue_generation(self, seen: Seen) -> Answer:
        self.log.append("continue")
        self.paused = False
        return done()

    def begin_weight_update(self, seen: Seen) -> Answer:
        if self.open:
            return refused("a weight-update session is already open")
        self.log.append("begin")
        self.open = True
        return done()

    def end_weight_update(self, seen: Seen) -> Answer:
        if not self.open:
            return refused("no weight-update session is open")
        self.log.append("end")
        self.open = False
        return done()

    def update_weights_from_tensor(self, seen: Seen) -> Answer:
        body = seen.json()
        if self.sessions and not self.open:
            return refused("must run between begin_weight_update() and end_weight_update()")
        assert body["load_format"] is None
        assert body["flush_cache"] is False
        tensors = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        number, self.buckets = self.buckets, self.buckets + 1
        self.log.append(f"bucket {number}")
        if (answer := self.spoil(number, tensors)) is not None:
            return answer
        self.state.update(tensors)
        self.version = body["weight_version"]
        return done()

    def update_weights_from_disk(self, seen: Seen) -> Answer:
        body = seen.json()
        self.log.append("disk")
        if not self.disk_works:
            return refused("no such path")
        self.path, self.version = body["model_path"], body["weight_version"]
        self.state = dict(open_checkpoint(self.path).read())
        return done()

    def weights_checker(self, seen: Seen) -> Answer:
        if seen.json()["action"] == "reset_tensors":
            import torch

            self.log.append("wipe")
            self.state = {name: torch.rand_like(t) for name, t in self.state.items()}
            return done()
        sums = expected_checksums(self, self.served).ranks[0]  # type: ignore[arg-type]
        return done(ranks=[{"checksums": sums}], per_engine_checksum="")

    # --- a source for its own checksums ------------------------------------------------------

    @property
    def tensors(self) -> dict[str, Any]:
        return self.state

    def read(self, names: Any) -> Any:
        return ((name, self.state[name]) for name in names)

    def close(self) -> None:
        self.server.stop()
        self.http.close()

    def __enter__(self) -> WeightServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Running:
    """The double as something that runs."""

    runtime = "double"
    device = "cpu"
    run_id = "double"
    owned = True
    may_change = True
    api_key = None
    shared_folder = None

    def __init__(self, double: WeightServer) -> None:
        self.model = double.model
        self.address = double.http.url
        self.watch = double.mortal.watch
        self.reach = SameMachine()

    def why_no_files(self) -> str | None:
        return None

    def why_no_sidecar(self) -> str | None:
        return None

    def model_path(self) -> str:
        return str(self.model)

    def end(self, *, at_once: bool = False) -> int:
        return 0

    def left_behind(self) -> list[str]:
        return []
