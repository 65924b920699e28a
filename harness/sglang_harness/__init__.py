"""Tells, with evidence, whether an SGLang server can be trusted.

The public names; everything else may move between minor versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Client",
    "HarnessError",
    "SGLangContainer",
    "Server",
    "ServerDied",
    "ServerSpec",
    "Verdict",
    "__version__",
]

if TYPE_CHECKING:
    from sglang_harness.client import Client
    from sglang_harness.container import SGLangContainer
    from sglang_harness.errors import HarnessError, ServerDied
    from sglang_harness.server import Server
    from sglang_harness.spec import ServerSpec
    from sglang_harness.verdict import Verdict

_HOMES = {
    "Client": "client",
    "HarnessError": "errors",
    "SGLangContainer": "container",
    "Server": "server",
    "ServerDied": "errors",
    "ServerSpec": "spec",
    "Verdict": "verdict",
}


def __getattr__(name: str) -> Any:
    # Imported when used: 'import sglang_harness' alone costs milliseconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
