"""Checkpoints that are made once and kept in the cache, safe for concurrent runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, with the checkpoint that ``make`` writes into the folder that it is given.

    Made in a temporary folder and renamed, so that no run ever sees half a checkpoint. Of
    concurrent runs the first one's stays, because a server may have it open already.
    """
    if _is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as work:
        made = Path(work) / "made"
        make(made)
        while not _is_whole(path):
            try:
                made.rename(path)
            except OSError:
                if _is_whole(path):
                    break  # another run was first
                # What stands there is broken: moved away, and removed with the folder.
                path.rename(Path(work) / "broken")
    return path


def _is_whole(path: Path) -> bool:
    return (path / "config.json").is_file()
