"""What this machine has of what a run needs, and what to do about what is missing."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import docker
from docker.errors import DockerException
from testcontainers.core.config import testcontainers_config

from sglang_harness import __version__
from sglang_harness._base import assets, headroom, paths
from sglang_harness._base.temporary import within_temporary_folder
from sglang_harness.checkpoint.footprint import (
    EXAMPLES,
    Size,
    gigabytes,
    least,
    reference_model,
)
from sglang_harness.errors import HarnessError
from sglang_harness.runtime import device, engine, images
from sglang_harness.runtime.warm import kept_parents
from sglang_harness.upkeep import kept_servers

GIB = 1 << 30
#: The CPU image, its build stages and the wheels; measured with SGLang 0.5.23.
DISK_FOR_FIRST_BUILD = 12 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was examined. ``bad`` means: a run cannot succeed here."""

    subject: str
    state: Literal["ok", "note", "bad"]
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Examines everything that a run needs. Changes nothing; where the engine is on this machine, a
    container is created, not started, and removed."""
    findings = [_versions(), *_packages(), _disk(), *_room(), _gpus(), *_parents()]
    try:
        client = engine.connect(timeout=10)
    except HarnessError as error:
        return [*findings, Finding("Docker engine", "bad", error.message, error.advice)]
    try:
        info = client.info()
        findings += [_engine(info), _gpu_for_containers(info), *_images(client)]
        findings += [*_reach(client), _port(), _leftovers(client)]
    except (DockerException, HarnessError) as error:
        findings.append(Finding("Docker engine", "bad", f"it failed: {error}"))
    finally:
        client.close()
    return findings


def _versions() -> Finding:
    pins = assets.pins()
    return Finding(
        "versions",
        "ok" if platform.machine() == "x86_64" else "note",
        f"sglang-harness {__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}; SGLang pinned at {pins['SGLANG_VERSION']}",
        "" if platform.machine() == "x86_64" else "The CPU image is for x86-64 only.",
    )


def _packages() -> list[Finding]:
    missing = [
        name
        for name in ("torch", "transformers", "safetensors", "gguf", "accelerate")
        if importlib.util.find_spec(name) is None
    ]
    if not missing:
        return [Finding("extra [torch]", "ok", "installed")]
    return [
        Finding(
            "extra [torch]",
            "note",
            f"not installed: {', '.join(missing)}; no reference model, no second checkpoint",
            "pip install 'sglang-harness[torch]'",
        )
    ]


def _disk() -> Finding:
    folder = paths.cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    enough = free > DISK_FOR_FIRST_BUILD
    return Finding(
        "disk",
        "ok" if enough else "note",
        f"{free / GIB:.0f} GiB free under {folder}",
        "" if enough else f"A first build needs {DISK_FOR_FIRST_BUILD / GIB:.0f} GiB.",
    )


def _room() -> list[Finding]:
    """Memory, the folder for temporary files, and what models of the field need of them."""
    memory, disk = headroom.memory(), headroom.disk(Path(tempfile.gettempdir()))
    available = gigabytes(memory.available)
    return [
        Finding("memory", "ok", f"{available} available; the bound is {memory.limited_by}"),
        Finding(
            "temporary files",
            "note" if disk.in_memory else "ok",
            f"{gigabytes(disk.free)} free in {disk.folder}"
            + (", a tmpfs: they are taken from memory" if disk.in_memory else ""),
            "Set TMPDIR to a folder on a disk." if disk.in_memory else "",
        ),
        *(_model(name, size, memory, disk) for name, size in EXAMPLES.items()),
    ]


def _model(name: str, size: Size, memory: headroom.Memory, disk: headroom.DiskRoom) -> Finding:
    """Whether a model of this size, in bfloat16, can be checked here."""
    held = reference_model(size, streamed=False).memory
    needed = least(size)
    in_memory = needed.disk if disk.in_memory else 0
    enough_memory = needed.memory + in_memory <= memory.available
    enough_disk = needed.disk <= disk.free
    how = "held" if held <= memory.available // 2 else "read layer by layer"
    needs = (
        f"the second checkpoint takes {gigabytes(needed.disk)} of disk and the checks at least "
        f"{gigabytes(needed.memory)} of memory; holding the reference model takes "
        f"{gigabytes(held)}"
    )
    if enough_memory and enough_disk:
        return Finding(f"{name} model", "ok", f"fits, its reference model {how}: {needs}")
    lacking = " and ".join(
        what for what, enough in (("memory", enough_memory), ("disk", enough_disk)) if not enough
    )
    return Finding(
        f"{name} model",
        "note",
        f"not enough {lacking}: {needs}",
        "Checks of a model of this size are not run where it does not fit."
        + ("" if enough_disk else " Set TMPDIR to a larger disk."),
    )


def _gpus() -> Finding:
    found, why_none = device.gpus()
    if not found:
        return Finding("GPU", "note", f"none: {why_none}", "Servers run on the CPU here.")
    names = ", ".join(f"{g.index}: {g.name} ({g.memory_bytes / GIB:.0f} GiB)" for g in found)
    return Finding("GPU", "ok", names)


def _engine(info: dict[str, Any]) -> Finding:
    return Finding(
        "Docker engine",
        "ok",
        f"{info.get('ServerVersion')}, {info.get('OperatingSystem')}, {info.get('NCPU')} CPUs, "
        f"{(info.get('MemTotal') or 0) / GIB:.0f} GiB, cgroup v{info.get('CgroupVersion')}",
    )


def _gpu_for_containers(info: dict[str, Any]) -> Finding:
    if device.engine_gives_gpus(info):
        return Finding("GPU in containers", "ok", "the engine has the NVIDIA runtime")
    found, _ = device.gpus()
    return Finding(
        "GPU in containers",
        "bad" if found else "note",
        "the engine cannot give GPUs to containers",
        "Install the NVIDIA container toolkit and restart the engine." if found else "",
    )


def _images(client: docker.DockerClient) -> list[Finding]:
    names = sorted(
        {
            tag
            for image in client.images.list(filters={"label": images.LABEL_DEVICE})
            for tag in image.tags
        }
    )
    cpu = (
        Finding("CPU image", "ok", ", ".join(names))
        if names
        else Finding("CPU image", "note", "not built yet", "The first run builds it (minutes).")
    )
    gpu_image = assets.pins()["GPU_IMAGE"]
    there = images.is_present(client, gpu_image)
    gpu = Finding(
        "GPU image", "ok" if there else "note", f"{gpu_image}{'' if there else ': not pulled'}"
    )
    reaper = testcontainers_config.ryuk_image
    reaps = images.is_present(client, reaper)
    return [
        cpu,
        gpu,
        Finding(
            "reaper",
            "ok" if reaps else "note",
            f"{reaper} is present" if reaps else f"{reaper} is not present",
            "" if reaps else "After a killed run, 'sglang-harness sweep' removes what it left.",
        ),
    ]


def _any_image(client: docker.DockerClient) -> str | None:
    for image in client.images.list():
        if image.tags:
            return str(image.tags[0])
    return None


def _reach(client: docker.DockerClient) -> list[Finding]:
    if engine.is_remote():
        return [
            Finding(
                "reach",
                "note",
                "the engine is on another machine: models travel in a volume",
                "Set publish_on in the spec to an address of that machine that you trust.",
            )
        ]
    image = _any_image(client)
    if image is None:
        return []
    with within_temporary_folder("doctor") as folder:
        folder.chmod(0o755)
        if engine.sees_this_disk(client, image, folder):
            return [Finding("reach", "ok", "the engine sees this disk: models are mounted")]
    return [Finding("reach", "note", "the engine does not see this disk: models go in a volume")]


def _parents() -> list[Finding]:
    """Kept parents that warm servers are forked from; no finding where there are none."""
    kept = kept_parents.on_record()
    gone = [parent.name for parent in kept if not parent.answers()]
    told = ", ".join(f"{p.name} (SGLang {p.version}, {p.runtime})" for p in kept)
    if gone:
        told += f"; ended: {', '.join(gone)}"
    advice = "sglang-harness sweep" if gone else ""
    return [Finding("kept parents", "note" if gone else "ok", told, advice)] if kept else []


def _port() -> Finding:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Finding("ports", "ok", f"free ports on 127.0.0.1 (such as {probe.getsockname()[1]})")


def _leftovers(client: docker.DockerClient) -> Finding:
    kept = kept_servers.held_servers()
    abandoned = [t for t in engine.ours(client) if t.is_abandoned()]
    told = f"{len(kept)} held server{'s' if len(kept) != 1 else ''}"
    if not abandoned:
        return Finding("left behind", "ok", f"nothing ({told})")
    names = ", ".join(f"{t.kind} {t.name}" for t in abandoned)
    return Finding("left behind", "note", f"{names} ({told})", "sglang-harness sweep")
