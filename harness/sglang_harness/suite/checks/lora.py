"""Are LoRA adapters applied, each to the requests that ask for it and to no other? The answers
are compared with PEFT's, which shares no code with SGLang's LoRA layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.checkpoint.made import lora as adapters
from sglang_harness.client import AdapterUpdate, Generation
from sglang_harness.errors import DidNotComeUp, Refused
from sglang_harness.oracle import Oracle
from sglang_harness.server import Server
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    Observation,
    dtype_of,
    expect,
    register,
)
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.scored import APART, Scored, largest_error
from sglang_harness.suite.lib.served import TOKENS, scored, wrong_answers
from sglang_harness.suite.needs import route
from sglang_harness.verdict import Figure

ASKED = PROMPTS[:2]
BASE = "base"

#: The step that is noted where an adapter that was unloaded is answered all the same.
AGAIN = "asked for after unloading"


def lora_arguments(device: str) -> dict[str, Any]:
    """Flags of a server that takes two adapters in one batch. On a CPU only the plain torch
    backend computes (0.5.23)."""
    return {
        "enable-lora": True,
        "max-lora-rank": adapters.RANK,
        "lora-target-modules": list(adapters.TARGETS),
        "max-loras-per-batch": 2,
        **({"lora-backend": "torch_native"} if device == "cpu" else {}),
    }


class AdapterAnswer(BaseModel):
    """What the server said about loading or unloading an adapter."""

    model_config = ConfigDict(extra="forbid")

    what: str
    name: str
    there: bool
    """Whether the adapter has to be loaded afterwards."""
    status: int
    success: bool
    message: str
    loaded: list[str]


class AdapterStep(BaseModel):
    """Answers at one point, all of them given by the same weights."""

    model_config = ConfigDict(extra="forbid")

    what: str
    answers: list[Scored]
    off_others: float | None = None
    """The smallest distance, in nats, of an answer's log-probabilities from those of weights
    that it must not be mistaken for; ``None`` where there are no others."""


class Adapted(Observation):
    never_came_up: str = ""
    start_seconds: float = 0.0
    said: list[AdapterAnswer] = Field(default_factory=list)
    steps: list[AdapterStep] = Field(default_factory=list)
    unloaded_status: int = 0
    """What a request for an adapter that was unloaded is answered."""
    unloaded_reason: str = ""


class _Sequence:
    """Asks one server, step by step, and notes what it says and answers."""

    def __init__(self, context: Context, server: Server, seen: Adapted, folder: Path) -> None:
        assert server.model is not None, "the tiny model is on this machine"
        self.server, self.client, self.seen = server, server.client, seen
        self.dtype = dtype_of(server)
        self.oracles: dict[str, Oracle] = {BASE: context.oracle_of(server)}
        self.folders: dict[str, Path] = {}
        seen.start_seconds = sum(phase.seconds for phase in server.report.phases)
        for number, name in enumerate(("one", "two")):
            made = adapters.made(server.model, folder / name, context.seed + number)
            self.folders[name] = made
            self.oracles[name] = context.oracle_of(server, adapter=made)

    def update(
        self, what: str, name: str, call: Callable[[], AdapterUpdate], *, there: bool = True
    ) -> bool:
        """Loads or unloads; whether the server says that it did."""
        status = 200
        try:
            told = call()
        except Refused as error:
            status, told = error.status, AdapterUpdate(False, error.reason, (), 0.0)
        said = AdapterAnswer(
            what=what,
            name=name,
            there=there,
            status=status,
            success=told.success,
            message=told.message,
            loaded=list(told.loaded),
        )
        self.seen.said.append(said)
        return said.success

    def load_from_disk(self, name: str) -> bool:
        inside = str(self.server.reach.share(self.folders[name]))
        return self.update(
            f"loading {name} from disk", name, lambda: self.client.load_lora_adapter(name, inside)
        )

    def push(self, which: str, name: str) -> bool:
        """Sends the adapter ``which`` under ``name``."""
        config, tensors = adapters.in_request(self.folders[which])
        return self.update(
            f"pushing {which} as {name}",
            name,
            lambda: self.client.load_lora_adapter_from_tensors(name, config, tensors),
        )

    def unload(self, name: str) -> bool:
        return self.update(
            f"unloading {name}",
            name,
            lambda: self.client.unload_lora_adapter(name),
            there=False,
        )

    def ask(self, what: str, weights: str, name: str | None, others: Sequence[str] = ()) -> None:
        """Each prompt alone; the answers have to be those of ``weights``."""
        self.note(what, weights, self.answers(name), others)

    def answers(self, name: str | None) -> list[Generation]:
        return [
            self.client.generate(p, sampling=greedy(TOKENS), logprobs=True, lora_path=name)
            for p in ASKED
        ]

    def ask_together(self) -> None:
        """Every prompt for both adapters, all in one request."""
        names = [name for _ in ASKED for name in ("one", "two")]
        answers = self.client.generate_batch(
            [p for p in ASKED for _ in range(2)],
            sampling=greedy(TOKENS),
            logprobs=True,
            lora_path=names,
        )
        self.note("both in one batch, one", "one", answers[::2], ("two", BASE))
        self.note("both in one batch, two", "two", answers[1::2], ("one", BASE))

    def note(
        self, what: str, weights: str, answers: Sequence[Generation], others: Sequence[str]
    ) -> None:
        right = scored(ASKED, answers, self.oracles[weights], self.dtype)
        off = [
            largest_error([other])
            for name in others
            for other in scored(ASKED, answers, self.oracles[name], self.dtype)
        ]
        self.seen.steps.append(
            AdapterStep(what=what, answers=right, off_others=min(off, default=None))
        )

    def ask_unloaded(self, name: str, weights: str, others: Sequence[str]) -> None:
        """Asks for what was unloaded; an answer has to come from ``weights``."""
        try:
            answers = self.answers(name)
        except Refused as error:
            self.seen.unloaded_status, self.seen.unloaded_reason = error.status, error.reason
        else:
            self.seen.unloaded_status = 200
            self.note(AGAIN, weights, answers, others)


class _Adapter(Check[Adapted]):
    observation = Adapted
    profile = "full"
    own_server = True

    def observe(self, context: Context) -> Adapted:
        seen = Adapted()
        arguments = lora_arguments(context.server.device)
        try:
            with context.own_server(model="tiny", server_args=arguments) as server:
                folder = context.scratch / self.id.replace("/", "-")
                self.steps(_Sequence(context, server, seen, folder))
        except DidNotComeUp as error:
            seen.never_came_up = str(error)
        return seen

    def steps(self, ask: _Sequence) -> None:
        """What is asked, in order; ends where the server refuses to load or unload."""
        raise NotImplementedError

    #: What ``steps`` notes when nothing is refused.
    noted: ClassVar[tuple[str, ...]]

    #: Whether a request for what was unloaded may load it again, as SGLang does with an adapter
    #: that it can find on disk (since its pull request 11526).
    may_come_back: ClassVar[bool]

    def judge(self, seen: Adapted) -> list[Mismatch]:
        if seen.never_came_up:
            return [Mismatch("the server", "to come up", seen.never_came_up)]
        wrong: list[Mismatch] = []
        for said in seen.said:
            if said.status != 200 or not said.success:
                wrong.append(Mismatch(said.what, "200", f"{said.status} {said.message}".strip()))
            elif said.loaded and (said.name in said.loaded) is not said.there:
                expected = f"{'with' if said.there else 'without'} {said.name}"
                wrong.append(Mismatch(f"{said.what}, loaded adapters", expected, str(said.loaded)))
        if any(not said.success for said in seen.said):
            return wrong  # what would have come next was not asked
        came_back = any(step.what == AGAIN for step in seen.steps)
        noted = [step.what for step in seen.steps if step.what != AGAIN]
        wrong += expect("steps", list(self.noted), noted)
        for step in seen.steps:
            wrong += wrong_answers(step.what, step.answers, len(ASKED))
            if step.off_others is not None and step.answers:
                bound = APART * step.answers[0].tolerance
                if not step.off_others > bound:
                    wrong.append(
                        Mismatch(
                            f"{step.what}, distance to other weights",
                            f"more than {bound:g}, so that they can be told apart",
                            f"{step.off_others:.6f}",
                        )
                    )
        # If it came back, the step shows whose answers these were.
        if not (came_back and self.may_come_back) and not 400 <= seen.unloaded_status < 500:
            got = f"{seen.unloaded_status} {seen.unloaded_reason}".strip()
            wrong.append(Mismatch("an adapter that was unloaded", "a refusal (4xx)", got))
        return wrong

    def figures(self, seen: Adapted) -> list[Figure]:
        if seen.never_came_up:
            return []
        error = largest_error([answer for step in seen.steps for answer in step.answers])
        name = f"{self.id}: largest log-probability error"
        return [
            Figure.of(f"{self.id}: start", "s", "lower", seen.start_seconds),
            Figure.of(name, "nats", "lower", error),
        ]


@register
class AdapterFromDisk(_Adapter):
    id = "lora/adapter-from-disk"
    sentence = (
        "Adapters loaded from disk answer as PEFT does, two of them in one batch too; the base "
        "answers as before beside them and after them; one that was unloaded is refused, or "
        "loaded again, and never answered by other weights."
    )
    needs = (route("POST", "/load_lora_adapter"), route("POST", "/unload_lora_adapter"))
    noted = (
        "base, before",
        "one",
        "base, beside one",
        "both in one batch, one",
        "both in one batch, two",
        "two, after unloading one",
        "base, after",
    )
    may_come_back = True

    def steps(self, ask: _Sequence) -> None:
        ask.ask("base, before", BASE, None)
        if not ask.load_from_disk("one"):
            return
        # Nothing is flushed between these: the same prompts, and each must get its own cache.
        ask.ask("one", "one", "one", (BASE, "two"))
        ask.ask("base, beside one", BASE, None, ("one",))
        if not ask.load_from_disk("two"):
            return
        ask.ask_together()
        if not ask.unload("one"):
            return
        ask.ask_unloaded("one", "one", (BASE, "two"))
        ask.ask("two, after unloading one", "two", "two", (BASE, "one"))
        if not ask.unload("two"):
            return
        ask.ask("base, after", BASE, None, ("one", "two"))


@register
class AdapterFromTensors(_Adapter):
    id = "lora/adapter-from-tensors"
    sentence = (
        "An adapter pushed as tensors answers as PEFT does; when another is pushed under its "
        "name, nothing of the first is left; one that was unloaded is refused."
    )
    needs = (
        route("POST", "/load_lora_adapter_from_tensors"),
        route("POST", "/unload_lora_adapter"),
    )
    noted = ("policy, first push", "base, beside it", "policy, second push", "base, after")
    may_come_back = False

    def steps(self, ask: _Sequence) -> None:
        if not ask.push("one", "policy"):
            return
        ask.ask("policy, first push", "one", "policy", (BASE, "two"))
        ask.ask("base, beside it", BASE, None, ("one",))
        if not ask.unload("policy"):
            return
        if not ask.push("two", "policy"):
            return
        ask.ask("policy, second push", "two", "policy", (BASE, "one"))
        if not ask.unload("policy"):
            return
        ask.ask_unloaded("policy", "two", (BASE, "one"))
        ask.ask("base, after", BASE, None, ("one", "two"))
