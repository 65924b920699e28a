"""Checks of other packages, found by the entry point ``sglang_harness.checks``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from sglang_harness.errors import HarnessError, SpecError
from sglang_harness.suite.check import registered

GROUP = "sglang_harness.checks"


@dataclass(frozen=True)
class Added:
    """The checks that one package has added to the suite."""

    package: str
    version: str
    checks: tuple[str, ...]


_ADDED: dict[str, Added] = {}


def load() -> list[Added]:
    """Imports the checks of every installed package, once per process; ``@register`` adds them.

    Raises:
        SpecError: the checks of a package cannot be imported, register nothing, or reuse an id.
            The run ends, because a suite with missing checks would look like one that passed.
    """
    for point in sorted(entry_points(group=GROUP), key=lambda p: (_package(p), p.name)):
        if point.value not in _ADDED:
            _ADDED[point.value] = _load(point)
    return list(_ADDED.values())


def _load(point: EntryPoint) -> Added:
    before = registered()
    try:
        point.load()
    except HarnessError as error:
        raise SpecError(
            f"The checks of {_package(point)} ({point.value}) cannot be added: {error}",
            advice="Fix that package or uninstall it.",
        ) from None
    except Exception as error:
        raise SpecError(
            f"The checks of {_package(point)} ({point.value}) cannot be imported: "
            f"{type(error).__name__}: {error}.",
            advice="Fix that package or uninstall it.",
        ) from error
    added = tuple(name for name in registered() if name not in before)
    if not added:
        raise SpecError(
            f"The checks of {_package(point)} ({point.value}) cannot be added: "
            "the module does not register any.",
            advice="Decorate each check in that module with @register.",
        )
    version = point.dist.version if point.dist is not None else ""
    return Added(_package(point), version, added)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed package"
