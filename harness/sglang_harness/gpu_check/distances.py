"""How far served log-probabilities are from the reference model's: statistics, without a server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

#: Percentiles that are written down.
PERCENTILES = (50.0, 90.0, 99.0, 99.9)

#: A proposed bound is so many times the largest 99.9th percentile over all conditions: twice, for
#: the conditions, models and kernels that were not measured.
TIMES = 2.0


@dataclass(frozen=True)
class Token:
    """One token, generated greedily or of a prompt.

    Attributes:
        served: its log-probability by the server, in nats.
        reference: the same by the reference model, given the same tokens before it.
        behind: how much more probable, in nats, the reference model's most probable token is; 0
            where this is it, and for a prompt, which nobody chose.
    """

    served: float
    reference: float
    behind: float

    @property
    def off(self) -> float:
        """The distance in nats; infinite where one of the two is no number."""
        distance = abs(self.served - self.reference)
        return distance if math.isfinite(distance) else math.inf


@dataclass(frozen=True)
class Condition:
    """Under which tokens were generated.

    Attributes:
        dtype: that the server computes in, as torch names it.
        batch: prompts that were sent together.
        cached: prompts came out of the prefix cache.
        rounded: the server rounds the weights: they are saved in float32.
        prompt: tokens of prompts, most of them improbable, and not what was generated.
    """

    model: str
    dtype: str
    batch: int
    cached: bool
    rounded: bool = False
    prompt: bool = False

    def __str__(self) -> str:
        cache = "prefix cached" if self.cached else "nothing cached"
        rounded = ", weights rounded" if self.rounded else ""
        how = "prompt tokens" if self.prompt else f"batch of {self.batch}, {cache}"
        return f"{self.model}, {self.dtype}{rounded}, {how}"


@dataclass
class Measured:
    """One condition.

    Attributes:
        why_not: why it could not be measured; empty where it was.
        failed: because something is wrong, such as a server that did not start.
        tokens: how many.
        percentiles: of the distance in nats, by ``p50``, ``p99.9`` and so on.
        largest: distance.
        not_best: tokens that are not the reference model's most probable ones.
        furthest_behind: the largest margin of those, in nats.
        cached_tokens: prompt tokens out of the cache, over all answers.
    """

    condition: Condition
    why_not: str = ""
    failed: bool = False
    tokens: int = 0
    percentiles: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    not_best: int = 0
    furthest_behind: float = 0.0
    cached_tokens: int = 0


def percentile(values: Sequence[float], which: float) -> float:
    """By the nearest rank: one of the values, so that no figure is smoothed into one that was never
    seen. Args: values: at least one; which: above 0, at most 100."""
    ordered = sorted(values)
    # 99.9 % of 1000 are 999, whatever binary fractions make of it.
    rank = math.ceil(round(which * len(ordered) / 100, 9))
    return ordered[max(1, rank) - 1]


def measured(condition: Condition, tokens: Iterable[Token], cached_tokens: int) -> Measured:
    """The statistics of one condition."""
    seen = list(tokens)
    if not seen:
        return Measured(condition, why_not="not one token came", cached_tokens=cached_tokens)
    offs = [token.off for token in seen]
    behind = [token.behind for token in seen if token.behind > 0]
    return Measured(
        condition,
        tokens=len(seen),
        percentiles={f"p{which:g}": percentile(offs, which) for which in PERCENTILES},
        largest=max(offs),
        not_best=len(behind),
        furthest_behind=max(behind, default=0.0),
        cached_tokens=cached_tokens,
    )


@dataclass(frozen=True)
class Proposal:
    """What follows for one dtype from all of its conditions.

    Attributes:
        in_use: the bound that the checks judge with, in nats.
        largest: distance that was measured.
        furthest_behind: as of :class:`Measured`.
        proposed: bound by the rule.
        covered: the bound in use is not below the largest distance, and near ties are within twice
            the bound, as the checks judge.
    """

    dtype: str
    tokens: int
    in_use: float
    largest: float
    furthest_behind: float
    proposed: float
    covered: bool


#: The rule, in words.
RULE = f"{TIMES:g} x the largest 99.9th percentile of any condition, rounded up to two digits"


def proposals(rows: Iterable[Measured], in_use: Mapping[str, float]) -> list[Proposal]:
    """One for each dtype that was measured, in the order in which they come."""
    by_dtype: dict[str, list[Measured]] = {}
    for row in rows:
        if not row.why_not:
            by_dtype.setdefault(row.condition.dtype, []).append(row)
    found = []
    for dtype, its in by_dtype.items():
        largest = max(row.largest for row in its)
        behind = max(row.furthest_behind for row in its)
        bound = in_use[dtype]
        found.append(
            Proposal(
                dtype=dtype,
                tokens=sum(row.tokens for row in its),
                in_use=bound,
                largest=largest,
                furthest_behind=behind,
                proposed=rounded_up(TIMES * max(row.percentiles["p99.9"] for row in its)),
                covered=largest <= bound and behind <= 2 * bound,
            )
        )
    return found


def rounded_up(value: float) -> float:
    """To two digits; what is no positive number stays as it is."""
    if not (value > 0 and math.isfinite(value)):
        return value
    digits = 1 - math.floor(math.log10(value))
    scale = 10.0**digits
    # 2.5 * 100 is no more than 250, whatever binary fractions make of it.
    return round(math.ceil(round(value * scale, 6)) / scale, digits + 1)


def uncovered(found: Iterable[Proposal]) -> str:
    """Which bounds in use are too small, and by how much; empty where none is."""
    return "; ".join(
        f"{each.dtype}: expected at most {each.in_use:g} nats, measured {each.largest:.4g} at most "
        f"and tokens {each.furthest_behind:.4g} behind the most probable one (allowed "
        f"{2 * each.in_use:g}); proposed bound {each.proposed:g}"
        for each in found
        if not each.covered
    )
