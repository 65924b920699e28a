"""How much of the run's time a part may take that could use all of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_harness.gpu_check.context import Context


def within_share(context: Context, share: float, *, least: float) -> float:
    """Seconds until the part's end, but no more than ``share`` of what is left of the whole budget:
    on a machine that is lent for minutes the parts after it want their turn.

    Args:
        least: seconds below which the part is no use, before ``--slow``.
    """
    of_budget = share * (context.settings.ends_at - time.time())
    return min(context.left(), max(least * context.settings.slow, of_budget))
