"""SGLang's HTTP API as a double that computes: a tiny model is served by torch, so a right server
is right to the last token, and a wrong one is a right one with one thing done wrong.

What a test wants to go wrong it puts in :attr:`ModelServer.lies`, by the name of what it spoils.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripted_server import BOUND, DONE, Answer, Mortal, ScriptedServer, Seen, event

from sglang_harness import oracle as oracles
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.errors import BrokenCheckpoint
from sglang_harness.memory import MemoryLedger
from sglang_harness.oracle import Oracle
from sglang_harness.runtime.path_map import SameMachine
from sglang_harness.server import Server
from sglang_harness.server.readiness import Sighting, StartReport
from sglang_harness.spec import Argument, ServerSpec
from sglang_harness.suite.check import Context

KEY = "the-key-of-this-server"

POSTS = (
    "/generate",
    "/flush_cache",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/weights_checker",
    "/update_weights_from_disk",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/v1/chat/completions",
    "/v1/completions",
)

Lie = Callable[[Any], Any]


class ModelServer:
    """A server with the model in ``folder``; also the source that its memory is read from.

    Attributes:
        used: bytes of memory in use.
        lies: what is done wrong, by the name of a thing that goes through :meth:`_told`; it gets
            the right value and returns the one that is used instead.
        log: what the server has written.
        log_lines: further lines, written when the next request is generated.
        step_seconds: what a token takes, beside its computing.
    """

    name = "double"

    def __init__(
        self,
        folder: Path,
        *,
        limits: dict[str, float] | None = None,
        arguments: dict[str, Argument] | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        self.first = self.folder = folder
        self.version = "default"
        self.model_path = str(folder)
        self.lies: dict[str, Lie] = {}
        self.log = ["it starts"]
        self.log_lines: list[str] = []
        self.step_seconds = 0.0
        self.released: list[str] = []
        self.mortal = Mortal()
        self.used = 500 << 20
        self._going = threading.Event()
        self._going.set()
        self._lock = threading.Lock()
        self._aborted: set[str] = set()
        #: By prompt: the model that computed it.
        self._cache: dict[tuple[int, ...], Path] = {}
        self._info = {"dtype": "float32", "device": "cpu", "version": "0.5.23", **(info or {})}
        script: dict[str, Any] = {
            "GET /openapi.json": Answer(
                body={"paths": {"/ready": {"get": {}}, **{p: {"post": {}} for p in POSTS}}}
            ),
            "GET /ready": self._guarded(self.ready),
            "GET /server_info": self._guarded(lambda _: Answer(body=self._info)),
            "GET /model_info": self._guarded(self.model_info),
        }
        for path in POSTS:
            name = path[1:].replace("/", "_")
            script[f"POST {path}"] = self._guarded(getattr(self, name))
        self.http = ScriptedServer(script)
        report = StartReport(
            sightings=[
                Sighting("/ready", "refused", 0.1),
                Sighting("/ready", "503", 0.2),
                Sighting("/ready", "200", 0.3),
            ],
            ready_by="/ready",
            ready_after=0.3,
            first_tokens=2,
        )
        self.server = Server(
            ServerSpec.make(model=str(folder), limits={"request": 20.0, **(limits or {})}),
            _Running(self, arguments or {}),  # type: ignore[arg-type]
            report=report,
            memory=MemoryLedger([self]),
        )
        self.server.memory.mark("started")
        self.used += (folder / "model.safetensors").stat().st_size
        self.server.memory.mark("ready")

    # --- what a test asks for ---------------------------------------------------------------

    def context(self, scratch: Path) -> Context:
        return Context(self.server, seed=0, own_server=self.own_server, scratch=scratch)

    @contextmanager
    def own_server(self, **_: Any) -> Iterator[Server]:
        """Itself, for the checks that ask for a server of their own."""
        yield self.server

    def asked(self, route: str) -> int:
        return len(self.http.asked(route))

    def close(self) -> None:
        self._going.set()
        self.server.stop()
        self.http.close()

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> tuple[int, dict[str, int]]:
        """Bytes in use, as a source of memory."""
        return self.used, {}

    # --- the model ---------------------------------------------------------------------------

    def _told(self, name: str, right: Any) -> Any:
        return self.lies[name](right) if name in self.lies else right

    def _guarded(self, route: Callable[[Seen], Answer]) -> Callable[[Seen], Answer]:
        def answer(seen: Seen) -> Answer:
            allowed = seen.headers.get("authorization") == f"Bearer {KEY}"
            if seen.path != "/ready" and not self._told("allowed", allowed):
                return Answer(401, {"error": "Unauthorized"})
            return route(seen)

        return answer

    def oracle(self, folder: Path | None = None) -> Oracle:
        with self._lock:
            return oracles.for_folder(folder or self.folder)

    def _computed(self, ids: list[int], sampling: dict[str, Any], number: int = 0) -> _Computed:
        """A whole answer."""
        last = _Computed(self.oracle(), ids, [], "", {"type": "length"}, 0)
        for last in self._steps(ids, sampling, number):  # noqa: B007 -- the last one is wanted
            pass
        return last

    def _steps(
        self, ids: list[int], sampling: dict[str, Any], number: int = 0
    ) -> Iterator[_Computed]:
        """One answer, token by token."""
        asked = int(sampling["max_new_tokens"])
        computed, kept, cached = self.folder, tuple(ids), 0
        if kept in self._cache:
            # What stands in the cache was computed by the weights of then.
            computed, cached = self._cache[kept], len(ids) - 1
        self._cache[kept] = computed
        model = self.oracle(computed)
        stops = set(sampling.get("stop_token_ids") or ())
        if not sampling.get("ignore_eos"):
            stops |= model.eos_ids
        forced = [int(i) for i in sampling.get("logit_bias") or ()]
        number = sampling.get("sampling_seed", number)
        said: list[int] = []
        while len(said) < asked:
            if forced:
                token = forced[0]
            elif sampling.get("temperature", 1.0) > 0 and sampling.get("top_k") != 1:
                token = self._sampled(model, [*ids, *said], number)
            else:
                token = model.score([*ids, *said], [0]).best_ids[0]
            said.append(self._told("token", token) if len(said) == 3 else token)
            text = model.decode(said)
            finish: dict[str, Any] = {"type": "length"} if len(said) == asked else {}
            if token in stops:
                finish = {"type": "stop", "matched": token}
            for stop in sampling.get("stop") or ():
                if stop in text:
                    finish = {"type": "stop", "matched": stop}
                    text = text[: text.index(stop)]
            yield _Computed(model, ids, list(said), text, finish, cached)
            if finish:
                return

    def _sampled(self, model: Oracle, ids: list[int], number: int) -> int:
        """As likely as the model says, evenly spread over the numbers of the samples."""
        probabilities = model.next_token_probabilities(ids)
        # The golden ratio spreads any count of samples evenly.
        place, total = (number * 0.6180339887 + len(ids) * 0.377) % 1.0, 0.0
        for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
            total += probabilities[token]
            if total > place:
                return token
        return 0

    # --- the routes -----------------------------------------------------------------------------

    def ready(self, _: Seen) -> Answer:
        return Answer(self._told("ready", 200 if self._going.is_set() else 503), "")

    def model_info(self, _: Seen) -> Answer:
        return Answer(
            body={
                "model_path": self.model_path,
                "served_model_name": self.model_path,
                "weight_version": self._told("label", self.version),
            }
        )

    def generate(self, seen: Seen) -> Answer:
        self.log += self.log_lines
        self.log_lines = []
        body = seen.json()
        prompt = body.get("text", body.get("input_ids"))
        many = isinstance(prompt, list) and not isinstance(prompt[0], int)
        prompts = prompt if many else [prompt]
        sampling = self._told("sampling", dict(body["sampling_params"]))
        if body.get("stream"):
            return self._streamed(self._ids(prompts[0]), sampling, body)
        count = sampling.get("n", 1)
        ids = [self._ids(p) for p in prompts for _ in range(count)]
        if many:
            ids = self._told("batch", ids)
        if any(i >= 10_000 for each in ids for i in each):
            answer = self._told("attacked", Answer(400, {"error": {"message": "no such token"}}))
            if answer is not None:
                return answer
            ids = [[0 if i >= 10_000 else i for i in each] for each in ids]
        self.http.closing.wait(self.step_seconds * int(sampling["max_new_tokens"]))
        answers = [
            self._answer(self._computed(each, sampling, n), body) for n, each in enumerate(ids)
        ]
        return Answer(body=answers if many or count > 1 else answers[0])

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return list(self._told("encoded", self.oracle().encode(prompt)))
        return list(prompt)

    def _answer(self, computed: _Computed, body: dict[str, Any]) -> dict[str, Any]:
        said = computed.said
        meta: dict[str, Any] = {
            "id": "1",
            "finish_reason": self._told("finish", computed.finish),
            "prompt_tokens": len(computed.prompt),
            "completion_tokens": self._told("completion_tokens", len(said)),
            "cached_tokens": computed.cached,
            "weight_version": self.version,
        }
        if body.get("return_logprob"):
            scored = computed.model.score(computed.prompt, said).logprobs if said else ()
            meta["output_token_logprobs"] = [
                [value, token, None]
                for value, token in zip(self._told("logprobs", scored), said, strict=True)
            ]
            if body.get("logprob_start_len", -1) == 0:
                meta["input_token_logprobs"] = [
                    [value, 0, None]
                    for value in (None, *computed.model.prompt_logprobs(computed.prompt))
                ]
        return {"text": computed.text, "output_ids": said, "meta_info": meta}

    def _streamed(self, ids: list[int], sampling: dict[str, Any], body: dict[str, Any]) -> Answer:
        """Token by token, while the server is not paused and the request not aborted."""
        rid = str(body.get("rid", ""))

        def events() -> Iterator[dict[str, Any]]:
            for part in self._steps(ids, sampling):
                self._going.wait(BOUND)
                if self._told("aborts", lambda one, all_: one in all_)(rid, self._aborted):
                    part.finish = {"type": "abort"}
                yield self._answer(part, body)
                if part.finish:
                    return

        def pieces() -> Iterator[bytes | float]:
            for data in self._told("events", events()):
                yield event(data)
                yield self.step_seconds
            yield DONE

        return Answer(pieces=pieces())  # type: ignore[arg-type]

    def v1_chat_completions(self, seen: Seen) -> Answer:
        body = seen.json()
        model = self.oracle()
        text = self._told("rendered", model.render_chat(body["messages"]))
        ids = list(model.tokenizer.encode(text, add_special_tokens=False))
        sampling = {**body, "max_new_tokens": body["max_tokens"]}
        computed = self._computed(ids, sampling)
        said, finish = self._told("chat", computed.text), computed.finish["type"]
        if "response_format" in body:
            bound = '{"city": "Rome", "certain": true, "stars": 2}'
            said, finish = self._told("bound", bound), "stop"
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(computed.said)}
        if not body.get("stream"):
            return Answer(
                body={
                    "choices": [{"message": {"content": said}, "finish_reason": finish}],
                    "usage": usage,
                }
            )
        deltas = [said[n : n + 2] for n in range(0, len(said), 2)]
        chunks = [
            {"choices": [{"delta": {"content": d}, "finish_reason": None}]}
            for d in self._told("deltas", deltas)
        ]
        chunks.append({"choices": [{"delta": {}, "finish_reason": finish}], "usage": usage})
        return Answer(pieces=(*map(event, chunks), DONE))

    def v1_completions(self, seen: Seen) -> Answer:
        body = seen.json()
        ids = self.oracle().encode(body["prompt"])
        computed = self._computed(ids, {**body, "max_new_tokens": body["max_tokens"]})
        choice = {"text": self._told("completion", computed.text), "finish_reason": "length"}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(computed.said)}
        return Answer(body={"choices": [choice], "usage": usage})

    def flush_cache(self, _: Seen) -> Answer:
        self._cache.clear()
        return self._told("flushed", Answer(body="flushed"))

    def abort_request(self, seen: Seen) -> Answer:
        self._aborted.add(self._told("abort", seen.json().get("rid", "")))
        return Answer(body="")

    def pause_generation(self, _: Seen) -> Answer:
        if self._told("pauses", True):
            self._going.clear()
        return Answer(body={"success": True})

    def continue_generation(self, _: Seen) -> Answer:
        if self._told("continues", True):
            self._going.set()
        return Answer(body={"success": True})

    def update_weights_from_disk(self, seen: Seen) -> Answer:
        body = seen.json()
        if not Path(body["model_path"]).is_dir():
            no = Answer(400, {"success": False, "message": "no such path"})
            return self._told("refusal", no)
        if (no := self._told("refuses", None)) is not None:
            return Answer(400, {"success": False, "message": no})
        try:
            open_checkpoint(body["model_path"])
        except BrokenCheckpoint as error:
            return self._told("broken", Answer(400, {"success": False, "message": str(error)}))
        self.folder = self._told("loaded", Path(body["model_path"]))
        self.model_path = body["model_path"]
        self.version = self._told("new_label", body.get("weight_version") or self.version)
        if body["flush_cache"] and self._told("flushes", True):
            self._cache.clear()
        self.used += self._told("kept", 0)
        return Answer(body={"success": True, "message": ""})

    def weights_checker(self, _: Seen) -> Answer:
        sums = {
            name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
            for name, tensor in open_checkpoint(self.folder).read()
        }
        return Answer(body={"success": True, "ranks": [{"checksums": sums}]})

    def release_memory_occupation(self, seen: Seen) -> Answer:
        self.released += seen.json().get("tags") or []
        self.used -= self._told("freed", 0)
        return Answer(body="")

    def resume_memory_occupation(self, seen: Seen) -> Answer:
        for tag in seen.json().get("tags") or []:
            if tag not in self.released:
                return Answer(400, {"error": {"message": f"{tag} was not released"}})
            self.released.remove(tag)
        return Answer(body="")


class _Computed:
    """An answer with the model that gave it."""

    def __init__(
        self,
        model: Oracle,
        prompt: list[int],
        said: list[int],
        text: str,
        finish: dict[str, Any],
        cached: int,
    ) -> None:
        self.model, self.prompt, self.said = model, prompt, said
        self.text, self.finish, self.cached = text, finish, cached


class _Running:
    """The double as something that runs."""

    runtime = "double"
    owned = True
    may_change = True
    shared_folder = None
    device = "cpu"
    run_id = "double"
    api_key = KEY

    def __init__(self, double: ModelServer, arguments: dict[str, Argument]) -> None:
        self._double = double
        self.model = double.first
        self.address = double.http.url
        self.watch = double.mortal.watch
        self.arguments = arguments
        self.reach = SameMachine()

    def why_no_files(self) -> str | None:
        return None

    def why_no_sidecar(self) -> str | None:
        return None

    def model_path(self) -> str:
        return str(self.model)

    def logs(self, *, tail: int | None = None) -> str:
        return "\n".join(self._double.log[-tail:] if tail else self._double.log)

    def end(self, *, at_once: bool = False) -> int:
        return 0

    def left_behind(self) -> list[str]:
        return []
