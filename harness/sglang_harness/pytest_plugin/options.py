"""The plugin's options: command line over ini over environment, settled before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sglang_harness.runtime import Runtime
    from sglang_harness.spec import ServerSpec

#: How loud each place of an option is: the lowest number wins.
COMMAND_LINE, INI, ENVIRONMENT = 0, 1, 2


Kind = Literal["text", "flag", "list"]


@dataclass(frozen=True)
class Option:
    """One option, in its three places.

    Attributes:
        name: ``image`` is ``--sglang-image``, ``sglang_image`` in an ini file, and
            ``SGLANG_HARNESS_IMAGE`` in the environment.
        starts: it says how to start a server, so it contradicts the address of one.
    """

    name: str
    help: str
    kind: Kind = "text"
    starts: bool = True

    @property
    def flag(self) -> str:
        return f"--sglang-{self.name}"

    @property
    def ini(self) -> str:
        return f"sglang_{self.name.replace('-', '_')}"

    @property
    def variable(self) -> str:
        return f"SGLANG_HARNESS_{self.name.replace('-', '_').upper()}"


def _other(name: str, help: str, kind: Kind = "text") -> Option:
    return Option(name, help, kind, starts=False)


OPTIONS = (
    Option("image", "image to run; without it the pinned one for the device"),
    Option("version", "SGLang version to build for the CPU, or of the GPU image"),
    Option("device", "auto, cpu or gpu"),
    Option("gpus", "all, or indices or UUIDs joined by commas"),
    Option("runtime", "auto, docker, compose, process or attach"),
    Option("python", "runtime process: a Python that has SGLang"),
    Option("compose-file", "runtime compose: a compose file of yours"),
    Option("compose-service", "runtime compose: which service of your file"),
    Option("spec", "YAML file with the fields of a server spec; other options win over it"),
    Option("server-arg", "a flag of SGLang's, name=value or name; repeatable", kind="list"),
    Option("start", "auto, cold, or warm: forked from a parent that has imported SGLang"),
    Option("start-timeout", "seconds until the first generation"),
    _other("model", "a folder, a hub name, 'smollm2' or 'tiny[:SEED]' (default: tiny)"),
    _other("url", "use a server that runs already; its key comes from SGLANG_API_KEY"),
    _other("allow-changes", "with a URL: also what changes it and is put back", "flag"),
    _other("share", "with a URL: LOCAL:INSIDE, a folder that the server sees too"),
    _other("own-server", "under pytest-xdist: a server for each worker", "flag"),
    _other("lease-timeout", "under pytest-xdist: seconds to wait for the server (1800)"),
)


@dataclass(frozen=True)
class Given:
    """A value, and how loud the place is that it comes from."""

    value: Any
    place: int


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
    """What was given for each option, from its loudest place; silent ones are left out.

    Args:
        command_line: the parsed value by the option's name; ``None``, false or empty: not given.
        ini: the same for the ini file.
    """
    found = {}
    for option in OPTIONS:
        written = environment.get(option.variable, "")
        places = (
            (COMMAND_LINE, command_line(option.name)),
            (INI, ini(option.name)),
            (ENVIRONMENT, _from_environment(option, written) if written else None),
        )
        for place, value in places:
            if value not in (None, False, "", []):
                found[option.name] = Given(value, place)
                break
    return _without_the_outvoted(found)


def _from_environment(option: Option, text: str) -> Any:
    from sglang_harness.errors import SpecError

    if option.kind == "list":
        return text.split()
    if option.kind == "flag":
        meant = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in meant:
            raise SpecError(f"{option.variable} is {text!r}, expected 1 or 0.")
        return meant[text.lower()]
    return text


def _without_the_outvoted(given: dict[str, Given]) -> dict[str, Given]:
    """Between options that exclude each other the louder place decides; what contradicts in
    one place stays, and is refused by whoever reads it."""
    starts = {option.name for option in OPTIONS if option.starts}
    with_url = {"url", "allow-changes", "share"}
    for one, other in ((with_url, starts), ({"image"}, {"version"})):
        places = [
            min((g.place for name, g in given.items() if name in side), default=None)
            for side in (one, other)
        ]
        if None in places or places[0] == places[1]:
            continue
        quiet = one if (places[0] or 0) > (places[1] or 0) else other
        loud = min(p for p in places if p is not None)
        given = {n: g for n, g in given.items() if n not in quiet or g.place <= loud}
    return given


def settle(given: Mapping[str, Given]) -> Wanted:
    """The spec and the runtime that ``given`` mean.

    Raises:
        SpecError: options contradict each other, or cannot be meant.
    """
    from sglang_harness.errors import SpecError
    from sglang_harness.runtime.registry import OPTIONS as RUNTIME_OPTIONS
    from sglang_harness.runtime.registry import choose
    from sglang_harness.spec import from_options
    from sglang_harness.upkeep import kept_servers

    values = {name: each.value for name, each in given.items()}

    def seconds(name: str) -> float | None:
        if name not in values:
            return None
        try:
            return float(values[name])
        except ValueError:
            raise SpecError(f"--sglang-{name} {values[name]!r} is no number of seconds.") from None

    def path(name: str) -> Path | None:
        return Path(values[name]) if name in values else None

    attachment = kept_servers.attachment(
        values.get("url"),
        allow_changes=bool(values.get("allow-changes")),
        share=values.get("share"),
        contradicting={
            option.flag: values.get(option.name)
            for option in OPTIONS
            if option.starts and values.get(option.name) not in ("auto", "attach")
        }
        | ({"--sglang-runtime": "attach"} if _attach_without_url(values) else {}),
        prefix="--sglang-",
    )
    fields = {
        "image": values.get("image"),
        "sglang_version": values.get("version"),
        # The seeded tiny model: a test's first start should take seconds, not minutes.
        "model": values.get("model") or (None if attachment or "spec" in values else "tiny"),
        "device": values.get("device"),
        "gpus": values.get("gpus"),
        "start": values.get("start"),
    }
    spec = from_options(
        path("spec"), {"start": seconds("start-timeout")}, values.get("server-arg"), **fields
    )
    runtime = attachment or choose(
        values.get("runtime", "auto"),
        {option.name: values.get(option.name) for option in RUNTIME_OPTIONS},
        prefix="--sglang-",
    )
    patience = seconds("lease-timeout")
    return Wanted(
        spec=spec,
        runtime=runtime,
        own_server=bool(values.get("own-server")),
        lease_timeout=1800.0 if patience is None else patience,
    )


def _attach_without_url(values: Mapping[str, Any]) -> bool:
    return values.get("runtime") == "attach" and "url" not in values
