"""One running SGLang server, with everything that can be asked of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sglang_harness import checkpoint
from sglang_harness.client import Client, RequestsTransport, RetryPolicy
from sglang_harness.errors import ServerDied
from sglang_harness.memory import MemoryLedger, MemorySource
from sglang_harness.memory.container import ContainerMemory
from sglang_harness.memory.nvml import NvmlMemory
from sglang_harness.permissions import check_readable
from sglang_harness.readiness import StartReport, wait_until_ready
from sglang_harness.runtime import Reach, Running
from sglang_harness.runtime.docker import SGLangServerContainer, prepare
from sglang_harness.secrets import Redactor
from sglang_harness.spec import ServerSpec

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stopped:
    """How a server went down when it was asked to."""

    exit_code: int | None
    seconds: float
    left_behind: list[str]


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
        memory: readings at marks; ``before start`` (GPUs), ``container started`` and
            ``ready`` are taken already.
    """

    def __init__(
        self,
        spec: ServerSpec,
        running: Running,
        *,
        model: Path | None,
        device: Literal["cpu", "gpu"],
        report: StartReport,
        memory: MemoryLedger,
    ) -> None:
        self.spec = spec
        self.model = model
        self.device = device
        self.report = report
        self.memory = memory
        self.running = running
        self.redactor = Redactor(running.api_key or "")
        self.client = Client(
            RequestsTransport(
                running.address, api_key=running.api_key, read_timeout=spec.limits.request
            ),
            watch=running.watch,
            retry=RetryPolicy(),
            timeout=spec.limits.request,
        )
        self.lacks: dict[str, str | None] = {}
        """What was asked of the server once: why it lacks something, or ``None``."""
        self.stopped: Stopped | None = None
        self._about: dict[str, Any] | None = None

    @classmethod
    def start(
        cls,
        spec: ServerSpec,
        *,
        say: Say = _quietly,
        run_id: str | None = None,
        held: bool = False,
    ) -> Server:
        """Starts a server in a container and waits until it answers.

        Raises:
            SpecError, EngineError, ImageError, ModelError: it could not be started.
            ServerDied, StartTimeout: it was started and never answered.
        """
        run_id = run_id or uuid.uuid4().hex[:12]
        model = checkpoint.locate(spec.model, say)
        if model is not None:
            check_readable(model)
        device, image = prepare(spec, say)
        container = SGLangServerContainer(
            spec, model=model, image=image, device=device, run_id=run_id, held=held
        )
        gpu_memory: list[MemorySource] = [NvmlMemory(spec.gpus)] if device == "gpu" else []
        before = MemoryLedger(gpu_memory)
        before.mark("before start")
        started = time.monotonic()
        say(f"starting {spec.model} on {image.rsplit('/', 1)[-1]} ({device})")
        container.start()
        try:
            ledger = MemoryLedger([*gpu_memory, ContainerMemory(container.stats)])
            ledger.readings += before.readings
            ledger.mark("container started")
            say("the container runs, and imports SGLang")
            report = wait_until_ready(
                container.address,
                api_key=container.api_key,
                watch=container.watch,
                limit=spec.limits.start,
                started=started,
                last_log_line=lambda: (container.logs(tail=1).strip().splitlines() or [""])[-1],
                say=say,
            )
            ledger.mark("ready")
            return cls(spec, container, model=model, device=device, report=report, memory=ledger)
        except BaseException as error:
            # The log would be gone with the container; whoever reports the failure needs it.
            log = container.logs()
            container.end()
            error.server_log = Redactor(container.api_key).text(log)  # type: ignore[attr-defined]
            raise

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
        """Raises :class:`ServerDied` where the server has ended by itself."""
        if death := self.running.watch.death:
            raise ServerDied(death)

    def stop(self) -> Stopped:
        """Ends the server and removes what belongs to it. Again: the same answer."""
        if self.stopped is None:
            self.client.close()
            started = time.monotonic()
            exit_code = self.running.end()
            seconds = time.monotonic() - started
            self.stopped = Stopped(exit_code, seconds, self.running.left_behind())
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
