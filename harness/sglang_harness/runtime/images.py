"""Which image a spec selects, and how it gets onto the engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import docker
from docker.errors import APIError, DockerException, NotFound

from sglang_harness._base import assets, bounded
from sglang_harness.errors import EngineError, ImageError
from sglang_harness.spec import Limits, ServerSpec

#: Set by cpu.Dockerfile: an image that needs the CPU flags and takes a read-only root.
LABEL_DEVICE = "org.sglang-harness.device"
#: Set by build.sh: the version of SGLang in it.
LABEL_VERSION = "org.sglang-harness.sglang-version"

Say = Callable[[str], None]

#: Seconds for a build that no spec bounds.
BUILT_WITHIN = Limits().run


def for_spec(
    spec: ServerSpec, device: Literal["cpu", "gpu"], client: docker.DockerClient, say: Say
) -> str:
    """The name of an image that is on the engine when this returns.

    Raises:
        ImageError: it is missing, and may not or cannot be pulled or built.
    """
    if spec.image is None and device == "cpu":
        return build_cpu_image(spec.sglang_version, say, within=spec.limits.run)
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
        # The client waits for a pull without a time-out.
        bounded.call(lambda: client.images.pull(*_repository_and_tag(name)), within=spec.limits.run)
    except TimeoutError:
        raise ImageError(
            f"The image {name} was not pulled within {spec.limits.run:g} s (limits.run).",
            advice=f"Pull it first (docker pull {name}), which shows how far it gets.",
        ) from None
    except (DockerException, OSError) as error:
        explained = error.explanation if isinstance(error, APIError) else None
        reason = (explained or str(error)).strip().rstrip(".")
        raise ImageError(
            f"The image {name} cannot be pulled: {reason}.",
            advice="Check its name and the registry, or leave --image out to have the CPU "
            "image built here.",
        ) from None
    return name


def is_present(client: docker.DockerClient, name: str) -> bool:
    """Whether the engine has an image of this name.

    Raises:
        EngineError: the engine failed, so this is not known.
    """
    try:
        client.images.get(name)
    except NotFound:
        return False
    except (DockerException, OSError) as error:
        raise EngineError(
            f"The Docker engine could not be asked for the image {name}: {error}."
        ) from None
    return True


def build_cpu_image(version: str | None, say: Say, *, within: float = BUILT_WITHIN) -> str:
    """Builds the CPU image with ``docker/build.sh`` (or finds it built); returns its tag.

    Args, errors: as of :func:`run_script`.
    """
    return run_script("build.sh", version, say, within=within)


def run_script(name: str, version: str | None, say: Say, *, within: float = BUILT_WITHIN) -> str:
    """Runs a script of ``docker/`` that makes something for a version of SGLang.

    Returns its last line: what it made. Its other lines are given to ``say`` as they come. When
    this is interrupted, the script ends within seconds, with pip and docker's client.

    Args:
        within: seconds that it may take.

    Raises:
        ImageError: the script failed, or took longer; the end of its output is in the message.
    """
    what = "The CPU image" if name == "build.sh" else "SGLang's CPU stack"
    script = assets.root() / "docker" / name
    try:
        finished = bounded.run(
            ["sh", str(script), *([version] if version else [])],
            within=within,
            merged=True,
            environment={**os.environ, "PYTHON": sys.executable},
            line=lambda text: say(text) if ": " in text else None,
        )
    except subprocess.TimeoutExpired as error:
        last = " | ".join(str(error.output).splitlines()) or "it wrote nothing"
        raise ImageError(
            f"{what} was not built within {within:g} s (docker/{name}): {last}",
            advice="Run it by hand to see what it waits for, or raise limits.run.",
        ) from None
    if finished.code != 0 or not finished.output:
        last = " | ".join(finished.output[-4:]) or "it wrote nothing"
        raise ImageError(
            f"{what} could not be built (docker/{name} ended with {finished.code}): {last}",
            advice="Run it by hand to see all its output; docker's part of a build is in build.log "
            "in the cache folder.",
        )
    return finished.output[-1]


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
