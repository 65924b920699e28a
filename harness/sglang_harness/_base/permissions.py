"""File modes. A server runs as another user than the harness, and SGLang reports a file that it
may not read as missing (``FileNotFoundError``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from sglang_harness.errors import ModelError


def make_readable(path: Path) -> None:
    """Makes ``path`` readable for every user: files 0644, folders 0755."""
    for each in _with_contents(path):
        each.chmod(0o755 if each.is_dir() else 0o644)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name that every user can read it by.

    The bytes take their disk once where both are on one file system, the file belongs to this
    user and others may read it as it is; otherwise they are copied.
    """
    source = source.resolve()
    if source.stat().st_mode & 0o044 == 0o044:
        try:
            target.hardlink_to(source)
            return
        except OSError:
            pass  # another file system, or another user's file
    shutil.copyfile(source, target)
    target.chmod(0o644)


def check_readable(model: Path) -> None:
    """Refuses a model that the server's user in a container could not read.

    Raises:
        ModelError: with the first such file and the command that fixes it.
    """
    for each in _with_contents(model):
        needed = 0o005 if each.is_dir() else 0o004
        if each.exists() and each.stat().st_mode & needed != needed:
            raise ModelError(
                f"{each} is not readable for the server's user "
                f"(mode {each.stat().st_mode & 0o777:o}).",
                advice=f"Give read access: chmod -R a+rX '{model}'",
            )


def _with_contents(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        yield from sorted(path.rglob("*"))
