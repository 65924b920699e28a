"""Where the harness keeps things on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """What can be made again: models, wheels. ``SGLANG_HARNESS_CACHE`` moves it."""
    if own := os.environ.get("SGLANG_HARNESS_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "sglang-harness"


def state() -> Path:
    """What is needed to find and stop servers that are held for a person."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "sglang-harness"
