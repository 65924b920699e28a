"""Detects leaks: the slope of memory over repetitions, robust against steps and outliers.

Theil's and Sen's estimator: the median of the slopes between all pairs of readings. Its
confidence interval comes from the ranks of these slopes (P. K. Sen, JASA 63, 1968, with the
correction of the variance for ties). No assumption is made about the shape of the noise.

A single step, such as a buffer that grows once, has a slope too. So a leak has to appear in both
halves of the readings.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MB = 1_000_000

#: Two-sided: noise is reported as a leak in fewer than 1 of 20,000 estimates. At least 11 readings
#: are needed for it.
CONFIDENCE = 0.9999
#: MB a cycle. A smaller slope does not matter in practice: it takes 10,000 cycles to lose 1 GB.
IGNORED = 0.1


@dataclass(frozen=True)
class Slope:
    """Growth of memory in MB (1,000,000 bytes) a cycle.

    Attributes:
        low, high: bounds of the confidence interval; infinite where there are too few readings.
        halves: the slopes of the first and of the second half of the readings.
        cycles: how many readings there were.
    """

    mb: float
    low: float
    high: float
    halves: tuple[float, float]
    cycles: int
    confidence: float

    @property
    def leaks(self) -> bool:
        """Memory grows, and neither noise nor a single step explains it."""
        steady = min(self.halves) >= max(self.mb, *self.halves) / 4
        return self.low > 0 and self.mb >= IGNORED and steady

    def __str__(self) -> str:
        return (
            f"{self.mb:+.2f} MB a cycle ({self.low:+.2f} to {self.high:+.2f} with confidence "
            f"{self.confidence:g}, {self.cycles} cycles)"
        )


def slope(used_bytes: Sequence[float], *, confidence: float = CONFIDENCE) -> Slope:
    """The slope of readings taken once a cycle, in order.

    Raises:
        ValueError: there are fewer than three readings, or the confidence is not between 0 and 1.
    """
    count = len(used_bytes)
    if count < 3:
        raise ValueError(f"{count} readings give no slope")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence}")
    slopes = _slopes(used_bytes)
    ties = sum(t * (t - 1) * (2 * t + 5) for t in Counter(used_bytes).values())
    variance = max(0.0, (count * (count - 1) * (2 * count + 5) - ties) / 18)
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * math.sqrt(variance)
    lower = math.floor((len(slopes) - half) / 2) - 1
    upper = math.ceil((len(slopes) + half) / 2)
    return Slope(
        mb=statistics.median(slopes) / MB,
        low=slopes[lower] / MB if lower >= 0 else -math.inf,
        high=slopes[upper] / MB if upper < len(slopes) else math.inf,
        halves=(_middle(used_bytes[: (count + 1) // 2]), _middle(used_bytes[count // 2 :])),
        cycles=count,
        confidence=confidence,
    )


def _slopes(values: Sequence[float]) -> list[float]:
    """Between all pairs, in their order."""
    count = len(values)
    return sorted(
        (values[b] - values[a]) / (b - a) for a in range(count) for b in range(a + 1, count)
    )


def _middle(values: Sequence[float]) -> float:
    return statistics.median(_slopes(values)) / MB
