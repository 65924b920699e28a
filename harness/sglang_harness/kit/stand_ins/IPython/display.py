"""The two names that SGLang imports."""

from __future__ import annotations

from typing import NoReturn


def HTML(*_words: object, **_named: object) -> NoReturn:  # noqa: N802 -- IPython's name
    """Not here."""
    raise NotImplementedError("IPython.display.HTML: IPython is a stand-in here")


def display(*_words: object, **_named: object) -> NoReturn:
    """Not here."""
    raise NotImplementedError("IPython.display.display: IPython is a stand-in here")
