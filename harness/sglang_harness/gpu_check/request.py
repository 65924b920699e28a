"""From what a person asked for to a run: the machine, the releases, the folder of the results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sglang_harness._base import assets, bounded, temporary
from sglang_harness.errors import SpecError
from sglang_harness.gpu_check import machine, record, run_parts
from sglang_harness.gpu_check.machine import Machine, NotRun
from sglang_harness.gpu_check.results import Results
from sglang_harness.gpu_check.settings import Release, Settings
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
    table: str = run_parts.TABLE


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
        server_args=from_options(None, {}, server_args).server_args,
        **others,
    )


def run(request: Request, say: Callable[[str], None]) -> tuple[Results, Path]:
    """Runs what was asked for; returns the results and their folder.

    Raises:
        NotRun: there is no GPU that can be used.
        SpecError: what was asked for makes no sense, or the folder cannot be written to.
        Interrupted: by Ctrl-C or SIGTERM; the results are written.
    """
    ends_at = time.time() + request.budget
    parts = run_parts.chosen(run_parts.table(request.table), request.parts)
    kit = _kit(request.kit)
    releases = _releases(request, kit)
    here = machine.of_cpu() if request.device == "cpu" else machine.of_gpu()
    if kit is not None:
        _kernels_for(here, kit)
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
            model_layers=20 if request.device == "gpu" else 2,
            kit=request.kit,
            nvml_mock=_nvml_mock(request.kit),
        )
        results = run_parts.results_of(settings, here.facts, kit)
        run = run_parts.Run(
            settings,
            parts,
            record.Record(folder),
            results,
            say=say,
            leftovers=lambda: machine.still_in_use(here),
            table=request.table,
        )
        return run.run(), folder


def _kit(folder: Path | None) -> dict[str, Any] | None:
    """What an unpacked kit says of itself."""
    if folder is None:
        return None
    for file in (folder / "kit.json", folder.parent / "kit.json"):
        with suppress(FileNotFoundError, NotADirectoryError):
            try:
                told = json.loads(file.read_text(encoding="utf-8"))
                assert isinstance(told, dict)
                return told
            except (OSError, ValueError, AssertionError):
                raise SpecError(f"{file} is not what a kit says of itself.") from None
    raise SpecError(f"--kit {folder}: there is no kit.json in it or beside it.")


def _releases(request: Request, kit: dict[str, Any] | None) -> list[Release]:
    """The releases to start servers with; the primary one first."""
    if kit is not None and request.kit is not None:
        found = [
            Release(
                version=each["version"],
                python=request.kit.absolute() / f"python-{each['version']}",
                server_args=each.get("server_args", {}),
                environment=each.get("environment", {}),
                caveats=each.get("caveats", []),
            )
            for each in kit["releases"]
        ]
    elif request.runtime == "docker":
        version = (request.releases or [assets.pins()["SGLANG_VERSION"]])[0]
        found = [Release(version=version)]
    elif request.python is not None:
        found = [Release(version=_version_of(request.python), python=request.python.absolute())]
    elif request.device == "cpu":
        # The harness makes its own Python with SGLang for the CPU.
        found = [Release(version=(request.releases or [assets.pins()["SGLANG_VERSION"]])[0])]
    else:
        with suppress(SpecError):
            own = Path(sys.executable)
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
    asks = "import importlib.metadata as m; print(m.version('sglang'))"
    try:
        done = bounded.run([str(python), "-c", asks], within=ANSWERS_WITHIN)
    except OSError as error:
        raise SpecError(f"{python} cannot be run: {error.strerror}.") from None
    except subprocess.TimeoutExpired:
        raise SpecError(f"{python} did not answer within {ANSWERS_WITHIN:g} s.") from None
    if done.code or not done.output:
        raise SpecError(
            f"{python} has no SGLang.", advice="Name a Python that has it with --python."
        )
    return done.output[-1].strip()


def _kernels_for(here: Machine, kit: dict[str, Any]) -> None:
    """
    Raises:
        NotRun: the kit has no kernels for a GPU of this machine.
    """
    has = kit["made_for"]["architectures"]
    for gpu in here.gpus:
        capability = here.capabilities.get(gpu.uuid)
        if capability and f"sm{capability.replace('.', '')}" not in has:
            raise NotRun(
                f"{gpu.name} has compute capability {capability}, and the kit has kernels for "
                f"{', '.join(has)} alone: build one with --gpu sm{capability.replace('.', '')}"
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
