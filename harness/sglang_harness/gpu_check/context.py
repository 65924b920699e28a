"""What a part is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness.gpu_check.outcomes import TOPICS, NotHere, Topic
from sglang_harness.gpu_check.results import PARTS, plain
from sglang_harness.gpu_check.settings import Release, Settings
from sglang_harness.spec import Argument, ServerSpec

if TYPE_CHECKING:
    # A part that needs no server need not wait a second for what starts one.
    from sglang_harness.gpu_check.servers import Report, Servers
    from sglang_harness.runtime import Runtime
    from sglang_harness.server import Server


class Context:
    """The run, as one part sees it.

    Attributes:
        settings: of the run.
        release: that the part is asked of; ``None`` for one that needs none.
        part: the part's name.
        out: a folder in the results for files of this part; made when it is first asked for.
    """

    def __init__(
        self,
        settings: Settings,
        release: Release | None,
        part: str,
        *,
        ends_at: float,
        report: Report,
        servers: Callable[[], Servers],
        earlier: Mapping[str, dict[str, Any]],
    ) -> None:
        self.settings, self.release, self.part = settings, release, part
        self._ends_at, self._report, self._servers = ends_at, report, servers
        self._earlier = earlier
        self._began = time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """False in a rehearsal on the CPU."""
        return self.settings.device == "gpu"

    @property
    def out(self) -> Path:
        folder = self.settings.out / PARTS / self._key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def _key(self) -> str:
        return self.part if self.release is None else f"{self.part}-{self.release.version}"

    def say(self, text: str) -> None:
        """Writes a line with the time into the part's log."""
        print(f"[{time.monotonic() - self._began:7.2f} s] {text}", flush=True)

    def left(self) -> float:
        """Seconds until the part is stopped; never below 0."""
        return max(0.0, self._ends_at - time.time())

    def put(self, key: str, value: Any) -> None:
        """Puts a figure down at once: it is kept even if the part is stopped. What the part returns
        under the same key replaces it."""
        self._report({"kind": "put", "key": key, "value": plain(value)})

    def note(self, topic: Topic, what: str, value: str) -> None:
        """One line of the summary by topic, such as ``memory``, ``idle use``, ``3 MiB``."""
        if topic not in TOPICS:
            raise ValueError(f"{topic!r} is not a topic of the summary: {', '.join(TOPICS)}")
        self._report({"kind": "note", "topic": topic, "what": str(what), "value": str(value)})

    def headline(self, text: str) -> None:
        """The part's figures in one line, for the summary."""
        self._report({"kind": "headline", "text": str(text)})

    def earlier(self, part: str) -> dict[str, Any]:
        """Figures of a part that ran before, of this release or of none; empty where it has none
        (it did not run, or was stopped before its first figure)."""
        return self._earlier.get(part, {})

    def torch(self) -> Any:
        """torch, with a GPU that it can use.

        Raises:
            NotHere: it is not installed, or sees no GPU.
        """
        try:
            import torch
        except ImportError:
            raise NotHere("torch is not installed") from None
        if not torch.cuda.is_available():
            raise NotHere("torch sees no GPU")
        return torch

    def spec(
        self,
        *,
        model: str | Path = "tiny",
        server_args: Mapping[str, Argument] | None = None,
        environment: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> ServerSpec:
        """The spec of a server of this release.

        Flags come, each winning over those before it, from the release, from the flags that the
        part ``server-flags`` found (its figure ``server_args``), from the command line, and from
        ``server_args``.

        Args:
            fields: further fields of :class:`~sglang_harness.spec.ServerSpec`.

        Raises:
            NotHere: there is no release.
            SpecError: a field makes no sense.
        """
        if self.release is None:
            raise NotHere("there is no SGLang here to start a server with")
        slow, settings = self.settings.slow, self.settings
        found = self.earlier("server-flags").get("server_args") or {}
        seconds = {"start": 150, "check": 60, "request": 60, "stop": 12, "gpus": 30}
        limits = {name: each * slow for name, each in seconds.items()}
        given: dict[str, Any] = {
            "model": str(model),
            "device": settings.device,
            "server_args": {
                **self.release.server_args,
                **found,
                **settings.server_args,
                **(server_args or {}),
            },
            "environment": {**self.release.environment, **(environment or {})},
            "start": "cold",
            **fields,
        }
        given["limits"] = {**limits, **given.get("limits", {})}
        if settings.runtime == "docker":
            if settings.image is not None:
                given.setdefault("image", settings.image)
            else:
                given.setdefault("sglang_version", self.release.version)
        return ServerSpec.make(**given)

    def runtime(self) -> Runtime:
        """How servers of this release are started."""
        return self._servers().runtime()

    def server(
        self,
        *,
        model: str | Path = "tiny",
        server_args: Mapping[str, Argument] | None = None,
        environment: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Server:
        """A running server, shared with the other parts of the group: the one that runs, where the
        same was asked for and it lives, else a new one (the other is ended first). It is ended
        after the group's last part.

        Args: as of :meth:`spec`.

        Raises:
            HarnessError: it did not start.
            NotHere: it did not start, and too little time was left for it; or the same was asked
                for before, and did not start.
        """
        spec = self.spec(model=model, server_args=server_args, environment=environment, **fields)
        within = max(1.0, self.left() - 5.0)
        return self._servers().get(spec, key=self._key, within=within, say=self.say)

    def close_server(self) -> None:
        """Ends the shared server, for a part that starts its own or that has changed it."""
        self._servers().close()
