"""Which image a spec means, and how it gets onto the engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import docker
from docker.errors import APIError, ImageNotFound, NotFound

from sglang_harness._base import assets
from sglang_harness.errors import ImageError
from sglang_harness.spec import ServerSpec

#: Set by cpu.Dockerfile: an image that needs the CPU flags and takes a read-only root.
LABEL_DEVICE = "org.sglang-harness.device"
#: Set by build.sh: the version of SGLang in it.
LABEL_VERSION = "org.sglang-harness.sglang-version"

#: Seconds for a script to end when it is asked to.
ENDS_WITHIN = 5.0

Say = Callable[[str], None]


def for_spec(
    spec: ServerSpec, device: Literal["cpu", "gpu"], client: docker.DockerClient, say: Say
) -> str:
    """The name of an image that is on the engine when this returns.

    Raises:
        ImageError: it is not there and may not, or cannot, be pulled or built.
    """
    if spec.image is None and device == "cpu":
        return build_cpu_image(spec.sglang_version, say)
    name = spec.image or _gpu_image(spec)
    present = is_present(client, name)
    if present and spec.pull != "always":
        return name
    if spec.pull == "never":
        raise ImageError(
            f"The image {name} is not on this engine, and pull is 'never'.",
            advice=f"Pull it first (docker pull {name}) or use --pull missing.",
        )
    say(f"pulling {name}")
    try:
        client.images.pull(*_repository_and_tag(name))
    except (APIError, NotFound) as error:
        reason = (error.explanation or str(error)).strip().rstrip(".")
        raise ImageError(
            f"The image {name} cannot be pulled: {reason}.",
            advice="Check its name and the registry, or leave --image out to have the CPU "
            "image built here.",
        ) from None
    return name


def is_present(client: docker.DockerClient, name: str) -> bool:
    try:
        client.images.get(name)
    except (ImageNotFound, APIError):
        return False
    return True


def build_cpu_image(version: str | None, say: Say) -> str:
    """Builds the CPU image with ``docker/build.sh`` (or finds it built); returns its tag."""
    return run_script("build.sh", version, say)


def run_script(name: str, version: str | None, say: Say) -> str:
    """Runs a script of ``docker/`` that makes something for a version of SGLang.

    Returns its last line: what it made. Its other lines are said as they come.

    Raises:
        ImageError: the script failed; its last words are in the message.
    """
    script = assets.root() / "docker" / name
    command = ["sh", str(script), *([version] if version else [])]
    # Its own process group, so that an interruption here ends pip and docker too.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        start_new_session=True,
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if ": " in line:
                say(line.rstrip())
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    if code != 0 or not lines:
        words = " | ".join(lines[-4:]) or "it said nothing"
        what = "The CPU image" if name == "build.sh" else "SGLang's CPU stack"
        raise ImageError(
            f"{what} could not be built (docker/{name} ended with {code}): {words}",
            advice="Run it by hand to see all it says; docker's part of a build is in build.log "
            "in the cache folder.",
        )
    return lines[-1]


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a script with everything that it started: asks, then kills."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            continue
        return


def digest(client: docker.DockerClient, name: str) -> str:
    """The image's content: a registry digest where it has one, else the engine's image id."""
    image = client.images.get(name)
    digests = image.attrs.get("RepoDigests") or []
    return str(digests[0]) if digests else str(image.id)


def _gpu_image(spec: ServerSpec) -> str:
    pinned = assets.pins()["GPU_IMAGE"]
    if spec.sglang_version is None:
        return pinned
    return f"{pinned.split('@')[0].rsplit(':', 1)[0]}:v{spec.sglang_version}"


def _repository_and_tag(name: str) -> tuple[str, str | None]:
    if "@" in name:
        return name, None
    repository, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:
        return repository, tag
    return name, "latest"
