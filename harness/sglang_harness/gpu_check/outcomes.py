"""How a part can end, and what its figures can be about."""

from __future__ import annotations

from typing import Literal, get_args

Outcome = Literal["held", "failed", "not run"]

#: Subjects of the summary, in its order.
Topic = Literal[
    "device", "serving", "kernels", "weights", "tolerances", "memory", "death", "second GPU"
]
TOPICS: tuple[Topic, ...] = get_args(Topic)


class NotHere(Exception):
    """What the part needs is missing on this machine. The message says what."""
