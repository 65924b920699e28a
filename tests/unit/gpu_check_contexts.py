"""Contexts for parts of gpu-check without the processes around them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sglang_harness.gpu_check.context import Context
from sglang_harness.gpu_check.servers import Servers
from sglang_harness.gpu_check.settings import Release, Settings


class ScriptedServers(Servers):
    """Servers of a scripted runtime."""

    def __init__(self, *words: Any, runtime: Any) -> None:
        super().__init__(*words)
        self._scripted = runtime

    def runtime(self) -> Any:
        return self._scripted


def context(
    out: Path,
    *,
    runtime: Any = None,
    part: str = "some-part",
    python: Path | None = None,
    seconds: float = 60.0,
    earlier: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> tuple[Context, list[dict[str, Any]]]:
    """A context, and what is reported through it."""
    reports: list[dict[str, Any]] = []
    release = Release(version="0.5.23", python=python)
    given = Settings(
        **{
            "out": out,
            "device": "cpu",
            "releases": [release],
            "ends_at": time.time() + seconds,
            "models": out,
            **settings,
        }
    )
    servers = ScriptedServers(given, release, reports.append, {}, runtime=runtime)
    made = Context(
        given,
        release,
        part,
        ends_at=time.time() + seconds,
        report=reports.append,
        servers=lambda: servers,
        earlier=earlier or {},
    )
    return made, reports


def figures(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What was put down, the last of each key."""
    return {each["key"]: each["value"] for each in reports if each["kind"] == "put"}


def headline(reports: list[dict[str, Any]]) -> str:
    return str([each["text"] for each in reports if each["kind"] == "headline"][-1])
