"""What a push needs of the server that it goes to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from sglang_harness.client import Client
    from sglang_harness.runtime import Running
    from sglang_harness.spec import ServerSpec


class Target(Protocol):
    """One running server, as far as pushing is concerned.
    :class:`sglang_harness.server.Server` is one."""

    @property
    def spec(self) -> ServerSpec:
        """What was asked for; its limits bound a push."""

    @property
    def client(self) -> Client: ...

    @property
    def running(self) -> Running:
        """The process or container behind it, which also says how files get there."""

    @property
    def model(self) -> Path | None:
        """The served model's folder on this machine; ``None`` where it is not here."""

    @property
    def device(self) -> Literal["cpu", "gpu"]: ...

    @property
    def may_change(self) -> bool:
        """False for a server that is only observed."""
