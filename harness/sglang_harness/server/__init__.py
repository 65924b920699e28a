"""One running SGLang server, with everything that can be asked of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sglang_harness import checkpoint
from sglang_harness._base.teardown import Teardown
from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import (
    HarnessError,
    Interrupted,
    ServerDied,
    StartTimeout,
    Unresponsive,
)
from sglang_harness.memory import MemoryLedger, MemorySource
from sglang_harness.memory.gpu.guard import Guard, Return
from sglang_harness.runtime import Order, Reach, Running, Runtime, device
from sglang_harness.runtime.attach import Attachment
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.server.identify import introduce
from sglang_harness.server.readiness import StartReport, wait_until_ready
from sglang_harness.spec import ServerSpec

if TYPE_CHECKING:
    from sglang_harness.weights import AdapterPusher, WeightPusher

Say = Callable[[str], None]

#: Seconds for the first generation of a server that is said to run already.
ANSWERS_WITHIN = 60.0


@dataclass(frozen=True)
class Stopped:
    """How a server went down when it was asked to."""

    exit_code: int | None
    seconds: float
    left_behind: list[str]
    devices: list[Return] = field(default_factory=list)
    """What became of each GPU; empty for a server that used none."""


def _quietly(_: str) -> None:
    return None


class Server:
    """A server that has generated its first token.

    ::

        with Server.start(ServerSpec(model="tiny")) as server:
            print(server.client.generate("Hello").text)

    Attributes:
        spec: what was asked for.
        model: the checkpoint's folder on this machine; ``None`` for a hub name.
        device: ``cpu`` or ``gpu``.
        client: the HTTP remote control.
        report: how it came up.
        memory: readings at marks; ``before start`` (GPUs), ``started`` and
            ``ready`` are taken already.
        may_change: false for an existing server that is only read.
    """

    def __init__(
        self,
        spec: ServerSpec,
        running: Running,
        *,
        report: StartReport,
        memory: MemoryLedger,
        guard: Guard | None = None,
    ) -> None:
        self.may_change = running.may_change
        self._guard = guard
        self.spec = spec
        self.model = running.model
        self.device = running.device
        self.report = report
        self.memory = memory
        self.running = running
        self.redactor = spec.redactor(running.api_key)
        self.client = Client(
            RequestsTransport(
                running.address, api_key=running.api_key, read_timeout=spec.limits.request
            ),
            watch=running.watch,
            timeout=spec.limits.request,
            # What restores a server may load its weights again.
            cleanup=spec.limits.start,
            read_only=not running.may_change,
        )
        self.lacks: dict[str, str | None] = {}
        """What was asked of the server once: why it lacks something, or ``None``."""
        self.stopped: Stopped | None = None
        self._about: dict[str, Any] | None = None
        self._weights: WeightPusher | None = None
        self._adapters: AdapterPusher | None = None

    @property
    def weights(self) -> WeightPusher:
        """Pushes new weights and finds out whether they arrived."""
        if self._weights is None:
            # Imported late: only a push needs what pushing imports.
            from sglang_harness.weights import WeightPusher

            self._weights = WeightPusher(self)
        return self._weights

    @property
    def adapters(self) -> AdapterPusher:
        """Brings LoRA adapters, and finds out whether they are applied."""
        if self._adapters is None:
            from sglang_harness.weights import AdapterPusher

            self._adapters = AdapterPusher(self, self.weights)
        return self._adapters

    @classmethod
    def start(
        cls,
        spec: ServerSpec,
        *,
        runtime: Runtime | None = None,
        say: Say = _quietly,
        run_id: str | None = None,
        held: bool = False,
        within: float | None = None,
    ) -> Server:
        """Starts a server and waits until it answers.

        Args:
            within: seconds until it answers, where there are fewer than ``limits.start``.
            runtime: how it comes to be; by default in a container. One that starts nothing
                gives the server that runs already: see :meth:`attach`.

        Raises:
            SpecError, EngineError, ImageError, ModelError: it could not be started.
            AttachError: see :meth:`attach`.
            LeaseTaken, TelemetryError, DeviceNotIdle: its GPUs are held by another process, do
                not answer, or are not idle. Nothing was started.
            ServerDied, StartTimeout: it was started and never answered.
        """
        runtime = runtime or DockerRuntime()
        if not runtime.decides_gpus:
            spec = device.within_visible(spec)
        counts = not runtime.decides_model or "model" in spec.model_fields_set
        running = runtime.prepare(
            Order(
                spec,
                model=checkpoint.locate(spec.model, say) if counts else None,
                run_id=run_id or uuid.uuid4().hex[:12],
                held=held,
                say=say,
                identify=introduce,
            )
        )
        if not running.owned:
            return cls._attached(spec, running)
        guard = _guard(spec, running, say)
        devices: list[MemorySource] = [guard.source] if guard else []
        ledger = MemoryLedger(devices)
        redactor = spec.redactor(running.api_key)
        try:
            ledger = MemoryLedger([*devices, *running.memory()])
            ledger.mark("before start", only=devices)
            started = time.monotonic()
            running.start()
            if guard:
                ledger.watch(guard.source)
            ledger.mark("started")
            say("it runs, and imports SGLang")
            report = wait_until_ready(
                running.address,
                api_key=running.api_key,
                watch=running.watch,
                limit=spec.limits.start if within is None else min(within, spec.limits.start),
                started=started,
                last_log_line=lambda: (running.logs(tail=1).strip().splitlines() or [""])[-1],
                redactor=redactor,
                say=say,
            )
            ledger.mark("ready")
            return cls(spec, running, report=report, memory=ledger, guard=guard)
        except BaseException as error:
            with Teardown() as down:
                # The log would be gone with the server, and the report of the failure needs it.
                log = down.step("log", running.logs) or ""
                if isinstance(error, (HarnessError, Interrupted)):
                    error.log = redactor.text(log)
                down.step("memory readings", ledger.close)
                down.step("server", running.end)
                for each in (down.step("GPUs", guard.close) or ()) if guard else ():
                    if not each.given_back:
                        say(f"GPU {each.uuid} was not given back: {_held(each)}")
                down.collect("server", running.left_behind)
                for failure in down.failures:
                    say(f"left behind: {failure}")
            raise

    @classmethod
    def attach(
        cls,
        attachment: Attachment,
        spec: ServerSpec | None = None,
        *,
        say: Say = _quietly,
        run_id: str | None = None,
    ) -> Server:
        """Attaches to a server that runs already; ``stop`` detaches and leaves it running.

        Args:
            spec: of its fields only ``limits`` and, where it is set, ``model`` (the served
                checkpoint on this machine) are used.

        Raises:
            AttachError: nothing answers there, it requires another key, or it is not SGLang.
            Unresponsive: it is SGLang and does not generate.
            ModelError: ``model`` was given and is not there.
        """
        return cls.start(spec or ServerSpec(), runtime=attachment, say=say, run_id=run_id)

    @classmethod
    def _attached(cls, spec: ServerSpec, running: Running) -> Server:
        try:
            wait_until_ready(
                running.address,
                api_key=running.api_key,
                watch=running.watch,
                limit=spec.limits.start if "limits" in spec.model_fields_set else ANSWERS_WITHIN,
            )
        except (ServerDied, StartTimeout) as error:
            running.end()
            raise Unresponsive(
                f"The server at {running.address} answers, but does not generate: {error.message}",
                advice="It may be paused, loading or stuck; look at its log.",
            ) from None
        except BaseException:
            running.end()
            raise
        named = spec.model_copy(update={"model": str(running.model or running.model_path())})
        return cls(named, running, report=StartReport(), memory=MemoryLedger([]))

    @property
    def reach(self) -> Reach:
        return self.running.reach

    @property
    def address(self) -> str:
        return self.running.address

    def about(self) -> dict[str, Any]:
        """How it runs, without secrets; asked once, kept after the server has gone."""
        if self._about is None:
            self._about = self.redactor.data(self.running.inspect())
        return self._about

    def logs(self) -> str:
        """Everything the server has written, without secrets."""
        return self.redactor.text(self.running.logs())

    def raise_if_dead(self) -> None:
        """Raises :class:`ServerDied` where the server has ended by itself, and
        :class:`ServerLost` where that is not known."""
        self.running.watch.raise_if_ended()

    def stop(self, *, at_once: bool = False) -> Stopped:
        """Ends the server and removes what belongs to it. Again: the same answer.

        Args:
            at_once: nobody judges how it ends, so that it need not be waited for. One on a GPU is
                asked to end all the same: what a killed one holds there may come back late.
        """
        if self.stopped is None:
            with Teardown() as down:
                if self._weights is not None:
                    down.collect("sidecar", self._weights.close)
                down.step("HTTP client", self.client.close)
                started = time.monotonic()
                kill = at_once and self.device == "cpu"
                exit_code = down.step("server", lambda: self.running.end(at_once=kill))
                seconds = time.monotonic() - started
                down.step("memory readings", self.memory.close)
                devices = down.step("GPUs", self._guard.close) if self._guard else []
                down.collect("server", self.running.left_behind)
                self.stopped = Stopped(exit_code, seconds, down.failures, devices or [])
        return self.stopped

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _guard(spec: ServerSpec, running: Running, say: Say) -> Guard | None:
    """The guard of the server's GPUs; ``None`` where it uses none."""
    if running.device != "gpu":
        return None
    guard = Guard(spec.gpus, run_id=running.run_id)
    try:
        guard.open(purpose=f"a server with {spec.model}", timeout=spec.limits.gpus, say=say)
        for warning in guard.warnings:
            say(warning)
    except BaseException:
        with Teardown() as down:
            down.step("GPUs", guard.close)
            down.step("server", running.end)
        raise
    return guard


def _held(device: Return) -> str:
    return device.unknown or "; ".join(device.holders) or "the driver names nobody"
