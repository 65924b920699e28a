"""From what a person asked for to a run: the machine, the releases, the folder of the results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sglang_harness._base import assets, temporary
from sglang_harness._base.signals import Interruptions, interruptions
from sglang_harness.errors import SpecError
from sglang_harness.gpu_check import machine, record, run_parts
from sglang_harness.gpu_check.machine import Machine, NotRun
from sglang_harness.gpu_check.results import Results
from sglang_harness.gpu_check.settings import Release, Settings
from sglang_harness.kit.record import KitRecord
from sglang_harness.memory.gpu.guard import MIB, OWN_BOUND
from sglang_harness.runtime.process import ask_for_sglang
from sglang_harness.spec import Argument, from_options

#: Seconds for a Python to say which SGLang it has.
ANSWERS_WITHIN = 60.0


@dataclass(frozen=True)
class Request:
    """What the command line asks for; ``None`` and empty lists were not given."""

    device: Literal["gpu", "cpu"] = "gpu"
    kit: Path | None = None
    python: Path | None = None
    runtime: Literal["process", "docker"] = "process"
    image: str | None = None
    budget: float = 3600.0
    slow: float = 1.0
    parts: Sequence[str] = ()
    releases: Sequence[str] = ()
    server_args: dict[str, Argument] = field(default_factory=dict)
    out: Path | None = None


def from_words(
    *,
    device: str,
    runtime: str,
    budget: float,
    slow: float,
    server_args: list[str] | None,
    **others: Any,
) -> Request:
    """What options of the command line mean.

    Raises:
        SpecError: they make no sense.
    """
    if device not in ("gpu", "cpu"):
        raise SpecError(f"--device {device!r} is neither 'gpu' nor 'cpu'.")
    if runtime not in ("process", "docker"):
        raise SpecError(f"--runtime {runtime!r} is neither 'process' nor 'docker'.")
    for name, value in (("budget", budget), ("slow", slow)):
        if not 0 < value < 1e6:
            raise SpecError(f"--{name} {value:g} is not a number above 0.")
    if others["image"] is not None and runtime != "docker":
        raise SpecError("--image names what containers run from.", advice="Add --runtime docker.")
    if runtime == "docker" and (others["kit"] or others["python"]):
        raise SpecError("A kit and a Python run without containers.", advice="Give one of the two.")
    if others["kit"] and others["python"]:
        raise SpecError("A kit has its own Pythons.", advice="Leave --python out.")
    return Request(
        device="cpu" if device == "cpu" else "gpu",
        runtime="docker" if runtime == "docker" else "process",
        budget=budget,
        slow=slow,
        server_args=_arguments(server_args or []),
        **others,
    )


def _arguments(words: list[str]) -> dict[str, Argument]:
    """``name=value`` or ``name`` each, as ``--server-arg`` takes them."""
    return from_options(None, {}, words).server_args


def run(request: Request, say: Callable[[str], None]) -> tuple[Results, Path]:
    """Runs what was asked for; returns the results and their folder.

    Raises:
        NotRun: there is no GPU that can be used.
        SpecError: what was asked for makes no sense, or the folder cannot be written to.
        Interrupted: by Ctrl-C or SIGTERM; the results are written.
    """
    ends_at = time.time() + request.budget
    with interruptions() as signals:
        return _run(request, ends_at, say, signals)


def _run(
    request: Request, ends_at: float, say: Callable[[str], None], signals: Interruptions
) -> tuple[Results, Path]:
    parts = run_parts.chosen(run_parts.table(), request.parts)
    kit = _kit(request.kit)
    here = machine.of_cpu() if request.device == "cpu" else machine.of_gpu()
    if kit is not None:
        _kernels_for(here, kit)
    if here.idle_below is not None:
        # The guard of every server stands by it; its judgement does not: see bounds.idle.
        os.environ[OWN_BOUND] = str(here.idle_below // MIB)
    releases = _releases(request, kit)
    device = here.gpus[0].name if here.gpus else "cpu"
    folder = record.new_folder(request.out or record.default_folder(device, _checkout()))
    with temporary.within_temporary_folder("scratch") as models:
        settings = Settings(
            out=folder,
            device=request.device,
            gpus=[g.uuid for g in here.gpus],
            releases=releases,
            runtime=request.runtime,
            image=request.image,
            server_args=request.server_args,
            budget_seconds=request.budget,
            ends_at=ends_at,
            slow=request.slow,
            models=models,
            kit=request.kit,
            nvml_mock=_nvml_mock(request.kit),
        )
        results = run_parts.results_of(
            settings, here.facts, kit.model_dump(by_alias=True, mode="json") if kit else None
        )
        device = here.gpus[0].name if here.gpus else "the CPU: a rehearsal, no GPU is seen"
        say(f"gpu-check on {device}, for at most {request.budget:.0f} s; results in {folder}")
        run = run_parts.Run(
            settings,
            parts,
            record.Record(folder),
            results,
            say=say,
            left_on_gpus=here.left_on_gpus,
        )
        return run.run(signals), folder


def _kit(folder: Path | None) -> KitRecord | None:
    """What an unpacked kit says of itself: its record lies in the folder, or beside it."""
    if folder is None:
        return None
    for file in (folder / "kit.json", folder.absolute().parent / "kit.json"):
        if file.exists():
            return KitRecord.read(file)
    raise SpecError(f"--kit {folder}: there is no kit.json in it or beside it.")


def _releases(request: Request, kit: KitRecord | None) -> list[Release]:
    """The releases to start servers with; the primary one first.

    Raises:
        SpecError: one that was asked for is not here.
    """
    pinned = (request.releases or [assets.pins()["SGLANG_VERSION"]])[0]
    if kit is not None and request.kit is not None:
        folder = request.kit.absolute()
        found = [
            Release(
                version=each.version,
                python=folder / f"python-{each.version}",
                # Flags of servers on a GPU: with triton's attention none comes up on a CPU.
                server_args=_arguments([f"{n}={v}" for n, v in each.server_args.items()])
                if request.device == "gpu"
                else {},
                environment=each.environment,
                caveats=each.caveats,
            )
            for each in kit.releases
        ]
    elif request.image is not None:
        # What is in it, its servers tell; its tag is a name that can be read and be a file's.
        tag = re.sub(r"[^\w.]+", "-", request.image.rsplit("/", 1)[-1])
        found = [Release(version=tag)]
    elif request.runtime == "docker" or (request.device == "cpu" and request.python is None):
        # What runs follows from the version: an image, or the Python that the harness makes for
        # the CPU.
        found = [Release(version=pinned)]
    elif request.python is not None:
        found = [Release(version=_version_of(request.python), python=request.python.absolute())]
    else:
        own = Path(sys.executable)
        with suppress(SpecError):
            return [Release(version=_version_of(own), python=own)]
        return []
    known = [each.version for each in found]
    for wanted in request.releases:
        if wanted not in known:
            raise SpecError(
                f"--release {wanted!r} is not here. The releases are {', '.join(known)}."
            )
    return [each for each in found if not request.releases or each.version in request.releases]


def _version_of(python: Path) -> str:
    """Which SGLang a Python has.

    Raises:
        SpecError: it cannot be run, or has none.
    """
    try:
        version = ask_for_sglang(python, within=ANSWERS_WITHIN)
    except OSError as error:
        raise SpecError(f"{python} cannot be run: {error.strerror}.") from None
    except subprocess.TimeoutExpired:
        raise SpecError(f"{python} did not answer within {ANSWERS_WITHIN:g} s.") from None
    if version is None:
        raise SpecError(
            f"{python} has no SGLang.", advice="Name a Python that has it with --python."
        )
    return version


def _kernels_for(here: Machine, kit: KitRecord) -> None:
    """
    Raises:
        NotRun: the kit has no kernels for a GPU of this machine.
    """
    has = kit.made_for.architectures
    for gpu in here.gpus:
        capability = here.capabilities.get(gpu.uuid)
        needed = f"sm{capability.replace('.', '')}" if capability else ""
        if needed and needed not in has:
            raise NotRun(
                f"{gpu.name} has compute capability {capability}, and the kit has kernels for "
                f"{', '.join(has)} alone; build one with --gpu {needed}"
            )


def _checkout() -> Path | None:
    """The top of this project's checkout, where this runs from one."""
    top = Path(__file__).resolve().parents[3]
    return top if (top / "bench").is_dir() and (top / "tests" / "nvml_mock").is_dir() else None


def _nvml_mock(kit: Path | None) -> Path | None:
    """The folder of the mock driver: the kit's, or the checkout's."""
    checkout = _checkout()
    for folder in (kit, checkout / "tests" if checkout else None):
        if folder is not None and (folder / "nvml_mock" / "nvml_mock.c").is_file():
            return folder.absolute() / "nvml_mock"
    return None
