"""The routes that weights take to a server. A new route is one file in this folder, with
:func:`register` above its class; nothing else names it.

The modules of this folder are imported with it, so the registry is complete once this is."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from sglang_harness.weights.routes.base import (
    Job,
    Needs,
    Route,
    Sent,
    kind,
    make,
    names,
    register,
)

__all__ = ["Job", "Needs", "Route", "Sent", "kind", "make", "markdown", "names", "register"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def markdown() -> str:
    """The table of all routes in ``docs/push-weights.md``; routes that were never run last."""
    rows = ["| route | weights are | needs | |", "|---|---|---|---|"]
    for name in sorted(names(), key=lambda name: bool(kind(name).unverified)):
        route = kind(name)
        cells = [f"`{name}`", route.title, "; ".join(route.needs.described())]
        note = f" **{route.unverified}**" if route.unverified else ""
        rows.append(f"| {' | '.join(cells)} |{note} |")
    return "\n".join(rows) + "\n"
