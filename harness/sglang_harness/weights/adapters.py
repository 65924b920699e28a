"""LoRA adapters for a running server, from disk or in the body of a request, and the witnesses that
they are applied where they are asked for and nowhere else. The oracle is PEFT."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.checkpoint.fitting import not_finite
from sglang_harness.checkpoint.made import lora as adapter_files
from sglang_harness.checkpoint.reading import TensorInfo, open_checkpoint
from sglang_harness.client import AdapterUpdate, Call, calls
from sglang_harness.errors import HarnessError, MissingExtra, ModelError, ReadOnly, SpecError
from sglang_harness.weights.proof.witnesses import ask_tokens, judge_logprobs
from sglang_harness.weights.report import Token, Witness
from sglang_harness.weights.routes.base import Needs

if TYPE_CHECKING:
    from sglang_harness.weights.pusher import WeightPusher
    from sglang_harness.weights.target import Target

AdapterRoute = Literal["disk", "tensor"]

#: What each route needs of the server.
ROUTES = {
    "disk": Needs(posts=("/load_lora_adapter", "/unload_lora_adapter"), shared_folder=True),
    "tensor": Needs(posts=("/load_lora_adapter_from_tensors", "/unload_lora_adapter")),
}


class AdapterReport(BaseModel):
    """One adapter, pushed.

    Attributes:
        outcome: ``good`` when both witnesses agree; ``failed`` when one differs, or the server
            refused; ``unproven`` when one of them could say nothing.
        bytes: of the adapter's tensors.
        seconds: until the server said that it has it; ``seconds_ours`` of these for reading,
            packing and sharing.
        replaced: another one went by that name, and was unloaded first.
        loaded: the adapters that the server says it holds.
        applied: answers that ask for the adapter, beside PEFT's; those of the base as control.
        base: answers that ask for none, beside the base's; those of the adapter as control.
        left: what the server holds after a failure, in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: str
    name: str
    route: AdapterRoute
    outcome: Literal["good", "failed", "unproven"]
    reason: str
    tensors: int
    bytes: int
    seconds: float
    seconds_ours: float
    replaced: bool
    loaded: list[str]
    applied: Witness
    base: Witness
    tokens: list[Token] = Field(default_factory=list)
    left: str = ""

    def __str__(self) -> str:
        lines = [
            f"adapter {self.outcome}: {self.name!r}, {self.tensors} tensors, "
            f"{self.bytes / 1e6:.2f} MB by '{self.route}' in {self.seconds:.2f} s (ours "
            f"{self.seconds_ours:.2f} s){', in place of another' if self.replaced else ''}",
            *([f"  {self.reason}"] if self.reason else []),
        ]
        for title, witness in (("asked for", self.applied), ("not asked for", self.base)):
            lines.append(f"  {title}: {witness.says} ({witness.how})")
            lines += [f"    {wrong}" for wrong in witness.wrong[:5]]
        return "\n".join([*lines, *([f"  {self.left}"] if self.left else [])])


class AdapterFailed(HarnessError):
    """An adapter is not there, or is not what answers.

    Attributes:
        report: everything that is known of the push.
    """

    def __init__(self, report: AdapterReport) -> None:
        left = f" {report.left[0].upper()}{report.left[1:]}." if report.left else ""
        super().__init__(
            f"The adapter {report.adapter} was not brought by '{report.route}': "
            f"{report.reason.rstrip('.')}.{left}"
        )
        self.report = report


class AdapterPusher:
    """Brings LoRA adapters to one server, which has to run with ``--enable-lora``."""

    def __init__(self, target: Target, weights: WeightPusher) -> None:
        self._target = target
        self._weights = weights

    def push(
        self, folder: Path | str, *, name: str, route: AdapterRoute = "tensor", pinned: bool = False
    ) -> AdapterReport:
        """Loads an adapter under ``name``, in place of one that goes by it, and looks for two
        witnesses.

        Args:
            folder: PEFT's layout: ``adapter_config.json``, ``adapter_model.safetensors``.
            route: ``disk``: the server reads a folder that both sides see; ``tensor``: in the
                body of the request, once for every tensor-parallel rank.
            pinned: the server may not put it out of memory for others.

        Returns:
            A report whose outcome is ``good``, or ``unproven`` with the reason.

        Raises:
            SpecError: the server takes no adapters, or not by this route.
            ModelError: the folder holds no adapter, or one with values that are not finite. Then
                nothing was sent.
            AdapterFailed: the server refused it, or answers otherwise than PEFT with it. Then it is
                unloaded again, and nothing goes by ``name``.
        """
        client = self._target.client
        if not self._target.may_change:
            raise ReadOnly(f"Pushing an adapter by '{route}'")
        if reason := self.lacking(route):
            raise SpecError(f"No adapter can be pushed to this server: {reason}.")
        if self._weights.unfit:
            raise SpecError(f"The server is unfit: {self._weights.unfit}.")
        folder = Path(folder).expanduser().resolve()
        infos = finite_tensors(folder)
        about = client.server_info()
        base = self._weights.served_checkpoint()
        replaced = name in client.models()
        started = time.monotonic()
        tokens: list[Token] = []
        applied = plain = Witness.silent("log-probabilities", "it did not go so far")
        loaded: list[str] = []
        ours = seconds = 0.0
        failure: HarnessError | None = None
        try:
            if replaced:
                client.unload_lora_adapter(name)
            preparing = time.monotonic()
            call = self._call(folder, name, route, pinned, int(about.get("tp_size") or 1))
            ours = time.monotonic() - preparing
            told = client.send(call)
            seconds, loaded = time.monotonic() - started, list(told.loaded)
            if not told.success:
                raise HarnessError(told.message or "the server says that it did not load it")
            tokens, applied, plain = self._ask(folder, name, base, str(about.get("dtype")))
        except HarnessError as error:
            failure = error
            seconds = seconds or time.monotonic() - started
        outcome, reason = _conclusion(failure, applied, plain)
        left = self._take_away(name) if outcome == "failed" else ""
        report = AdapterReport(
            adapter=str(folder),
            name=name,
            route=route,
            outcome=outcome,
            reason=reason,
            tensors=len(infos),
            bytes=sum(info.nbytes for info in infos),
            seconds=seconds,
            seconds_ours=ours,
            replaced=replaced,
            loaded=loaded,
            applied=applied,
            base=plain,
            tokens=tokens,
            left=left,
        )
        if outcome == "failed":
            raise AdapterFailed(report) from failure
        return report

    def unload(self, name: str) -> None:
        """Takes an adapter away; waits for the requests that use it (0.5.23).

        Raises:
            Refused: the server has none of that name.
            HarnessError: it says that it did, and still offers it.
        """
        if not self._target.may_change:
            raise ReadOnly("Unloading an adapter")
        self._target.client.unload_lora_adapter(name)
        if name in self._target.client.models():
            raise HarnessError(f"The adapter {name!r} was unloaded, and is still on offer.")

    def lacking(self, route: AdapterRoute) -> str | None:
        """Why no adapter gets to this server by ``route``; ``None``: it does.

        Raises:
            SpecError: there is no such route.
        """
        if route not in ROUTES:
            raise SpecError(
                f"There is no route {route!r} for adapters.", advice=f"One of {', '.join(ROUTES)}."
            )
        if reason := ROUTES[route].lacking(self._target):
            return reason
        if not self._target.client.server_info().get("enable_lora"):
            return "it was started without --enable-lora"
        return None

    def _call(
        self, folder: Path, name: str, route: AdapterRoute, pinned: bool, ranks: int
    ) -> Call[AdapterUpdate]:
        """What loads it, ready to be sent."""
        if route == "disk":
            inside = str(self._target.reach.share(folder))
            return calls.load_lora_adapter(name, inside, pinned=pinned)
        config, tensors = adapter_files.in_request(folder, ranks=ranks)
        return calls.load_lora_adapter_from_tensors(name, config, tensors, pinned=pinned)

    def _ask(
        self, folder: Path, name: str, base: Path | None, dtype: str
    ) -> tuple[list[Token], Witness, Witness]:
        """Nothing is flushed: the same prompts with and without it, and each its own cache."""
        from sglang_harness import oracle as oracles

        why = ""
        if base is None:
            why = "which base weights are served is not known here"
        else:
            try:
                with_it, without = oracles.Oracle(base, adapter=folder), oracles.for_folder(base)
            except (MissingExtra, ModelError) as error:
                why = error.message
        if why:
            silent = Witness.silent("log-probabilities", why)
            return [], silent, silent
        client = self._target.client
        asked = ask_tokens(client, with_it, without, lora_path=name)
        others = ask_tokens(client, without, with_it)
        applied = judge_logprobs(
            asked, dtype, same_weights=False, new="the adapter", old="the base"
        )
        plain = judge_logprobs(others, dtype, same_weights=False, new="the base", old="the adapter")
        return [*asked, *others], applied, plain

    def _take_away(self, name: str) -> str:
        """What goes by the name after a failure, in words."""
        client = self._target.client
        with suppress(HarnessError):
            client.unload_lora_adapter(name)
        try:
            there = name in client.models()
        except HarnessError as error:
            return f"what the server holds is not known: {error.message.rstrip('.')}"
        return f"{name!r} is still on offer" if there else f"nothing goes by {name!r} now"


def finite_tensors(folder: Path) -> list[TensorInfo]:
    """What an adapter's folder holds, after a look at every value.

    Raises:
        ModelError: it holds no adapter in safetensors, or one with values that are not finite,
            which a server takes without a word.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds no LoRA adapter: adapter_config.json is not there.",
            advice="Save it with PEFT: model.save_pretrained(folder).",
        )
    opened = open_checkpoint(folder / "adapter_model.safetensors")
    for name, tensor in opened.read():
        if not_finite(name, tensor):
            raise ModelError(f"{folder}: {name} has values that are not finite.")
    return list(opened.tensors.values())


def _conclusion(
    failure: HarnessError | None, applied: Witness, base: Witness
) -> tuple[Literal["good", "failed", "unproven"], str]:
    if failure is not None:
        return "failed", failure.message
    told = (("asked for", applied), ("not asked for", base))
    if wrong := [(title, w) for title, w in told if w.says == "differs"]:
        return "failed", "; ".join(f"{title}: {w.wrong[0]}" for title, w in wrong)
    if silent := [(title, w) for title, w in told if w.says != "agrees"]:
        return "unproven", "; ".join(f"{title}: {w.how}" for title, w in silent)
    return "good", ""
