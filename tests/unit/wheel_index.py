"""Wheels made on the spot, in a folder that pip and uv take for an index."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    *,
    requires: Sequence[str] = (),
    files: Mapping[str, str | bytes] | None = None,
    tag: str = "py3-none-any",
) -> Path:
    """A wheel with ``files`` beside its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    distribution = f"{name.replace('-', '_')}-{version}"
    wheel = folder / f"{distribution}-{tag}.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata = "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires), ""])
    content: dict[str, str | bytes] = {
        **(files if files is not None else {f"{name.replace('-', '_')}/__init__.py": ""}),
        f"{distribution}.dist-info/METADATA": metadata,
        f"{distribution}.dist-info/WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n",
        f"{distribution}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in content.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    return wheel


def digest(wheel: Path) -> str:
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, cache: Path) -> None:
    """For the test pip and uv know this folder and nothing else, and the cache is its own."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SGLANG_HARNESS_CACHE", str(cache))
    monkeypatch.setenv("UV_CACHE_DIR", str(cache / "uv"))
