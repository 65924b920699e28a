"""Keeps a preloaded parent between runs: what ``sglang-harness warm`` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sglang_harness.errors import EngineError, SpecError
from sglang_harness.runtime import docker, engine, images, process
from sglang_harness.runtime.warm import kept_parents
from sglang_harness.runtime.warm.kept_parents import KeptParent
from sglang_harness.spec import ServerSpec


def keep_warm(
    spec: ServerSpec, runtime: str, python: Path | None, say: Callable[[str], None]
) -> tuple[KeptParent, float | None]:
    """A kept parent for servers of ``spec``, and the seconds to make it; ``None``: it was there
    already.

    Args:
        runtime: ``auto``, ``docker`` or ``process``.
        python: for ``process``: one with SGLang installed; ``None``: the harness's own.

    Raises:
        SpecError: there is no such runtime, or it has no parents.
        EngineError, ImageError: it could not be started.
    """
    if runtime not in ("auto", "docker", "process"):
        raise SpecError(f"--runtime {runtime!r} has no parents: it is auto, docker or process.")
    if python is not None and runtime == "docker":
        raise SpecError("--python belongs to the runtime 'process' alone.")
    before = {kept.name for kept in kept_parents.on_record()}
    if runtime == "process" or python is not None or (runtime == "auto" and not _engine_answers()):
        where = python or Path(
            images.run_script("embedded.sh", spec.sglang_version, say, within=spec.limits.run)
        )
        began = time.monotonic()
        kept = kept_parents.keep("process", process.recipe_of(spec, where), "", say)
    else:
        image = images.build_cpu_image(spec.sglang_version, say, within=spec.limits.run)
        began = time.monotonic()
        kept = kept_parents.keep("docker", docker.recipe_of(spec, image), image, say)
    return kept, None if kept.name in before else time.monotonic() - began


def _engine_answers() -> bool:
    try:
        engine.connect().close()
    except EngineError:
        return False
    return True
