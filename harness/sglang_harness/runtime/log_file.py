"""A server's log in a file that goes with the server."""

from __future__ import annotations

from pathlib import Path


def read(file: Path, *, kept: str | None, tail: int | None) -> str:
    """What is in it, or what was kept of it; of that the last ``tail`` lines. Empty where there is
    no file any more."""
    text = kept
    if text is None:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
    return text if tail is None else "\n".join(text.splitlines()[-tail:])
