"""A Testcontainers container for anyone's tests: SGLang that answers when ``with`` begins."""

from __future__ import annotations

import sys
from typing import Any

from testcontainers.core.waiting_utils import WaitStrategy, WaitStrategyTarget

from sglang_harness import checkpoint
from sglang_harness._base.permissions import check_readable
from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import DeviceNotIdle, SpecError
from sglang_harness.memory.gpu.guard import Guard
from sglang_harness.runtime.device import within_visible
from sglang_harness.runtime.docker import SGLangServerContainer, prepare
from sglang_harness.server.readiness import StartReport, wait_until_ready
from sglang_harness.spec import ServerSpec


class AnswersGeneration(WaitStrategy):
    """Waits for a real generation; fails at once, with the reason, when the server dies."""

    def __init__(self) -> None:
        super().__init__()
        self.report: StartReport | None = None

    def wait_until_ready(self, container: WaitStrategyTarget) -> None:
        """Raises :class:`ServerDied` or :class:`StartTimeout`."""
        if not isinstance(container, SGLangServerContainer):
            raise TypeError("AnswersGeneration waits for a container that runs SGLang")
        self.report = wait_until_ready(
            container.address,
            api_key=container.api_key,
            watch=container.watch,
            limit=container.spec.limits.start,
            started=container.started_at,
            last_log_line=lambda: container.logs(tail=1).strip(),
        )


class SGLangContainer(SGLangServerContainer):
    """Starts SGLang in a container and waits until it has generated a token.

    ::

        with SGLangContainer(model="tiny") as sglang:
            print(sglang.client.generate("Hello").text)

    Args:
        spec: what to run; or its fields as keywords (``model=...``, ``image=...``).

    Raises:
        SpecError, ImageError, ModelError, EngineError: it could not be started.
        ServerDied, StartTimeout: from ``start``; it never answered.
    """

    def __init__(self, spec: ServerSpec | None = None, **fields: Any) -> None:
        spec = within_visible(ServerSpec.make(**fields) if spec is None else spec)
        if spec.start == "warm":
            raise SpecError(
                "An SGLangContainer is a container of its own, which starts cold.",
                advice="Use Server.start, or the pytest plugin's fixtures, for a warm start.",
            )
        model = checkpoint.locate(spec.model, lambda _: None)
        if model is not None:
            check_readable(model)
        device, image = prepare(spec, lambda _: None)
        super().__init__(spec, model=model, image=image, device=device)
        self._answers = AnswersGeneration()
        self.waiting_for(self._answers)
        self._client: Client | None = None
        self._guard: Guard | None = None

    def start(self) -> SGLangContainer:
        """Starts it and waits for its first token; on GPUs that nobody else has.

        Raises:
            LeaseTaken, TelemetryError, DeviceNotIdle: its GPUs are somebody else's, do not
                answer, or are not idle. Nothing was started.
            ServerDied, StartTimeout: it never answered.
        """
        if self.device == "gpu":
            guard = Guard(self.spec.gpus, run_id=self.run_id)
            self._guard = guard.open(purpose="an SGLangContainer", timeout=self.spec.limits.gpus)
        super().start()
        return self

    def end(self, *, at_once: bool = False) -> int | None:
        """Ends it and waits until its GPUs are free. Again: the same answer.

        Raises:
            DeviceNotIdle: a GPU was not given back, and nothing else is being raised.
        """
        exit_code = super().end(at_once=at_once)
        kept = [d for d in self._guard.close() if not d.given_back] if self._guard else []
        self._guard = None
        if kept and sys.exc_info()[1] is None:
            raise DeviceNotIdle(
                f"GPU {kept[0].uuid} was not given back: "
                f"{kept[0].unknown or '; '.join(kept[0].holders) or 'the driver names nobody'}."
            )
        return exit_code

    @property
    def report(self) -> StartReport | None:
        """How it came up, phase by phase; ``None`` before ``start``."""
        return self._answers.report

    @property
    def client(self) -> Client:
        """The HTTP remote control."""
        if self._client is None:
            transport = RequestsTransport(self.address, api_key=self.api_key)
            self._client = Client(transport, watch=self.watch)
        return self._client
