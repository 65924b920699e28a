"""The plugin's options: command line over ini file over environment, settled before anything
starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_harness import options
from sglang_harness.options import Option

if TYPE_CHECKING:
    from sglang_harness.runtime import Runtime
    from sglang_harness.spec import ServerSpec

#: Precedence of each source of an option: the lowest number wins.
COMMAND_LINE, INI, ENVIRONMENT = 0, 1, 2


@dataclass(frozen=True)
class Given:
    """A value, and the precedence of the source that it comes from."""

    value: Any
    source: int


@dataclass(frozen=True)
class Wanted:
    """What all options together ask for."""

    spec: ServerSpec
    runtime: Runtime
    own_server: bool
    lease_timeout: float


def gather(
    command_line: Callable[[str], Any],
    ini: Callable[[str], Any],
    environment: Mapping[str, str],
) -> dict[str, Given]:
    """The value of each option that was given, from its highest-precedence source.

    Args:
        command_line: the parsed value by the option's name; ``None``, false or empty: not given.
        ini: the same for the ini file.
    """
    found = {}
    for option in options.at("pytest"):
        written = environment.get(option.variable, "")
        sources = (
            (COMMAND_LINE, command_line(option.name)),
            (INI, ini(option.name)),
            (ENVIRONMENT, _from_environment(option, written) if written else None),
        )
        for source, value in sources:
            if value not in (None, False, "", []):
                found[option.name] = Given(value, source)
                break
    return _without_overridden(found)


def _from_environment(option: Option, text: str) -> Any:
    from sglang_harness.errors import SpecError

    if option.kind == "list":
        return text.split()
    if option.kind == "flag":
        values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in values:
            raise SpecError(f"{option.variable} is {text!r}, expected 1 or 0.")
        return values[text.lower()]
    return text


def _without_overridden(given: dict[str, Given]) -> dict[str, Given]:
    """Of options that exclude each other, those of the higher-precedence source stay. A
    contradiction within one source stays too, and is refused by :func:`settle`."""
    starts = {option.name for option in options.at("pytest") if option.starts}
    with_url = {"url", "allow-changes", "share"}
    for one, other in ((with_url, starts), ({"image"}, {"version"})):
        sources = [
            min((g.source for name, g in given.items() if name in side), default=None)
            for side in (one, other)
        ]
        if None in sources or sources[0] == sources[1]:
            continue
        overridden = one if (sources[0] or 0) > (sources[1] or 0) else other
        highest = min(s for s in sources if s is not None)
        given = {n: g for n, g in given.items() if n not in overridden or g.source <= highest}
    return given


def settle(given: Mapping[str, Given]) -> Wanted:
    """The spec and the runtime that ``given`` ask for.

    Raises:
        SpecError: invalid or contradictory values.
    """
    values = {name: each.value for name, each in given.items()}
    # The seeded tiny model: a test's first start should take seconds, not minutes.
    wanted = options.settle(values, "pytest", default_model="tiny")
    patience = options.seconds(values, "lease-timeout", "pytest")
    return Wanted(
        spec=wanted.spec,
        runtime=wanted.runtime,
        own_server=bool(values.get("own-server")),
        lease_timeout=1800.0 if patience is None else patience,
    )
