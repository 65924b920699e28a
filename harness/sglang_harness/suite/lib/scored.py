"""Served tokens and the oracle's scores of them: the data that most checks judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict

from sglang_harness import oracle as oracles
from sglang_harness.client import Client, Generation, calls
from sglang_harness.oracle import Oracle
from sglang_harness.suite.check import Mismatch
from sglang_harness.suite.lib.prompts import greedy

#: Two sets of weights can be told apart by an answer of one that is further off the other than so
#: many tolerances: of the weights that it is of, it is one off at most. More would ask too much of
#: half precision: noise of 5 % on every tensor moved a model in bfloat16 by 0.68 nats.
APART = 2.0


class Scored(BaseModel):
    """One answer with the oracle's scores; all log-probabilities are in nats.

    Attributes:
        served: the server's log-probability of each output token; empty if not asked for.
        oracle: the oracle's, for the same tokens.
        best_ids: the oracle's most probable token at each place.
        best: its log-probability.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    prompt_ids: list[int]
    text: str
    output_ids: list[int]
    served: list[float]
    served_ids: list[int]
    oracle: list[float]
    best_ids: list[int]
    best: list[float]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish: str
    tolerance: float

    @classmethod
    def of(
        cls, prompt: str, prompt_ids: Sequence[int], answer: Generation, oracle: Oracle, dtype: str
    ) -> Scored:
        """Scores ``answer``, token for token; nothing is scored of an empty one."""
        ids = list(answer.output_ids)
        scores = oracle.score(prompt_ids, ids) if ids else oracles.Scores((), (), ())
        return cls(
            prompt=prompt,
            prompt_ids=list(prompt_ids),
            text=answer.text,
            output_ids=ids,
            served=list(answer.logprobs),
            served_ids=list(answer.logprob_ids),
            oracle=list(scores.logprobs),
            best_ids=list(scores.best_ids),
            best=list(scores.best_logprobs),
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=answer.cached_tokens,
            finish=answer.finish,
            tolerance=oracles.tolerance(dtype),
        )


def wrong_counts(where: str, seen: Scored, tokens: int) -> Iterator[Mismatch]:
    """The answer has as many tokens as were asked for, and its own counts agree."""
    if len(seen.output_ids) != tokens:
        yield Mismatch(where, f"{tokens} tokens", f"{len(seen.output_ids)} tokens")
    if seen.completion_tokens != len(seen.output_ids):
        yield Mismatch(
            where,
            f"completion_tokens {len(seen.output_ids)}, as many as came",
            str(seen.completion_tokens),
        )
    if seen.prompt_tokens != len(seen.prompt_ids):
        yield Mismatch(where, f"prompt_tokens {len(seen.prompt_ids)}", str(seen.prompt_tokens))


def not_greedy(where: str, seen: Scored) -> Iterator[Mismatch]:
    """Each token is the oracle's most probable one, or as probable within the tolerance.

    Both sides may be off by the tolerance, so a near tie is one within twice of it.
    """
    for place, (token, its, best_id, best) in enumerate(
        zip(seen.output_ids, seen.oracle, seen.best_ids, seen.best, strict=True)
    ):
        if token != best_id and not best - its <= 2 * seen.tolerance:  # NaN too
            yield Mismatch(
                f"{where}, token {place}",
                f"token {best_id} (log-probability {best:.5f})",
                f"token {token} ({its:.5f})",
                f"less probable by {best - its:.5f}, tolerance {2 * seen.tolerance:g}",
            )
            return  # everything after a wrong token follows from it


def wrong_logprobs(where: str, seen: Scored) -> Iterator[Mismatch]:
    """Each served log-probability is the oracle's, and belongs to the token that was sent."""
    if seen.served_ids != seen.output_ids:
        yield Mismatch(
            where, f"log-probabilities of the tokens {seen.output_ids}", f"of {seen.served_ids}"
        )
        return
    for place, (served, reference) in enumerate(zip(seen.served, seen.oracle, strict=True)):
        off = abs(served - reference)
        if not off <= seen.tolerance:  # catches NaN too
            yield Mismatch(
                f"{where}, token {place} ({seen.output_ids[place]})",
                f"log-probability {reference:.6f}",
                f"{served:.6f}",
                f"off by {off:.6f}, tolerance {seen.tolerance:g}",
            )


def largest_error(seen: Sequence[Scored]) -> float:
    """The largest distance between a served and the oracle's log-probability, in nats."""
    return max(
        (abs(a - b) for s in seen for a, b in zip(s.served, s.oracle, strict=False)), default=0.0
    )


class Tokens(BaseModel):
    """An answer to be compared with another answer, not with the oracle."""

    model_config = ConfigDict(extra="forbid")

    text: str
    ids: list[int]
    logprobs: list[float]
    finish: str = ""

    @classmethod
    def of(cls, answer: Generation) -> Tokens:
        return cls(
            text=answer.text,
            ids=list(answer.output_ids),
            logprobs=list(answer.logprobs),
            finish=answer.finish,
        )

    @classmethod
    def asked(
        cls, client: Client, prompt: calls.Prompt, tokens: int, *, timeout: float | None = None
    ) -> Tokens:
        """The greedy answer to ``prompt``, computed with an empty prefix cache.

        Args:
            timeout: seconds for each of the two calls; by default what the client allows.
        """
        client.send(replace(calls.flush_cache(), timeout=timeout))
        return cls.of(
            client.generate(prompt, sampling=greedy(tokens), logprobs=True, timeout=timeout)
        )


def unequal(where: str, expected: Tokens, got: Tokens, tolerance: float) -> Iterator[Mismatch]:
    """Two greedy answers agree up to a near tie, after which they may go apart.

    Where the ids part, both chosen tokens must be as probable within twice the tolerance:
    batching changes the order of sums, and in half precision that can turn a tie.
    """
    for answer in (expected, got):
        if len(answer.logprobs) != len(answer.ids):
            scored = f"{len(answer.logprobs)} log-probabilities"
            yield Mismatch(where, f"{len(answer.ids)} log-probabilities, one a token", scored)
            return
    for place, (a, b) in enumerate(zip(expected.ids, got.ids, strict=False)):
        apart = abs(expected.logprobs[place] - got.logprobs[place])
        if a != b:
            if not apart <= 2 * tolerance:
                yield Mismatch(
                    f"{where}, token {place}",
                    f"token {a}",
                    f"token {b}",
                    f"log-probabilities {apart:.5f} apart, tolerance {2 * tolerance:g}",
                )
            return
        if not apart <= 2 * tolerance:
            yield Mismatch(
                f"{where}, token {place} ({a})",
                f"log-probability {expected.logprobs[place]:.6f}",
                f"{got.logprobs[place]:.6f}",
                f"off by {apart:.6f}, tolerance {2 * tolerance:g}",
            )
    if len(expected.ids) != len(got.ids):
        yield Mismatch(where, f"{len(expected.ids)} tokens", f"{len(got.ids)} tokens")
    elif expected.text != got.text:
        yield Mismatch(where, f"text {expected.text!r}", repr(got.text))
