"""Stands in for soundfile, which SGLang imports for its routes that transcribe speech: a server for
text never calls it."""

from __future__ import annotations

from typing import NoReturn

__version__ = "0.0.0+stand.in"


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotImplementedError(f"soundfile.{name}: soundfile is a stand-in here")
