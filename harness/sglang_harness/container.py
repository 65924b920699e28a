"""A Testcontainers container for anyone's tests: SGLang that answers when ``with`` begins."""

from __future__ import annotations

import re
import sys
from typing import Any

from docker.types import EndpointConfig
from docker.version import __version__ as docker_version
from testcontainers.core.waiting_utils import WaitStrategy, WaitStrategyTarget

from sglang_harness import checkpoint
from sglang_harness._base.permissions import check_readable
from sglang_harness._base.teardown import Teardown
from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import DeviceNotIdle, SpecError
from sglang_harness.memory.gpu.guard import Guard
from sglang_harness.runtime.container import PORT
from sglang_harness.runtime.device import within_visible
from sglang_harness.runtime.docker import SGLangServerContainer, prepare
from sglang_harness.server.readiness import StartReport, wait_until_ready
from sglang_harness.spec import ServerSpec

#: Keywords of ``with_kwargs`` that would take the server apart, with what to use instead.
REFUSED_KWARGS = {
    "command": "Give SGLang's flags with server_args.",
    "entrypoint": "The server's key and flags go through the harness's own.",
    "environment": "Use with_env, or the field environment.",
    "name": "Use with_name.",
    "network": "Use with_network.",
    "network_mode": "Use with_network: the server is reached at a published port.",
    "networking_config": "Use with_network and with_network_aliases.",
    "ports": "Use with_exposed_ports, with_bind_ports, or the field port.",
    "volumes": "Use with_volume_mapping.",
    "auto_remove": "stop() removes it, after its log and exit code were read.",
}


class AnswersGeneration(WaitStrategy):
    """Waits for a real generation; fails at once, with the reason, when the server dies.

    Attributes:
        report: how the server came up; ``None`` before it has.
        then: another strategy, to be waited for afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report: StartReport | None = None
        self.then: WaitStrategy | None = None

    def wait_until_ready(self, container: WaitStrategyTarget) -> None:
        """Raises :class:`ServerDied`, :class:`ServerLost` or :class:`StartTimeout`, and whatever
        ``then`` raises."""
        if not isinstance(container, SGLangServerContainer):
            raise TypeError("AnswersGeneration waits for a container that runs SGLang")
        self.report = wait_until_ready(
            container.address,
            api_key=container.api_key,
            watch=container.watch,
            limit=container.spec.limits.start,
            started=container.started_at,
            last_log_line=lambda: container.logs(tail=1).strip(),
            redactor=container.spec.redactor(container.api_key),
        )
        if self.then is not None:
            self.then.wait_until_ready(container)


class SGLangContainer(SGLangServerContainer):
    """Starts SGLang in a container and waits until it has generated a token.

    ::

        with SGLangContainer(model="tiny") as sglang:
            print(sglang.client.generate("Hello").text)

    Testcontainers' builders add to the container, and never take away what the server needs.
    Differences from Testcontainers: ports are published on ``publish_on`` (loopback by default),
    ``with_kwargs`` adds to the harness's settings instead of replacing them, ``waiting_for`` waits
    after the first generation, and ``with_command`` is refused.

    Args:
        spec: what to run; or its fields as keywords (``model=...``, ``image=...``).

    Raises:
        SpecError, ImageError, ModelError, EngineError: it could not be started.
        ServerDied, ServerLost, StartTimeout: from ``start``; it never answered.
    """

    def __init__(self, spec: ServerSpec | None = None, **fields: Any) -> None:
        spec = within_visible(ServerSpec.make(**fields) if spec is None else spec)
        if spec.start == "warm":
            raise SpecError(
                "An SGLangContainer always starts cold, and start='warm' was given.",
                advice="Use Server.start, or the pytest plugin's fixtures, for a warm start.",
            )
        model = checkpoint.locate(spec.model, lambda _: None)
        if model is not None:
            check_readable(model)
        device, image = prepare(spec, lambda _: None)
        super().__init__(spec, model=model, image=image, device=device)
        self._answers = AnswersGeneration()
        self._wait_strategy = self._answers
        self._client: Client | None = None
        self._guard: Guard | None = None

    def start(self) -> SGLangContainer:
        """Starts it and waits for its first token; on GPUs that no other run has.

        Raises:
            LeaseTaken, TelemetryError, DeviceNotIdle: its GPUs are leased by another run, do not
                answer, or are not idle. Nothing was started.
            SpecError: network aliases without a network.
            ServerDied, ServerLost, StartTimeout: it never answered.
        """
        if self._network_aliases and self._network is None:
            raise SpecError(
                "with_network_aliases was given without with_network.",
                advice="Aliases are names in a network: add with_network(...).",
            )
        # The user's own key, where with_env gave one.
        self.api_key = self.env.get("SGLANG_API_KEY") or None
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
        client, guard = self._client, self._guard
        self._client = self._guard = None
        end = super().end
        with Teardown(self._failures) as down:
            if client is not None:
                down.step("HTTP client", client.close)
            down.step("container", lambda: end(at_once=at_once))
            devices = down.step("GPUs", guard.close) if guard is not None else None
        kept = [d for d in devices or () if not d.given_back]
        if kept and sys.exc_info()[1] is None:
            raise DeviceNotIdle(
                f"GPU {kept[0].uuid} was not given back: "
                f"{kept[0].unknown or '; '.join(kept[0].holders) or 'the driver names no process'}."
            )
        return self._exit_code

    @property
    def report(self) -> StartReport | None:
        """How it came up, phase by phase; ``None`` before ``start``."""
        return self._answers.report

    @property
    def client(self) -> Client:
        """The HTTP remote control, with the time-outs of ``spec.limits``; closed at the end."""
        if self._client is None:
            limits = self.spec.limits
            transport = RequestsTransport(
                self.address, api_key=self.api_key, read_timeout=limits.request
            )
            self._client = Client(
                transport, watch=self.watch, timeout=limits.request, cleanup=limits.start
            )
        return self._client

    # --- Testcontainers' builders ---------------------------------------------------------------

    def with_kwargs(self, **kwargs: Any) -> SGLangContainer:
        """Adds arguments of ``docker.containers.create``. Lists and dictionaries are added to the
        harness's own, other values replace them; its labels stay.

        Raises:
            SpecError: an argument that the server depends on, or that has a builder of its own.
        """
        for name, value in kwargs.items():
            if name in REFUSED_KWARGS:
                raise SpecError(
                    f"with_kwargs({name}=...) cannot be used for an SGLangContainer.",
                    advice=REFUSED_KWARGS[name],
                )
            own = self._kwargs.get(name)
            if isinstance(own, dict) and isinstance(value, dict):
                value = {**own, **value, **(own if name == "labels" else {})}
            elif isinstance(own, list) and isinstance(value, list):
                value = [*own, *value]
            self._kwargs[name] = value
        return self

    def with_command(self, command: str | list[str]) -> SGLangContainer:
        """Refused: it would replace SGLang's arguments.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            f"with_command({command!r}) would replace SGLang's arguments.",
            advice="Give flags with server_args, such as server_args={'tp-size': 2}.",
        )

    def with_exposed_ports(self, *ports: str | int) -> SGLangContainer:
        """Publishes further ports at free ones of ``publish_on``."""
        for port in ports:
            self._publish(str(port), None)
        return self

    def with_bind_ports(
        self, container: str | int, host: str | int | None = None
    ) -> SGLangContainer:
        """Publishes a port at ``host`` of ``publish_on``; SGLang's own is 30000."""
        before = self.ports
        self.ports = {}
        try:
            super().with_bind_ports(container, host)
            added = self.ports
        finally:
            self.ports = before
        for port, where in added.items():
            self._publish(port, where)
        return self

    def _publish(self, port: str, host: int | None) -> None:
        name = port if "/" in port else f"{port}/tcp"
        if host is None and name == f"{PORT}/tcp":
            return  # it is published already, perhaps at a port that was asked for
        self.ports[name] = (self.spec.publish_on, host)  # type: ignore[assignment]

    def with_tmpfs_mount(self, container_path: str, size: str | None = None) -> SGLangContainer:
        """Mounts memory as a folder, of at most ``size`` (``256m``)."""
        plain = size is not None and re.fullmatch(r"\d+[a-zA-Z]*", size)
        return super().with_tmpfs_mount(container_path, f"size={size}" if plain else size)

    def waiting_for(self, strategy: WaitStrategy) -> SGLangContainer:
        """Waits for ``strategy``, too, once a token was generated."""
        self._answers.then = strategy
        return self

    def _added(self) -> dict[str, Any]:
        added: dict[str, Any] = {"volumes": {host: dict(m) for host, m in self.volumes.items()}}
        if self._network is not None:
            endpoint = EndpointConfig(docker_version, aliases=self._network_aliases)
            added["network"] = self._network.name
            added["networking_config"] = {self._network.name: endpoint}
        if self._transferable_specs:
            # The engine puts no files into a container whose root is read-only.
            added["read_only"] = False
        return added

    def _fill(self) -> None:
        for what in self._transferable_specs:
            self._transfer_into_container(*what)
