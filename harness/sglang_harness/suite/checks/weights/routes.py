"""Do new weights arrive by each route, and does pushing the first ones back restore the server?
Every registered route is checked."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang_harness import oracle as oracles
from sglang_harness.suite.check import Check, Context, Mismatch, Need, Observation, expect, register
from sglang_harness.suite.checks.weights.disk import (
    first_weights_afterwards,
    pushed,
    update_from_disk,
    variant,
)
from sglang_harness.suite.lib.prompts import PROMPTS
from sglang_harness.suite.lib.scored import Tokens, unequal
from sglang_harness.suite.needs import CHECKSUMS, LOADS_FROM_DISK
from sglang_harness.verdict import Figure
from sglang_harness.weights import PushReport, routes

#: Bytes of a bucket: small enough that every model takes several.
BUCKET = 64 << 20


def leads_here(route: str) -> Need:
    """The route leads to the server at all."""
    return Need(f"the route '{route}'", lambda server: routes.make(route).lacking(server))


class ThereAndBack(Observation):
    there: PushReport
    back: PushReport | None
    """``None`` where the push of the new weights failed."""
    changed: int
    """How many checksums the push of the new weights changed."""
    unlike_disk: list[str]
    """Parameters that are not what the same checkpoint makes of them from disk."""
    unlike_before: list[str]
    """Parameters that are not what they were before, after the first weights were pushed back."""
    before: list[Tokens]
    after: list[Tokens]
    tolerance: float


class RouteServesAndRestores(Check[ThereAndBack]):
    """There and back by one route; each subclass names one."""

    route: ClassVar[str]
    observation = ThereAndBack
    changes = True

    def observe(self, context: Context) -> ThereAndBack:
        server, new = context.server, variant(context)
        client, old = server.client, server.model
        assert old is not None

        def ask() -> list[Tokens]:
            return [Tokens.asked(client, prompt, 8) for prompt in PROMPTS[:2]]

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
            # Last, as the first weights are restored from disk after it in any case.
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
        for which, report in (("new", seen.there), ("first", seen.back)):
            if report is None:
                wrong.append(Mismatch(f"push of the {which} weights", "one", "none was tried"))
            elif report.outcome != "good":
                wrong.append(
                    Mismatch(
                        f"push of the {which} weights",
                        "a proven one",
                        f"{report.outcome}: {report.reason}",
                    )
                )
        if not seen.changed:
            wrong.append(Mismatch("checksums after pushing new weights", "changed ones", "none"))
        wrong += expect("checksums unlike those from disk", [], seen.unlike_disk)
        wrong += expect("checksums after pushing the first weights", [], seen.unlike_before)
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


def _check_of(route: str) -> type[Check[Any]]:
    """The check of one route."""
    kind = routes.kind(route)
    return type(
        f"{kind.__name__}ServesAndRestores",
        (RouteServesAndRestores,),
        {
            "__doc__": kind.title,
            "__module__": __name__,
            "id": f"weights/{route}",
            "sentence": (
                f"Weights {kind.title} are served, equal those from disk, and pushing the first "
                "ones back restores every checksum and answer."
            ),
            "route": route,
            "profile": "quick" if kind.quick else "full",
            "needs": (*LOADS_FROM_DISK, CHECKSUMS, leads_here(route)),
        },
    )


def is_tried(route: str) -> bool:
    """Whether this project has run the route at all: one that needs a GPU and was never run on one
    would blame the server for the harness's own mistakes."""
    kind = routes.kind(route)
    return not (kind.needs.gpu and kind.unverified)


# The route "disk" has several checks of its own. Quick ones come first.
for _route in sorted(routes.names(), key=lambda name: not routes.kind(name).quick):
    if _route != "disk" and is_tried(_route):
        register(_check_of(_route))
