"""The options of the command line and of the pytest plugin: one table for both, and what all of
them together ask for.

The plugin is imported by every pytest run where the package is installed, so nothing heavy is
imported here until options are settled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sglang_harness.runtime import Runtime
    from sglang_harness.runtime.attach import Attachment
    from sglang_harness.spec import ServerSpec

Kind = Literal["text", "path", "number", "seconds", "list", "flag"]

#: Where options are given: on the command line of ``sglang-harness``, or to the pytest plugin.
Door = Literal["command", "pytest"]


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: ``image`` is ``--image`` on the command line. For pytest it is ``--sglang-image``,
            ``sglang_image`` in an ini file, and ``SGLANG_HARNESS_IMAGE`` in the environment.
        starts: it says how to start a server, so it contradicts ``--url``.
        doors: where it can be given.
        command: its flag on the command line, where that is not ``--NAME``.
    """

    name: str
    help: str
    kind: Kind = "text"
    starts: bool = True
    doors: tuple[Door, ...] = ("command", "pytest")
    command: str = ""

    def flag(self, door: Door) -> str:
        """As it is written at ``door``."""
        if door == "pytest":
            return f"--sglang-{self.name}"
        return self.command or f"--{self.name}"

    @property
    def ini(self) -> str:
        return f"sglang_{self.name.replace('-', '_')}"

    @property
    def variable(self) -> str:
        return f"SGLANG_HARNESS_{self.name.replace('-', '_').upper()}"


_COMMAND: tuple[Door, ...] = ("command",)
_PYTEST: tuple[Door, ...] = ("pytest",)

#: Those that belong to no single runtime; :func:`table` has all.
COMMON = (
    Option("image", "Image to run (default: the pinned one for the device)."),
    Option(
        "version",
        "SGLang version: of the CPU image to build, or of the GPU image.",
        command="--sglang-version",
    ),
    Option(
        "model",
        "A folder, a hub name, 'smollm2' (the default of the command line), 'tiny[:SEED]' (the "
        "default of pytest), or a tiny model of another architecture: tiny-qwen2, tiny-qwen3, "
        "tiny-qwen3-moe, tiny-mixtral; or a random Llama in bfloat16: random-1.2b, random-3b.",
        starts=False,
    ),
    Option("device", "auto, cpu or gpu."),
    Option("gpus", "all, or indices or UUIDs separated by commas."),
    Option("pull", "When to pull the image: missing, always or never.", doors=_COMMAND),
    Option("port", "Port on this machine (default: a free one).", "number", doors=_COMMAND),
    Option("spec", "YAML file with fields of a server spec; options override it.", "path"),
    Option("server-arg", "An SGLang flag, NAME=VALUE or NAME. Repeatable.", "list"),
    Option("runtime", "How to start servers: auto (the default), docker, ..."),
    Option(
        "url",
        "Attach to a running server instead of starting one; its key comes from SGLANG_API_KEY.",
        starts=False,
    ),
    Option(
        "allow-changes",
        "With a URL: also run what modifies the server and then restores it.",
        "flag",
        starts=False,
    ),
    Option(
        "share",
        "With a URL: LOCAL:INSIDE, a folder that the server sees too, and its path there.",
        starts=False,
    ),
    Option(
        "start",
        "auto, cold (as the image starts a server) or warm (forked from a parent that has imported "
        "SGLang).",
    ),
    Option("start-timeout", "Limit in seconds until the first generation.", "seconds"),
    Option(
        "check-timeout", "Limit in seconds for a check.", "seconds", starts=False, doors=_COMMAND
    ),
    Option("run-timeout", "Limit in seconds for the run.", "seconds", starts=False, doors=_COMMAND),
    Option(
        "keep-on-failure",
        "Keep the server running unless the verdict is pass.",
        "flag",
        doors=_COMMAND,
    ),
    Option(
        "own-server",
        "With pytest-xdist: one server for each worker.",
        "flag",
        starts=False,
        doors=_PYTEST,
    ),
    Option(
        "lease-timeout",
        "With pytest-xdist: seconds to wait for the shared server (default: 1800).",
        "seconds",
        starts=False,
        doors=_PYTEST,
    ),
)


def of_runtimes() -> tuple[Option, ...]:
    """Those that belong to one runtime, as the registry of runtimes has them."""
    from sglang_harness.runtime.registry import KINDS

    return tuple(
        Option(
            option.name,
            f"Runtime {kind.name}: {option.help}.",
            "path" if option.is_path else "text",
        )
        for kind in KINDS
        for option in kind.options
    )


def table() -> tuple[Option, ...]:
    """All options. Imports the runtimes."""
    from sglang_harness.runtime.registry import NAMES

    every: list[Option] = []
    for option in COMMON:
        if option.name == "runtime":
            names = ", ".join(NAMES)
            every.append(replace(option, help=f"How to start servers: {names} (default: auto)."))
            every += of_runtimes()
        else:
            every.append(option)
    return tuple(every)


def at(door: Door) -> tuple[Option, ...]:
    """The options that can be given at ``door``."""
    return tuple(option for option in table() if door in option.doors)


@dataclass(frozen=True)
class Wanted:
    """What options ask for."""

    spec: ServerSpec
    runtime: Runtime


def settle(values: Mapping[str, Any], door: Door, *, default_model: str | None = None) -> Wanted:
    """The spec and the runtime that options ask for.

    Args:
        values: by an option's name; ``None``, false and empty ones were not given.
        default_model: where no model, spec or URL was given.

    Raises:
        SpecError: invalid or contradictory values.
    """
    from sglang_harness.runtime import registry
    from sglang_harness.spec import from_options

    given = {n: v for n, v in values.items() if v not in (None, False, "", [], ())}
    attachment = attached(given, door)
    model = given.get("model")
    if model is None and attachment is None and "spec" not in given:
        model = default_model
    file = given.get("spec")
    spec = from_options(
        None if file is None else Path(file),
        {name: seconds(given, f"{name}-timeout", door) for name in ("start", "check", "run")},
        given.get("server-arg"),
        model=model,
        sglang_version=given.get("version"),
        **{name: given.get(name) for name in ("image", "device", "gpus", "pull", "port", "start")},
    )
    runtime = attachment or registry.choose(
        given.get("runtime", "auto"),
        {option.name: given.get(option.name) for option in registry.OPTIONS},
        prefix="--sglang-" if door == "pytest" else "--",
    )
    return Wanted(spec, runtime)


def seconds(given: Mapping[str, Any], name: str, door: Door) -> float | None:
    """The value of the option ``name`` as a number; ``None`` where it was not given.

    Raises:
        SpecError: it is not a number.
    """
    from sglang_harness.errors import SpecError

    if name not in given:
        return None
    try:
        return float(given[name])
    except ValueError:
        flag = next(option.flag(door) for option in COMMON if option.name == name)
        raise SpecError(f"{flag} {given[name]!r} is not a number of seconds.") from None


def attached(given: Mapping[str, Any], door: Door) -> Attachment | None:
    """The running server that ``--url`` and the options beside it name; ``None`` without a URL.

    The key comes from ``SGLANG_API_KEY``. Of a server that this user keeps, the key, the model and
    the folder that both sides see are on record.

    Raises:
        SpecError: invalid or contradictory values.
    """
    from sglang_harness.errors import SpecError
    from sglang_harness.runtime.attach import Attachment, SharedFolder
    from sglang_harness.runtime.path_map import EXCHANGE
    from sglang_harness.upkeep import kept_servers

    every = table()
    flags = {option.name: option.flag(door) for option in every}
    url = given.get("url")
    if url is None:
        for name in ("allow-changes", "share"):
            if name in given:
                raise SpecError(
                    f"{flags[name]} applies to a running server, and {flags['url']} is missing."
                )
        if given.get("runtime") == "attach":
            raise SpecError(f"The runtime 'attach' needs the server's URL: {flags['url']}.")
        return None
    chosen = given.get("runtime") not in (None, "auto", "attach")
    for option in every:
        if option.starts and option.name in given and (option.name != "runtime" or chosen):
            raise SpecError(
                f"{flags['url']} names a running server, and {flags[option.name]} says how to "
                "start one.",
                advice="Give one of the two.",
            )
    kept = kept_servers.held_at(url)
    shared = SharedFolder.parse(given["share"]) if "share" in given else None
    if shared is None and kept and kept.folder and Path(kept.folder).is_dir():
        shared = SharedFolder(Path(kept.folder), EXCHANGE)
    return Attachment(
        url,
        api_key=os.environ.get("SGLANG_API_KEY") or (kept.api_key if kept else None),
        allow_changes=bool(given.get("allow-changes")),
        shared=shared,
        model=Path(kept.model) if kept and kept.model and Path(kept.model).is_dir() else None,
    )
