"""What takes a second GPU: weights by NCCL from a GPU that the server is not on, and a server whose
weights are split over two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_harness.errors import NotProvided
from sglang_harness.gpu_check import served
from sglang_harness.gpu_check.part import Context, NotHere, Part
from sglang_harness.gpu_check.parts import fused_layout, pushes
from sglang_harness.gpu_check.parts.fused_layout import LayoutSeen
from sglang_harness.gpu_check.parts.pushes import RouteSeen
from sglang_harness.gpu_check.suite_questions import context_of, gpu_memory
from sglang_harness.server import Server
from sglang_harness.suite.checks.memory.release import scored_by, wrong_answers
from sglang_harness.suite.lib.scored import Scored, largest_error


@dataclass(frozen=True)
class TwoRanksSeen:
    """A server over two GPUs.

    Attributes:
        ranks: that it says it has.
        layout: its checksums, rank by rank, beside the computed ones; ``None``: not known, and
            ``no_layout`` says why.
        added: bytes on each of the GPUs above what was there before it started.
    """

    ranks: int
    layout: LayoutSeen | None
    no_layout: str
    answers: list[Scored]
    added: dict[str, int]


def wrong(nccl: RouteSeen, two: TwoRanksSeen) -> list[str]:
    """What did not arrive, answer right or spread over two GPUs."""
    found = pushes.wrong(nccl)
    if nccl.lacking is not None:
        found.append(f"{nccl.route}: expected to lead to the server, got {nccl.lacking}")
    elif not nccl.pushes and not nccl.error:
        found.append(f"{nccl.route}: expected a push, got none: {nccl.stopped}")
    if two.ranks != 2:
        found.append(f"tensor parallel: expected 2 ranks, got {two.ranks}")
    empty = [uuid for uuid, added in two.added.items() if added <= 0]
    if len(two.added) != 2 or empty:
        found.append(f"tensor parallel: expected memory on 2 GPUs, got it on {_on(two)}")
    if two.layout is not None:
        found += [f"tensor parallel: {each}" for each in fused_layout.wrong(two.layout)]
    found += [str(each) for each in wrong_answers("over two GPUs", two.answers)]
    return found


def _on(two: TwoRanksSeen) -> str:
    return ", ".join(uuid for uuid, added in two.added.items() if added > 0) or "none"


def figures(nccl: RouteSeen, two: TwoRanksSeen) -> dict[str, Any]:
    """For the results."""
    layout = two.layout
    return {
        "nccl": pushes.told(nccl),
        "ranks": two.ranks,
        "added_mib": {uuid: round(added / (1 << 20), 1) for uuid, added in two.added.items()},
        "layout": fused_layout.figures(layout) if layout else two.no_layout,
        "largest_error_nats": largest_error(two.answers),
    }


def observe_two_ranks(server: Server, answers: list[Scored]) -> TwoRanksSeen:
    """A server that was started over two GPUs.

    Raises:
        HarnessError: as the client, NVML or the checkpoint do.
    """
    source = gpu_memory(server)
    marks = {r.mark: r.parts for r in server.memory.readings if r.source == "nvml"}
    before, now = marks.get("before start", {}), source.read()[1] if source else {}
    layout, why = None, ""
    try:
        layout = fused_layout.observe(server)
    except NotProvided as error:
        why = error.message
    return TwoRanksSeen(
        ranks=int(server.client.server_info().get("tp_size") or 1),
        layout=layout,
        no_layout=why,
        answers=answers,
        added={uuid: used - before.get(uuid, 0) for uuid, used in now.items()},
    )


def run(context: Context) -> dict[str, Any]:
    """The part ``second-gpu``."""
    first, *others = context.settings.gpus or [""]
    if not others:
        raise NotHere("one GPU")
    other = served.other_checkpoint(context)
    both_gpus = f"{first},{others[0]}"
    # One rank, on the first of them: the peer sends from the other.
    alone = context.server(
        model=served.model(context),
        gpus=both_gpus,
        server_args=served.memory_share(context),
        limits=served.limits(context),
    )
    (nccl,) = pushes.observe(
        alone,
        other,
        left=lambda: context.left() / 2,
        say=context.say,
        each_seen=lambda seen: context.put("nccl", pushes.told(seen)),
        asked=["distributed"],
        round_trips=1,
    )
    both = context.server(
        model=served.model(context),
        gpus=both_gpus,
        server_args={"tp-size": 2, **served.memory_share(context)},
        limits=served.limits(context),
    )
    asked = context_of(both, served.scratch(context))
    two = observe_two_ranks(both, scored_by(asked, asked.oracle))
    told = figures(nccl, two)
    context.headline(f"NCCL {told['nccl'].get('gb_per_s')} GB/s, {two.ranks} ranks")
    context.note("second GPU", "push by NCCL", nccl.lacking or f"{told['nccl']['gb_per_s']} GB/s")
    return served.ended(context, told, wrong(nccl, two))


PART = Part(
    "second-gpu",
    "Do weights arrive by NCCL from another GPU, and does a server over two GPUs answer right?",
    240.0,
    run,
    needs=frozenset({"cuda", "two gpus", "release"}),
    group="second GPU",
    scope="release",
    disk_bytes=6_000_000_000,
)
