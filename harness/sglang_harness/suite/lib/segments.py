"""Answers during which the weights were exchanged, scored segment by segment.

What is right depends on how the server was paused. Taken back (``retract``), the new weights
compute everything before the next token anew. Left in place (``in_place``, told not to flush),
they go on over the keys and values of the old ones. So each answer has one place where old
becomes new, and the oracle of that way of going on decides whether every token is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from sglang_harness.oracle import Oracle
from sglang_harness.suite.check import Mismatch


class Segmented(BaseModel):
    """One answer beside the oracles of both weights; log-probabilities in nats.

    Attributes:
        served: the server's, one a token.
        old: the old weights', one a token.
        switched: how many tokens are the old weights', by what fits best.
        expected: the log-probabilities of an answer that switches there.
        stated: how many tokens carry the old label, where the server says it of each token.
    """

    model_config = ConfigDict(extra="forbid")

    prompt_ids: list[int]
    ids: list[int]
    served: list[float]
    old: list[float]
    switched: int
    expected: list[float]
    stated: int | None
    finish: str

    @classmethod
    def of(
        cls,
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        served: Sequence[float],
        *,
        spans: Sequence[tuple[str, int, int]],
        new_label: str,
        finish: str,
        old: Oracle,
        new: Oracle,
        in_place: bool,
    ) -> Segmented:
        """Scores an answer; where it switches is computed, whatever the server states."""
        ids, served = list(ids), list(served)
        by_old = list(old.score(prompt_ids, ids).logprobs) if ids else []
        stated = None
        if spans:
            stated = sum(end - start for label, start, end in spans if label != new_label)
        switched, expected = 0, []
        if len(served) == len(ids) and ids:
            by_new = list(new.score(prompt_ids, ids).logprobs)

            def going_on(place: int) -> list[float]:
                if place in (0, len(ids)) or not in_place:
                    return by_old[:place] + by_new[place:]
                return list(new.score_over(old, prompt_ids, ids, place).logprobs)

            # Where it switched is the first token that the old weights do not explain, or, as
            # the two may agree on a token by chance, one a little before it.
            first = next(
                (
                    n
                    for n, (a, b) in enumerate(zip(served, by_old, strict=True))
                    if abs(a - b) > CHANCE
                ),
                len(ids),
            )
            tried = {n: going_on(n) for n in range(max(0, first - 3), first + 1)}
            switched = min(tried, key=lambda n: (_worst(served, tried[n]), -n))
            expected = tried[switched]
        return cls(
            prompt_ids=list(prompt_ids),
            ids=ids,
            served=served,
            old=by_old,
            switched=switched,
            expected=expected,
            stated=stated,
            finish=finish,
        )

    @property
    def is_mixed(self) -> bool:
        """Whether both weights have a part in it."""
        return 0 < self.switched < len(self.ids)


#: Nats by which a token's log-probability has to be off before it is no longer the old weights'.
#: Between what other kernels make of the same weights in float32 and what other weights do.
CHANCE = 1e-3


def _worst(served: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(served, expected, strict=True))


def wrong_segments(where: str, seen: Segmented, tolerance: float) -> Iterator[Mismatch]:
    """Every token is the old weights' up to one place, and the new ones' from there on."""
    if not seen.ids:
        yield Mismatch(where, "tokens", "none")
        return
    if not len(seen.served) == len(seen.expected) == len(seen.ids):
        yield Mismatch(
            where, f"{len(seen.ids)} log-probabilities, one a token", str(len(seen.served))
        )
        return
    for place, (served, expected) in enumerate(zip(seen.served, seen.expected, strict=True)):
        off = abs(served - expected)
        if not off <= tolerance:
            whose = "old" if place < seen.switched else "new"
            yield Mismatch(
                f"{where}, token {place} ({whose} weights; they switch at {seen.switched})",
                f"log-probability {expected:.6f}",
                f"{served:.6f}",
                f"off by {off:.6f}, tolerance {tolerance:g}",
            )
            return
