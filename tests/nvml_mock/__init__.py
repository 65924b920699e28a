"""A driver library that answers from a file, for machines with no GPU.

NVIDIA's own binding, the real one, loads it: :func:`installed` puts it where ``pynvml`` keeps its
library, and a child process finds it by ``LD_LIBRARY_PATH`` (:func:`environment`). What it
answers is in a :class:`Scenario`, which a test changes while somebody measures.

``NVML_MOCK_LIBRARY`` names another library to use in its place, such as NVIDIA's own mock.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pynvml

SOURCE = Path(__file__).with_name("nvml_mock.c")
MIB = 1 << 20
GIB = 1 << 30


class NoCompiler(Exception):
    """There is no C compiler here, and no library was named in its place."""


def why_not() -> str:
    """Why there is no mock driver here; empty where there is one. For ``skipif``."""
    try:
        library()
    except NoCompiler as error:
        return str(error)
    return ""


def library(*, first_calls_only: bool = False) -> Path:
    """The library, built on first use and kept by the content of its source.

    Args:
        first_calls_only: an old driver, without the second version of the memory call.

    Raises:
        NoCompiler: no compiler is there.
    """
    if not first_calls_only and (own := os.environ.get("NVML_MOCK_LIBRARY")):
        return Path(own)
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise NoCompiler(
            "no C compiler (cc, gcc or clang) is here to build the mock driver with, and "
            "NVML_MOCK_LIBRARY names none"
        )
    variant = ["-DFIRST_CALLS_ONLY"] if first_calls_only else []
    content = hashlib.sha256(SOURCE.read_bytes() + " ".join(variant).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"nvml-mock-{os.getuid()}-{content}"
    built = folder / "libnvidia-ml.so.1"
    if not built.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        beside = folder / f"building.{os.getpid()}"
        subprocess.run(
            [
                *(compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
                *("-Wl,-soname,libnvidia-ml.so.1", *variant, "-o", str(beside), str(SOURCE)),
                "-lpthread",
            ],
            check=True,
        )
        beside.replace(built)
    return built


@dataclass
class Device:
    """One scripted device, or one MIG instance where it has a parent. Figures in bytes."""

    uuid: str
    total: int = 80 * GIB
    reserved: int = 500 * MIB
    base: int = 0
    name: str = "NVIDIA Mock 80GB"
    parent: str = ""
    lost: bool = False


@dataclass
class Scenario:
    """What the driver answers. Change it, then :meth:`write`.

    Attributes:
        processes: bytes by device and process id, or by device, process id and kind.
        rules: further lines as the source describes them, such as ``fail CALL CODE``.
    """

    file: Path
    devices: list[Device] = field(default_factory=lambda: [Device("GPU-a")])
    processes: dict[tuple[str, int] | tuple[str, int, str], int] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    driver: str = "570.86.15"
    cuda: int = 12080
    _writes: int = 0

    def text(self) -> str:
        lines = [f"driver {self.driver}", f"cuda {self.cuda}"]
        for d in self.devices:
            head = f"mig {d.parent} {d.uuid}" if d.parent else f"gpu {d.uuid}"
            lines.append(f"{head} {d.total} {d.reserved} {d.base} {d.name}")
            lines += [f"lost {d.uuid}"] if d.lost else []
        for (uuid, pid, *kind), used in self.processes.items():
            lines.append(" ".join(map(str, ("process", uuid, pid, used, *kind))))
        return "\n".join([*lines, *self.rules, ""])

    def write(self) -> Scenario:
        """Puts it into the file as a whole: nobody reads half of it."""
        self._writes += 1
        beside = self.file.with_name(f"{self.file.name}.{self._writes}")
        beside.write_text(self.text(), encoding="utf-8")
        beside.replace(self.file)
        return self

    def use(self, uuid: str, pid: int, used: int) -> None:
        """``pid`` holds ``used`` bytes from now on; 0: it is not on the device."""
        if used:
            self.processes[uuid, pid] = used
        else:
            self.processes.pop((uuid, pid), None)
        self.write()


def environment(scenario: Scenario, *, first_calls_only: bool = False) -> dict[str, str]:
    """Variables for a child process whose driver this is."""
    folder = str(library(first_calls_only=first_calls_only).parent)
    before = os.environ.get("LD_LIBRARY_PATH")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{folder}:{before}" if before else folder,
        "NVML_MOCK_SCENARIO": str(scenario.write().file),
    }


@contextmanager
def installed(scenario: Scenario, *, first_calls_only: bool = False) -> Iterator[Scenario]:
    """For the block the driver library of this process is the mock's."""
    loaded = ctypes.CDLL(str(library(first_calls_only=first_calls_only)))
    kept = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache)
    variable = os.environ.get("NVML_MOCK_SCENARIO")
    os.environ["NVML_MOCK_SCENARIO"] = str(scenario.write().file)
    _put(loaded, {})
    try:
        yield scenario
    finally:
        _put(*kept)
        if variable is None:
            del os.environ["NVML_MOCK_SCENARIO"]
        else:
            os.environ["NVML_MOCK_SCENARIO"] = variable


def _put(loaded: ctypes.CDLL | None, functions: dict[str, object]) -> None:
    pynvml.nvmlLib = loaded
    pynvml._nvmlGetFunctionPointer_cache.clear()
    pynvml._nvmlGetFunctionPointer_cache.update(functions)
