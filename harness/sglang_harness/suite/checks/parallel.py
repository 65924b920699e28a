"""Does a parallel server answer as a single process does, and is it really parallel?"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.errors import DidNotComeUp, Refused
from sglang_harness.server import Server
from sglang_harness.suite.check import Check, Context, Mismatch, dtype_of, expect, register
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.scored import Scored
from sglang_harness.suite.lib.served import (
    TOKENS,
    Served,
    figures_of,
    observe_served,
    wrong_answers,
    wrong_served,
)
from sglang_harness.suite.needs import TWO_DEVICES, route
from sglang_harness.verdict import Figure

#: Parameters that every tensor-parallel rank holds whole, by a piece of their name.
WHOLE = ("norm", "gate.weight", "bias", "inv_freq", "cos_sin_cache")

LAYER = re.compile(r"\blayers\.(\d+)\.")


class Rank(BaseModel):
    """One process: its place as it states it, and a checksum for each of its tensors."""

    model_config = ConfigDict(extra="forbid")

    place: dict[str, int]
    checksums: dict[str, str]

    @property
    def layers(self) -> set[int]:
        """Numbers of the decoder layers that it holds."""
        return {int(found[1]) for name in self.checksums if (found := LAYER.search(name))}


class Ranks(Served):
    """A parallel server, the oracle of its model, and what each of its processes holds."""

    layers: int = 0
    """Of the checkpoint."""
    ranks: list[Rank] = Field(default_factory=list)
    ranks_unseen: str = ""
    """Why the server states no checksums; empty when it does."""


def observe_ranks(context: Context, server: Server, seen: Ranks) -> None:
    """Fills ``seen`` with answers and with what each rank holds."""
    oracle = observe_served(context, server, seen)
    seen.layers = oracle.layers
    if reason := route("POST", "/weights_checker").lacking(server):
        seen.ranks_unseen = reason
        return
    try:
        sums = server.client.checksums()
    except Refused as error:  # 0.5.20 needs CUDA for it
        seen.ranks_unseen = f"this SGLang cannot compute checksums here ({error.reason})"
        return
    places = sums.places or ({},) * len(sums.ranks)
    seen.ranks = [
        Rank(place=place, checksums=held) for place, held in zip(places, sums.ranks, strict=True)
    ]


class _Parallel(Check[Ranks]):
    model: ClassVar[str] = "tiny"
    asked: ClassVar[dict[str, int]]
    observation: ClassVar[type[Ranks]] = Ranks
    needs = (TWO_DEVICES,)
    profile = "full"
    own_server = True

    def observe(self, context: Context) -> Ranks:
        seen = self.observation(asked=dict(self.asked))
        args: dict[str, Any] = {n.replace("_", "-"): v for n, v in self.asked.items()}
        try:
            with context.own_server(model=self.model, server_args=args) as server:
                observe_ranks(context, server, seen)
                self.look_closer(context, server, seen)
        except DidNotComeUp as error:
            seen.never_came_up = str(error)
        return seen

    def look_closer(self, context: Context, server: Server, seen: Any) -> None:
        """What else has to be seen of this kind of parallelism."""

    def judge(self, seen: Ranks) -> list[Mismatch]:
        wrong = wrong_served(seen)
        if seen.never_came_up or seen.ranks_unseen:
            return wrong
        if not seen.ranks:
            return [*wrong, Mismatch("ranks", "some", "none")]
        return [*wrong, *self.wrong_ranks(seen)]

    def wrong_ranks(self, seen: Any) -> list[Mismatch]:
        """What is wrong with the ranks for this kind of parallelism."""
        raise NotImplementedError

    def figures(self, seen: Ranks) -> list[Figure]:
        return figures_of(self.id, seen)


def places(seen: Ranks, key: str) -> list[int | None]:
    return [rank.place.get(key) for rank in seen.ranks]


def not_two(seen: Ranks, key: str) -> list[Mismatch]:
    """The ranks are numbered 0 and 1 by ``key``, or this."""
    return list(expect(f"{key} of the ranks", [0, 1], places(seen, key)))


@register
class TensorParallel(_Parallel):
    id = "parallel/tensor-2"
    alike = "tensor-2"
    sentence = (
        "With tensor parallelism of 2 a mixture of experts is served as transformers computes "
        "it, and each rank holds its own part of every matrix."
    )
    model = "tiny-qwen3-moe"
    asked = {"tp_size": 2}  # noqa: RUF012 -- read only, as every class attribute of a check

    def wrong_ranks(self, seen: Ranks) -> list[Mismatch]:
        wrong = not_two(seen, "tp_rank")
        if len(seen.ranks) != 2:
            return wrong
        one, other = (rank.checksums for rank in seen.ranks)
        wrong += expect("names on rank 1", sorted(one), sorted(other))
        same = [n for n in one if n in other and one[n] == other[n]]
        whole = [n for n in one if any(piece in n for piece in WHOLE)]
        if shared := [n for n in same if n not in whole]:
            wrong.append(
                Mismatch("matrices", "another part on each rank", f"equal: {', '.join(shared[:5])}")
            )
        if apart := [n for n in whole if n not in same]:
            wrong.append(
                Mismatch(
                    "tensors that each rank holds whole",
                    "equal on both",
                    f"unequal: {', '.join(apart[:5])}",
                )
            )
        if len(whole) == len(one):
            wrong.append(Mismatch("matrices", "some", f"none among {len(one)} tensors"))
        return wrong


@register
class PipelineParallel(_Parallel):
    id = "parallel/pipeline-2"
    alike = "pipeline-2"
    sentence = (
        "With pipeline parallelism of 2 a Llama is served as transformers computes it, and no "
        "stage holds all layers."
    )
    asked = {"pp_size": 2}  # noqa: RUF012

    def wrong_ranks(self, seen: Ranks) -> list[Mismatch]:
        # SGLang 0.5.23 states the checksums of the first stage alone.
        wrong = list(expect("pp_size of the ranks", {2}, set(places(seen, "pp_size"))))
        held: set[int] = set()
        for number, rank in enumerate(seen.ranks):
            where = f"layers of stage {rank.place.get('pp_rank', number)}"
            if not rank.layers or len(rank.layers) >= seen.layers:
                some = f"some of {seen.layers}"
                wrong.append(Mismatch(where, some, f"{sorted(rank.layers)}"))
            if twice := held & rank.layers:
                wrong.append(Mismatch(where, "none of another's", f"{sorted(twice)} too"))
            held |= rank.layers
        return wrong


class Routed(BaseModel):
    """One answer of a replica that was asked for by its number."""

    model_config = ConfigDict(extra="forbid")

    rank: int
    stated: int | None
    """The replica that the answer says it comes from; ``None``: this SGLang does not say."""
    answer: Scored


class Replicas(Ranks):
    states: int = 0
    """Schedulers that ``/server_info`` has a state of."""
    routed: list[Routed] = Field(default_factory=list)
    """One prompt, sent to the replicas 0, 0, 1 and 1, in this order, with empty caches."""
    unknown_status: int = 0
    """What a replica that is not there answers."""
    balance: str = ""
    """How it chooses a replica by itself, as it states it."""
    by_itself: list[int | None] = Field(default_factory=list)
    """Replicas that answered where none was asked for, one request after another."""


@register
class DataParallel(_Parallel):
    id = "parallel/data-2"
    sentence = (
        "With data parallelism of 2 a Llama is served as transformers computes it, by both "
        "replicas, each with a cache of its own and the same weights."
    )
    asked = {"dp_size": 2}  # noqa: RUF012
    observation = Replicas

    def look_closer(self, context: Context, server: Server, seen: Replicas) -> None:
        client, oracle, dtype = server.client, context.oracle_of(server), dtype_of(server)
        info = client.server_info()
        seen.states = len(info.get("internal_states") or ())
        seen.balance = str(info.get("load_balance_method"))
        client.flush_cache()
        prompt = PROMPTS[1]
        ids = oracle.encode(prompt)
        for rank in (0, 0, 1, 1):
            answer = client.generate(
                prompt, sampling=greedy(TOKENS), logprobs=True, routed_dp_rank=rank
            )
            scored = Scored.of(prompt, ids, answer, oracle, dtype)
            seen.routed.append(Routed(rank=rank, stated=answer.dp_rank, answer=scored))
        try:
            client.generate(prompt, sampling=greedy(1), routed_dp_rank=2)
            seen.unknown_status = 200
        except Refused as error:
            seen.unknown_status = error.status
        seen.by_itself = [client.generate(p, sampling=greedy(1)).dp_rank for p in PROMPTS]

    def judge(self, seen: Ranks) -> list[Mismatch]:
        wrong = super().judge(seen)
        if seen.never_came_up:
            return wrong
        assert isinstance(seen, Replicas)
        wrong += expect("states in /server_info", 2, seen.states)
        wrong += wrong_answers("routed", [r.answer for r in seen.routed], 4)
        for number, routed in enumerate(seen.routed):
            where = f"request {number}, routed to replica {routed.rank}"
            if routed.stated is not None:
                wrong += expect(f"{where}, dp_rank", routed.rank, routed.stated)
            # The first one of each replica finds its cache empty, whatever the other holds.
            first = all(r.rank != routed.rank for r in seen.routed[:number])
            cached = routed.answer.cached_tokens
            if first and cached:
                wrong.append(Mismatch(f"{where}, cached tokens", "none of its own", str(cached)))
            if not first and not cached:
                wrong.append(Mismatch(f"{where}, cached tokens", "some", "none"))
        if not 400 <= seen.unknown_status < 500:
            got = str(seen.unknown_status)
            wrong.append(Mismatch("a replica that is not there", "a refusal (4xx)", got))
        told = {rank for rank in seen.by_itself if rank is not None}
        if seen.balance == "round_robin" and told and told != {0, 1}:
            wrong.append(Mismatch("replicas at work by themselves", "0 and 1", f"{sorted(told)}"))
        return wrong

    def wrong_ranks(self, seen: Ranks) -> list[Mismatch]:
        wrong = not_two(seen, "dp_rank")
        if len(seen.ranks) == 2:
            one, other = (rank.checksums for rank in seen.ranks)
            differing = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
            wrong += expect("checksums that differ between the replicas", [], differing)
        return wrong
