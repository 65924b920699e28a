"""LoRA adapters for a running server, from disk or in the body of a request, and the witnesses that
they are applied where they are asked for and nowhere else. The reference is PEFT."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sglang_harness.checkpoint.fitting import raise_if_not_finite
from sglang_harness.checkpoint.made import lora as adapter_files
from sglang_harness.checkpoint.reading import TensorInfo, open_checkpoint
from sglang_harness.client import AdapterUpdate, Call, calls
from sglang_harness.errors import (
    HarnessError,
    MissingExtra,
    ModelError,
    ReadOnly,
    SpecError,
)
from sglang_harness.weights.proof.witnesses import ask_tokens, judge_logprobs
from sglang_harness.weights.report import (
    AdapterFailed,
    AdapterReport,
    AdapterRoute,
    NotPrepared,
    Token,
    Witness,
    conclude,
)
from sglang_harness.weights.routes.base import Needs

if TYPE_CHECKING:
    from sglang_harness.weights.pusher import WeightPusher
    from sglang_harness.weights.target import Target

#: What each route needs of the server.
ROUTES = {
    "disk": Needs(posts=("/load_lora_adapter", "/unload_lora_adapter"), shared_folder=True),
    "tensor": Needs(posts=("/load_lora_adapter_from_tensors", "/unload_lora_adapter")),
}


class AdapterPusher:
    """Loads LoRA adapters into one server, which has to run with ``--enable-lora``."""

    def __init__(self, target: Target, weights: WeightPusher) -> None:
        self._target = target
        self._weights = weights
        self._copies: dict[str, list[PurePosixPath]] = {}
        """Of each adapter that was loaded from disk, until it is unloaded: a server may load one
        that it evicted from there again."""

    def push(
        self, folder: Path | str, *, name: str, route: AdapterRoute = "tensor", pinned: bool = False
    ) -> AdapterReport:
        """Loads an adapter under ``name``, replacing one of that name, and looks for two witnesses.

        Args:
            folder: PEFT's layout: ``adapter_config.json``, ``adapter_model.safetensors``.
            route: ``disk``: the server reads a folder that both sides can read; ``tensor``: in the
                body of the request, once for every tensor-parallel rank.
            pinned: the server may not evict it from memory for others.

        Returns:
            A report whose outcome is ``good``, or ``unproven`` with the reason.

        Raises:
            SpecError: the server takes no adapters, or not by this route.
            ModelError: the folder holds no adapter, or one with values that are not finite. Then
                nothing was sent, as for the next:
            NotPrepared: the adapter could not be copied to where the server reads it.
            AdapterFailed: the server refused it, or does not answer as PEFT does. Then it is
                unloaded again, and no adapter named ``name`` is loaded.
        """
        client = self._target.client
        if not self._target.may_change:
            raise ReadOnly(f"Pushing an adapter via '{route}'")
        if reason := self.lacking(route):
            raise SpecError(f"This server cannot load adapters via '{route}': {reason}.")
        if self._weights.unfit:
            raise SpecError(
                f"Do not use this server any more: {self._weights.unfit}.",
                advice="Start a new server.",
            )
        folder = Path(folder).expanduser().resolve()
        infos = finite_tensors(folder)
        about = client.server_info()
        base = self._weights.served_checkpoint()
        there = client.models()
        for gone in self._copies.keys() - set(there):
            self._remove_copies(gone)  # unloaded by another client
        replaced = name in there
        started = time.monotonic()
        call, copy = self._prepared(folder, name, route, pinned, int(about.get("tp_size") or 1))
        ours = time.monotonic() - started
        tokens: list[Token] = []
        applied = plain = Witness.silent("log-probabilities", "the adapter was not loaded")
        loaded: list[str] = []
        seconds = 0.0
        failure: Exception | None = None
        outcome = None
        try:
            if replaced:
                client.unload_lora_adapter(name)
                self._remove_copies(name)
            told = client.send(call)
            seconds, loaded = time.monotonic() - started, list(told.loaded)
            if not told.success:
                raise HarnessError(told.message or "the server answered that it did not load it")
            tokens, applied, plain = self._ask(folder, name, base, str(about.get("dtype")))
            outcome, reason = conclude(AdapterReport.titled(applied, plain))
        except Exception as error:
            failure = error
            seconds = seconds or time.monotonic() - started
            outcome, reason = "failed", _what(error)
        finally:
            if copy is not None:
                self._copies.setdefault(name, []).append(copy)
            left = ""
            if outcome not in ("good", "unproven"):
                left = self._unload_after_failure(name)
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
        """Unloads an adapter; waits for the requests that use it (0.5.23).

        Raises:
            Refused: the server has none of that name.
            HarnessError: the server answered that it did, and still lists it.
        """
        if not self._target.may_change:
            raise ReadOnly("Unloading an adapter")
        self._target.client.unload_lora_adapter(name)
        if name in self._target.client.models():
            raise HarnessError(
                f"The server answered that it unloaded the adapter {name!r}, and still lists it."
            )
        self._remove_copies(name)

    def lacking(self, route: AdapterRoute) -> str | None:
        """Why this server loads no adapter via ``route``; ``None``: it does.

        Raises:
            SpecError: there is no such route.
        """
        if route not in ROUTES:
            raise SpecError(
                f"Unknown route {route!r} for adapters.",
                advice=f"Choose one of {', '.join(ROUTES)}.",
            )
        if reason := ROUTES[route].lacking(self._target):
            return reason
        if not self._target.client.server_info().get("enable_lora"):
            return "it was started without --enable-lora"
        return None

    def _prepared(
        self, folder: Path, name: str, route: AdapterRoute, pinned: bool, ranks: int
    ) -> tuple[Call[AdapterUpdate], PurePosixPath | None]:
        """The call that loads it, ready to be sent, and where the server sees a copy of it."""
        if route == "disk":
            try:
                inside = self._target.running.reach.share(folder)
            except OSError as error:
                raise NotPrepared(
                    f"{folder} could not be copied to where the server reads it: {error}"
                ) from error
            return calls.load_lora_adapter(name, str(inside), pinned=pinned), inside
        config, tensors = adapter_files.in_request(folder, ranks=ranks)
        return calls.load_lora_adapter_from_tensors(name, config, tensors, pinned=pinned), None

    def _remove_copies(self, name: str) -> None:
        for copy in self._copies.pop(name, []):
            # Where it cannot be removed, it goes with the server.
            with suppress(HarnessError):
                self._target.running.reach.unshare(copy)

    def _ask(
        self, folder: Path, name: str, base: Path | None, dtype: str
    ) -> tuple[list[Token], Witness, Witness]:
        """Answers with and without the adapter. Nothing is flushed: a prefix that was cached for
        one may not be served for the other."""
        from sglang_harness import oracle as oracles

        why, client = "it is not known which base weights the server has", self._target.client
        asked: list[Token] | None = None
        if base is not None:
            try:
                with_it, without = oracles.Oracle(base, adapter=folder), oracles.for_folder(base)
                asked = ask_tokens(client, with_it, without, lora_path=name)
                others = ask_tokens(client, without, with_it)
            except (MissingExtra, ModelError) as error:
                asked, why = None, error.message
            except HarnessError:
                raise  # of the server
            except Exception as error:
                # It says nothing about the server.
                asked, why = None, f"the reference model failed: {type(error).__name__}: {error}"
        if asked is None:
            silent = Witness.silent("log-probabilities", why)
            return [], silent, silent
        applied = judge_logprobs(
            asked, dtype, same_weights=False, new="the adapter", old="the base model"
        )
        plain = judge_logprobs(
            others, dtype, same_weights=False, new="the base model", old="the adapter"
        )
        return [*asked, *others], applied, plain

    def _unload_after_failure(self, name: str) -> str:
        """Unloads it if it is there; returns what the server holds."""
        client = self._target.client
        with client.cleanup():
            with suppress(HarnessError):
                client.unload_lora_adapter(name)
            try:
                there = name in client.models()
            except HarnessError as error:
                return f"It is not known whether {name!r} is loaded: {error.message.rstrip('.')}"
        if there:
            return f"An adapter named {name!r} is still loaded"
        self._remove_copies(name)
        return f"No adapter named {name!r} is loaded"


def finite_tensors(folder: Path) -> list[TensorInfo]:
    """What an adapter's folder holds, after a check of every value.

    Raises:
        ModelError: it holds no adapter in safetensors, or one with values that are not finite:
            SGLang serves such an adapter without an error.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds no LoRA adapter: adapter_config.json is not there.",
            advice="Save it with PEFT: model.save_pretrained(folder).",
        )
    opened = open_checkpoint(folder / "adapter_model.safetensors")
    raise_if_not_finite(opened.path, opened.read())
    return list(opened.tensors.values())


def _what(error: Exception) -> str:
    if isinstance(error, HarnessError):
        return error.message
    return f"{type(error).__name__}: {error}"
