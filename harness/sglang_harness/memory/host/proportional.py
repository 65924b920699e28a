"""Host memory of one server of several that share pages, by the kernel's proportional count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_harness.errors import HarnessError
from sglang_harness.memory.host.process import FIELDS


class ProportionalMemory:
    """The proportional share of a warm server's processes.

    A page that the server shares with its parent and its neighbours counts by the part that falls
    to it, so all servers of a parent add up; one alone has more when a neighbour ends.

    Args:
        ask: the counters of all its processes in bytes, and how many of these were read.
    """

    name = "proportional share"

    def __init__(self, ask: Callable[[], dict[str, Any]]) -> None:
        self._ask = ask

    def read(self) -> tuple[int, dict[str, int]]:
        """Anonymous plus shared memory in bytes; and these two and mapped files apart.

        Raises:
            HarnessError: not one process could be read, as when all have ended.
        """
        counters = self._ask()
        if not counters.get("processes"):
            raise HarnessError(
                "The memory of the server's processes cannot be read.",
                advice="They have ended, or their parent has.",
            )
        parts = {part: int(counters[field]) for field, part in FIELDS.items()}
        return parts["anonymous"] + parts["shared"], parts
