"""Do new weights arrive by each route, and does the way back restore what was there?"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang_harness import oracle as oracles
from sglang_harness.suite.check import Check, Context, Mismatch, Need, Observation, expect, register
from sglang_harness.suite.checks.generate import PROMPTS, greedy
from sglang_harness.suite.checks.weights.disk import (
    PUSHED,
    first_weights_afterwards,
    pushed,
    update_from_disk,
    variant,
)
from sglang_harness.suite.lib.scored import Tokens, unequal
from sglang_harness.suite.needs import CHECKSUMS
from sglang_harness.verdict import Figure
from sglang_harness.weights import PushReport, routes

#: Bytes of a bucket: small enough that every model takes several.
BUCKET = 64 << 20


def leads_here(route: str) -> Need:
    """The target can be reached by a route at all."""
    return Need(f"the route '{route}'", lambda server: routes.make(route).lacking(server))


class ThereAndBack(Observation):
    there: PushReport
    back: PushReport | None
    """``None`` where the way there failed."""
    changed: int
    """How many checksums the way there changed."""
    unlike_disk: list[str]
    """Parameters that are not what the same checkpoint makes of them from disk."""
    unlike_before: list[str]
    """Parameters that are not, after the way back, what they were before."""
    before: list[Tokens]
    after: list[Tokens]
    tolerance: float


class RouteServesAndRestores(Check[ThereAndBack]):
    """One route; each subclass names one."""

    route: ClassVar[str]
    observation = ThereAndBack
    changes = True

    def observe(self, context: Context) -> ThereAndBack:
        server, new = context.server, variant(context)
        client, old = server.client, server.model
        assert old is not None

        def ask() -> list[Tokens]:
            client.flush_cache()
            return [
                Tokens.of(client.generate(p, sampling=greedy(8), logprobs=True))
                for p in PROMPTS[:2]
            ]

        sums, before = client.checksums(), ask()
        with first_weights_afterwards(context):
            way: dict[str, Any] = {
                "route": self.route,
                "version": None,
                "logprobs": True,
                "bucket_bytes": BUCKET,
            }
            there = pushed(server, new.folder, **way)
            by_route = client.checksums()
            back = pushed(server, old, **way) if there.outcome != "failed" else None
            restored, after = client.checksums(), ask()
            # Last, as the first weights are put back from disk after it in any case.
            update_from_disk(context, new.inside, "harness-disk")
            by_disk = client.checksums()
            return ThereAndBack(
                there=there,
                back=back,
                changed=len(by_route.changed_since(sums)),
                unlike_disk=by_route.changed_since(by_disk),
                unlike_before=restored.changed_since(sums),
                before=before,
                after=after,
                tolerance=oracles.tolerance(context.dtype),
            )

    def judge(self, seen: ThereAndBack) -> list[Mismatch]:
        wrong = []
        for where, report in (("there", seen.there), ("back", seen.back)):
            if report is None:
                wrong.append(Mismatch(f"the way {where}", "a push", "none was tried"))
            elif report.outcome != "good":
                wrong.append(
                    Mismatch(
                        f"the way {where}", "a good push", f"{report.outcome}: {report.reason}"
                    )
                )
        if not seen.changed:
            wrong.append(Mismatch("checksums after the way there", "changed ones", "none"))
        wrong += expect("checksums unlike those from disk", [], seen.unlike_disk)
        wrong += expect("checksums after the way back", [], seen.unlike_before)
        for number, (before, after) in enumerate(zip(seen.before, seen.after, strict=True)):
            wrong += unequal(f"answer {number}", before, after, seen.tolerance)
        return wrong

    def figures(self, seen: ThereAndBack) -> list[Figure]:
        report, name = seen.there, f"push by {self.route}"
        return [
            Figure.of(name, "s", "lower", report.seconds),
            Figure.of(f"{name}, rate", "GB/s", "higher", report.gigabytes_per_second),
            Figure.of(f"{name}, the harness's part", "s", "lower", report.seconds_ours),
        ]


@register
class TensorsInTheBody(RouteServesAndRestores):
    id = "weights/tensor"
    sentence = (
        "Weights pushed as tensors in the body are served, equal those from disk, and the way "
        "back restores every checksum and answer."
    )
    route = "tensor"
    needs = (*PUSHED, CHECKSUMS, leads_here("tensor"))


@register
class BucketsInTheBody(RouteServesAndRestores):
    id = "weights/tensor-bucket"
    sentence = (
        "Weights pushed as flattened buckets in the body are served, equal those from disk, and "
        "the way back restores every checksum and answer."
    )
    route = "tensor-bucket"
    needs = (*PUSHED, CHECKSUMS, leads_here("tensor-bucket"))


@register
class BySharedMemory(RouteServesAndRestores):
    id = "weights/shared-memory"
    sentence = (
        "Weights handed over in shared memory by a peer are served, equal those from disk, and "
        "the way back restores every checksum and answer."
    )
    route = "shared-memory"
    needs = (*PUSHED, CHECKSUMS, leads_here("shared-memory"))


@register
class ByProcessGroup(RouteServesAndRestores):
    id = "weights/distributed"
    sentence = (
        "Weights broadcast by a peer in a process group are served, equal those from disk, and "
        "the way back restores every checksum and answer."
    )
    route = "distributed"
    # The peer imports SGLang for it: half a minute that a quick run does not have.
    profile = "full"
    needs = (*PUSHED, CHECKSUMS, leads_here("distributed"))
