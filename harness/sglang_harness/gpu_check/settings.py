"""What one run of gpu-check is to do. The child processes get it as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.spec import Argument


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Release(_Data):
    """One SGLang to start servers with.

    Attributes:
        version: such as ``0.5.23``.
        python: that has it; ``None``: what the runtime takes by itself (an image, or the harness's
            own environment for the CPU).
        server_args: flags that every server of it needs.
        environment: variables of its servers.
        caveats: what its results do not say, a sentence each.
    """

    version: str
    python: Path | None = None
    server_args: dict[str, Argument] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    caveats: list[str] = Field(default_factory=list)


class Settings(_Data):
    """One run.

    Attributes:
        out: folder of the results.
        device: ``gpu``, or ``cpu`` for a rehearsal: servers run on the CPU, and parts that need
            CUDA are not run.
        gpus: UUIDs that CUDA can use here, in NVML's order; empty in a rehearsal.
        releases: the first is the primary one: everything in it is made for this torch.
        runtime: how servers are started.
        image: of the runtime ``docker``; ``None``: the pinned one.
        server_args: flags from the command line, for every server; they win over a release's.
        budget_seconds: for everything.
        ends_at: seconds since the epoch at which the budget is used up.
        slow: factor of every time limit.
        models: folder for models that parts make; removed after the run.
        kit: the unpacked kit that this runs from.
        nvml_mock: folder of the mock driver's source; ``None`` where it is not at hand.
    """

    out: Path
    device: Literal["gpu", "cpu"] = "gpu"
    gpus: list[str] = Field(default_factory=list)
    releases: list[Release] = Field(default_factory=list)
    runtime: Literal["process", "docker"] = "process"
    image: str | None = None
    server_args: dict[str, Argument] = Field(default_factory=dict)
    budget_seconds: float = 3600.0
    ends_at: float
    slow: float = 1.0
    models: Path
    kit: Path | None = None
    nvml_mock: Path | None = None


class Order(_Data):
    """A part that a child is to run now.

    Attributes:
        seconds: its time limit.
        log: key of its log.
    """

    part: str
    seconds: float
    log: str


class Job(_Data):
    """What a child process is told first; orders follow, a line each, until its input is closed.

    Attributes:
        table: module whose ``PARTS`` is the table of parts.
        release: of all its parts; ``None`` where they have none.
        earlier: figures of parts that ran before, by the part's name.
        no_server: why a server did not start, by what was asked for: it is not tried again.
        border: text that marks in its output where the next part's begins.
    """

    settings: Settings
    table: str
    release: Release | None
    earlier: dict[str, dict[str, Any]] = Field(default_factory=dict)
    no_server: dict[str, str] = Field(default_factory=dict)
    border: str
