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
    """Records of servers and parents that are kept for a person: ``held/*.json`` and
    ``parents/*.json``."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "sglang-harness"


def on_record(state: Path, run_id: str) -> bool:
    """Whether a record in the state folder ``state`` keeps the things of the run ``run_id``; true
    as well where this user may not look, because then nobody here can tell."""
    for kind in ("held", "parents"):
        try:
            files = list((state / kind).iterdir())
        except FileNotFoundError:
            continue
        except OSError:
            return True
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except FileNotFoundError:
                continue  # removed meanwhile
            except (OSError, ValueError):
                return True
            if f'"{run_id}"' in text:
                return True
    return False
