"""Describes a host as a target for a kit: one JSON object on standard output.

This one file runs alone under any Python from 3.10 on, with nothing but its standard library, so
that it can be carried to the host. The Python that runs it is the one that is described: what it
imports, a kit need not bring. Nothing is imported from it, torch included, and nothing is written.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

#: Version of the format. A reader refuses another.
SCHEMA = 1

#: Seconds that the driver has to answer in. One in trouble can block for good.
DRIVER_WITHIN = 20.0

#: Programs that a kit's parts use where they are there.
TOOLS = ("nvcc", "cc", "c++", "ninja", "xz", "make")


def describe(folder: str = ".") -> dict[str, Any]:
    """The host and the Python that runs this.

    Args:
        folder: whose file system's free space is stated.

    Returns:
        ``schema``, ``python`` (``3.12.3``), ``implementation`` (``cpython``), ``machine``
        (``x86_64``), ``glibc`` (``2.39``; ``None`` with another C library), ``torch``
        (``2.11.0+cu130``) and ``cuda``, torch's own (``13.0``), both ``None`` where there is
        none; ``gpus``, a list of ``name``, ``capability`` (``9.0``), ``memory_bytes`` (``None``
        where the driver does not tell: of a GPU with MIG it takes a privilege) and ``uuid``;
        ``driver``; ``driver_trouble``, why GPUs are not known (``None``: they all are);
        ``packages``, versions by normalised name (``None``: no version is stated); ``tools``,
        paths by name; ``disk_free_bytes``, ``memory_bytes``, ``cpus``, ``kernel``, ``os``.
    """
    torch, cuda = torch_and_cuda()
    gpus, driver, trouble = gpus_and_driver()
    return {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "machine": platform.machine(),
        "glibc": _glibc(),
        "torch": torch,
        "cuda": cuda,
        "gpus": gpus,
        "driver": driver,
        "driver_trouble": trouble,
        "packages": packages(),
        "tools": {name: _tool(name) for name in TOOLS},
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "os": _operating_system(),
    }


def normalised(name: str) -> str:
    """A package's name as indexes compare it: ``Typing_Extensions`` is ``typing-extensions``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages() -> dict[str, str | None]:
    """What this Python can import, by normalised name. The first on its path counts, as when it
    imports."""
    found: dict[str, str | None] = {}
    for distribution in importlib.metadata.distributions():
        # A folder that an interrupted pip left has metadata without a name.
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(normalised(name), distribution.metadata["Version"])
    return dict(sorted(found.items()))


def torch_and_cuda() -> tuple[str | None, str | None]:
    """torch's version and that of its CUDA, read from its ``version.py``: importing torch takes
    seconds. A torch without CUDA has ``None`` there."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        return None, None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?:\s*:[^=\n]*)?\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    if version is None:
        return _version("torch"), None
    return version[1], cuda[1] if cuda else None


def gpus_and_driver() -> tuple[list[dict[str, Any]], str | None, str | None]:
    """The GPUs and the driver's version by NVML, and why they are not known: no driver, or one
    that fails, or does not answer within :data:`DRIVER_WITHIN` seconds."""
    answers: list[tuple[list[dict[str, Any]], str | None, str | None]] = []

    def ask() -> None:
        try:
            answers.append(_by_nvml(ctypes.CDLL("libnvidia-ml.so.1")))
        except (OSError, AttributeError) as error:
            answers.append(([], None, str(error)))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(DRIVER_WITHIN)
    if not answers:
        return [], None, f"the NVIDIA driver did not answer within {DRIVER_WITHIN:g} s"
    return answers[0]


class _Memory(ctypes.Structure):
    """NVML's ``nvmlMemory_t``, in bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _by_nvml(library: ctypes.CDLL) -> tuple[list[dict[str, Any]], str, str | None]:
    """The GPUs that answer, the driver, and why one does not.

    Raises OSError where NVML answers with an error, AttributeError where it lacks a function.
    """

    def call(name: str, *words: Any) -> None:
        code = getattr(library, name)(*words)
        if code != 0:
            raise OSError(f"{name} answered with NVML's error {code}")

    def text(name: str, *words: Any) -> str:
        buffer = ctypes.create_string_buffer(96)
        call(name, *words, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode(errors="replace")

    def gpu(index: int) -> dict[str, Any]:
        device = ctypes.c_void_p()
        call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
        call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
        try:
            call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        except OSError:
            memory.total = 0
        return {
            "name": text("nvmlDeviceGetName", device),
            "capability": f"{major.value}.{minor.value}",
            "memory_bytes": memory.total or None,
            "uuid": text("nvmlDeviceGetUUID", device),
        }

    call("nvmlInit_v2")
    try:
        driver = text("nvmlSystemGetDriverVersion")
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        gpus: list[dict[str, Any]] = []
        trouble: str | None = None
        for index in range(count.value):
            try:
                gpus.append(gpu(index))
            except OSError as error:
                # One that fell off its bus does not hide the others.
                trouble = f"GPU {index}: {error}"
    finally:
        library.nvmlShutdown()
    return gpus, driver, trouble


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _glibc() -> str | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return None
    return version if name == "glibc" else None


def _tool(name: str) -> str | None:
    """Also where it is not on the search path: beside this Python (ninja from a wheel), and where
    CUDA is installed by default."""
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), beside, "/usr/local/cuda/bin"])
    return shutil.which(name, path=path)


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def main() -> None:
    """Prints the description."""
    print(json.dumps(describe(), indent=1))


if __name__ == "__main__":
    main()
