"""The harness itself, as a kit has it: the package as in the wheel, without the wheel."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import sglang_harness
from sglang_harness._base import assets, bounded
from sglang_harness.errors import KitError

#: The extra whose packages the checks of a GPU host use: checkpoints, pushes, the reference model.
EXTRA = "torch"

#: Files of the package that are not shipped.
_NOT_SHIPPED = ("__pycache__",)

#: The earliest time that a zip file can state, for what has no commit.
EARLIEST = 315532800


def own_requirements() -> list[str]:
    """What the harness requires with its extra for torch, less torch itself, as its own metadata
    states it.

    Raises:
        KitError: the harness is not installed as a package.
    """
    stated = _distribution().requires or []
    found = []
    for line in stated:
        requirement, _, marker = line.partition(";")
        extra = marker.strip().removeprefix("extra ==").strip().strip("'\"")
        if not marker or extra == EXTRA:
            found.append(requirement.strip())
    return found


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("sglang-harness")
    except importlib.metadata.PackageNotFoundError:
        raise KitError(
            "The harness runs from its files and is not installed: what it requires is not known.",
            advice="Install it: pip install -e .",
        ) from None


def files() -> Iterator[tuple[str, Path | bytes]]:
    """The package by names from the folder that goes on the path: in a checkout what the wheel
    adds to it (``shipped/``) is added, and the metadata, without which its plugin for pytest and
    the checks of others are not found."""
    package = Path(sglang_harness.__file__).parent
    for path in _tree(package):
        yield f"sglang_harness/{path.relative_to(package).as_posix()}", path
    root = assets.root()
    if root != package / "shipped":
        for path in _tree(root / "docker"):
            name = path.relative_to(root).as_posix()
            yield f"sglang_harness/shipped/{name}", path
        yield "sglang_harness/shipped/compose.yaml", root / "compose.yaml"
        yield "sglang_harness/shipped/.env", root / "docker" / "versions.env"
    distribution = _distribution()
    folder = f"sglang_harness-{sglang_harness.__version__}.dist-info"
    stated = Message()
    stated["Metadata-Version"] = "2.1"
    stated["Name"] = "sglang-harness"
    stated["Version"] = sglang_harness.__version__
    for line in distribution.requires or []:
        stated["Requires-Dist"] = line
    yield f"{folder}/METADATA", str(stated).encode()
    if points := distribution.read_text("entry_points.txt"):
        yield f"{folder}/entry_points.txt", points.encode()


def mock_driver() -> Iterator[tuple[str, Path]]:
    """The driver library that answers from a file, where this is a checkout."""
    folder = assets.root() / "tests" / "nvml_mock"
    if folder.is_dir():
        for path in _tree(folder):
            yield f"nvml_mock/{path.relative_to(folder).as_posix()}", path


def _tree(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not set(path.relative_to(folder).parts) & set(_NOT_SHIPPED)
    )


def revision() -> str | None:
    """The commit of the checkout, with ``+changes`` where files differ from it; ``None`` where
    this is no checkout, or git is not here."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return None
    changed = _git("status", "--porcelain", "--", "harness", "docker", "compose.yaml", "tests")
    return head + ("+changes" if changed else "")


def built_at() -> int:
    """The time that every file in a kit has, in seconds since the epoch: SOURCE_DATE_EPOCH, or the
    commit's, or the earliest that there is. The clock is not asked, so that the same sources make
    the same kit.

    Raises:
        KitError: SOURCE_DATE_EPOCH is not a number.
    """
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        if not given.isdigit():
            raise KitError(f"SOURCE_DATE_EPOCH is {given!r}, and not a number of seconds.")
        return int(given)
    committed = _git("log", "-1", "--format=%ct") or ""
    return int(committed) if committed.isdigit() else EARLIEST


def _git(*words: str) -> str | None:
    root = assets.root()
    if not (root / ".git").exists():
        return None
    try:
        ended = bounded.run(["git", "-C", str(root), *words], within=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "\n".join(ended.output) if ended.code == 0 else None
