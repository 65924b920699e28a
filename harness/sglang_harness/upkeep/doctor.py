"""What is there, and what to do about what is not."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import socket
from dataclasses import dataclass
from typing import Any, Literal

import docker
from docker.errors import DockerException
from testcontainers.core.config import testcontainers_config

from sglang_harness import __version__
from sglang_harness._base import assets, paths
from sglang_harness._base.temporary import within_temporary_folder
from sglang_harness.errors import HarnessError
from sglang_harness.runtime import device, engine, images
from sglang_harness.runtime.docker import SGLangServerContainer
from sglang_harness.runtime.warm import kept_parents
from sglang_harness.spec import ServerSpec
from sglang_harness.upkeep import kept_servers

GIB = 1 << 30
#: The CPU image, its build stages and the wheels; measured with SGLang 0.5.23.
DISK_FOR_FIRST_BUILD = 12 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``bad`` means: a run cannot succeed here."""

    subject: str
    state: Literal["ok", "note", "bad"]
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Looks at everything a run needs; changes nothing but makes and removes a container."""
    findings = [_versions(), *_packages(), _disk(), _gpus(), *_parents()]
    try:
        client = engine.connect(timeout=10)
    except HarnessError as error:
        return [*findings, Finding("Docker engine", "bad", error.message, error.advice)]
    try:
        info = client.info()
        findings += [_engine(info), _gpu_for_containers(info), *_images(client)]
        findings += [*_reach(client), *_gpu_container(client), _port(), _leftovers(client)]
    except (DockerException, HarnessError) as error:
        findings.append(Finding("Docker engine", "bad", f"it fails: {error}"))
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
            f"not installed: {', '.join(missing)}; no oracle, no second checkpoint",
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
        "" if enough else f"A first build wants {DISK_FOR_FIRST_BUILD / GIB:.0f} GiB.",
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
        "the engine cannot hand GPUs to containers",
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
            f"{reaper} is here" if reaps else f"{reaper} is not here",
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


def _gpu_container(client: docker.DockerClient) -> list[Finding]:
    """What cannot be started without a GPU is made, read back and removed."""
    image = _any_image(client)
    if image is None:
        return []
    container = SGLangServerContainer(
        ServerSpec(gpus="0", shm_size="32g"), model=None, image=image, device="gpu"
    )
    try:
        container.create()
        made = container.inspect()
    finally:
        container.end()
    return [
        Finding(
            "GPU container",
            "note",
            "created, never started: devices "
            f"{[r['DeviceIDs'] for r in made['device_requests']]}, ipc {made['ipc_mode']}, "
            f"shm {made['shm_size'] // GIB} GiB, "
            f"ulimits {[u['Name'] for u in made['ulimits']]}",
        )
    ]


def _parents() -> list[Finding]:
    """Kept parents that warm servers are forked from; none is nothing to tell."""
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
        return Finding("ports", "ok", f"free ones on 127.0.0.1 (such as {probe.getsockname()[1]})")


def _leftovers(client: docker.DockerClient) -> Finding:
    kept = kept_servers.held_servers()
    abandoned = [t for t in engine.ours(client) if t.is_abandoned()]
    told = f"{len(kept)} held server{'s' if len(kept) != 1 else ''}"
    if not abandoned:
        return Finding("left behind", "ok", f"nothing ({told})")
    names = ", ".join(f"{t.kind} {t.name}" for t in abandoned)
    return Finding("left behind", "note", f"{names} ({told})", "sglang-harness sweep")
