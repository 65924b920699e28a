"""What a kit is asked for, from the options of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from sglang_harness._base import bounded
from sglang_harness.errors import KitError
from sglang_harness.kit.lock import Lock, shipped
from sglang_harness.kit.releases import catalogue
from sglang_harness.kit.target import Target

#: The largest archive, in MiB, where nobody says otherwise.
LARGEST = 58.0

#: The target where nobody names one.
USUAL_TARGET = "h100-python3.12-torch2.11-cuda13"

#: Seconds that a Python has to describe its host in.
DESCRIBE_WITHIN = 120.0


@dataclass(frozen=True)
class Request:
    """A kit that is wanted.

    Attributes:
        versions: of SGLang; empty: see :meth:`Catalogue.choose`.
        lock: what goes in; ``None``: it is resolved, with an index.
        out: the archive; ``None``: by its own name in this folder.
        largest: MiB that it may have.
        kernels: ``False``: for a rehearsal on a CPU, without SGLang's kernels.
    """

    target: Target
    versions: list[str] = field(default_factory=list)
    lock: Lock | None = None
    out: Path | None = None
    largest: float = LARGEST
    kernels: bool = True


@dataclass(frozen=True)
class Host:
    """A target by what a person knows of it."""

    python: str | None = None
    torch: str | None = None
    cuda: str | None = None
    installed: Path | None = None

    def named(self) -> list[str]:
        """The options that were given."""
        options = {
            "--python-version": self.python,
            "--torch": self.torch,
            "--cuda": self.cuda,
            "--installed": self.installed,
        }
        return [option for option, value in options.items() if value is not None]


def request(
    *,
    target: str | None,
    host: Host,
    gpu: str | None,
    versions: list[str],
    lock: Path | None,
    out: Path | None,
    largest: float,
) -> Request:
    """The request that the options make.

    Args:
        target: a file or a name; ``None``: ``host``, or the usual one where that says nothing.
        gpu: a generation, in place of what the target's description has; ``none``: a kit without
            kernels.
        versions: of SGLang; empty: those of ``lock``, or the newest for the target's torch.
        lock: in place of the one that comes with a shipped target.

    Raises:
        KitError: they contradict each other, or one is not what it has to be.
    """
    kernels = gpu != "none"
    if host.named():
        wanted = _of_host(host, target, gpu if kernels else None)
        name = ""
    else:
        name = target or USUAL_TARGET
        wanted = Target.read(name)
        if gpu is not None:
            wanted = wanted.on(gpu if kernels else None)
    chosen = None if lock is None else Lock.read(lock)
    if chosen is not None:
        versions = versions or list(chosen.releases)
    elif there := shipped(name):
        # A shipped lock has the usual releases; for others it is made anew.
        of = catalogue().choose(wanted.torch_release or "", versions)
        if there.releases == tuple(release.version for release in of) and kernels:
            chosen = there
    return Request(wanted, versions, chosen, out, largest, kernels)


def _of_host(host: Host, target: str | None, gpu: str | None) -> Target:
    if target is not None:
        raise KitError(
            f"--target and {host.named()[0]} both say what host it is: give one of them."
        )
    if host.python is None or host.torch is None:
        missing = "--python-version" if host.python is None else "--torch"
        raise KitError(f"A host without a description needs {missing} as well.")
    return Target.from_options(
        python=host.python,
        torch=host.torch,
        cuda=host.cuda or str(catalogue().cuda),
        gpu=gpu,
        installed=host.installed,
    )


def script() -> str:
    """``describe.py`` itself, to be carried to a host."""
    return (resources.files(__package__) / "describe.py").read_text(encoding="utf-8")


def described(python: Path | None) -> str:
    """What ``describe.py`` says under a Python of this host; ``None``: this one.

    Raises:
        KitError: that Python cannot run it.
    """
    program = sys.executable if python is None else str(python)
    file = resources.files(__package__) / "describe.py"
    try:
        # As a person runs it there: torch may be in the user's own site. Not from this folder.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        ended = bounded.run([program, str(file)], within=DESCRIBE_WITHIN, environment=environment)
    except OSError as error:
        raise KitError(f"{program} cannot be started: {error.strerror}.") from None
    except subprocess.TimeoutExpired:
        raise KitError(
            f"{program} did not describe its host within {DESCRIBE_WITHIN:g} s."
        ) from None
    text = "\n".join(ended.output)
    try:
        json.loads(text)
    except ValueError:
        last = (ended.errors or ended.output or ["it printed nothing"])[-1]
        raise KitError(
            f"{program} cannot describe its host: {last[:300]}",
            advice="It has to be a Python from 3.10 on.",
        ) from None
    return text
