"""Do new weights arrive in every process of a parallel server, and in every expert?"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from sglang_harness.checkpoint.made.perturb import perturbed, strength_for
from sglang_harness.errors import DidNotComeUp
from sglang_harness.server import Server
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    Observation,
    dtype_of,
    expect,
    register,
)
from sglang_harness.suite.checks.weights.disk import pushed
from sglang_harness.suite.checks.weights.routes import is_tried
from sglang_harness.suite.needs import CHECKSUMS, TWO_DEVICES
from sglang_harness.verdict import Figure
from sglang_harness.weights import PushReport, routes


class PushedByRoutes(Observation):
    never_came_up: str = ""
    ranks: int = 0
    """Processes that state checksums."""
    routes: list[str] | None = None
    """Those that lead to the server; ``None`` in verdicts that do not say."""
    pushes: dict[str, PushReport] = Field(default_factory=dict)
    """By route, each onto the first weights."""
    changed: dict[str, int] = Field(default_factory=dict)
    """By route, how many checksums the push changed, on all ranks together."""
    unlike: dict[str, list[str]] = Field(default_factory=dict)
    """By route, parameters that are not what the first route made of them."""
    restored: list[str] = Field(default_factory=list)
    """Parameters that are not what they were at first, after the first weights came back."""


class _Pushed(Check[PushedByRoutes]):
    observation = PushedByRoutes
    profile = "full"
    own_server = True
    model: ClassVar[str] = "tiny"
    args: ClassVar[dict[str, int]] = {}
    #: Routes that are not tried, as they were never seen to work with this kind of server.
    leaves_out: ClassVar[frozenset[str]] = frozenset()

    def observe(self, context: Context) -> PushedByRoutes:
        seen = PushedByRoutes()
        try:
            with context.own_server(model=self.model, server_args=self.args) as server:
                assert server.model is not None
                client = server.client
                folder = context.scratch / f"variant-of-{self.model}"
                if not folder.exists():
                    strength = strength_for(dtype_of(server))
                    perturbed(server.model, folder, context.seed, strength=strength)
                first, made = client.checksums(), None
                seen.ranks = len(first.ranks)
                seen.routes = self.routes(server)
                for route in seen.routes:
                    push = pushed(server, folder, route=route, version=None, logprobs=True)
                    seen.pushes[route] = push
                    if push.outcome == "failed":
                        continue
                    now = client.checksums()
                    made = made or now
                    seen.changed[route] = len(now.changed_since(first))
                    seen.unlike[route] = now.changed_since(made)
                    client.flush_cache()
                    client.update_weights_from_disk(
                        server.running.model_path(), weight_version="default"
                    )
                    seen.restored += client.checksums().changed_since(first)
        except DidNotComeUp as error:
            seen.never_came_up = str(error)
        return seen

    def routes(self, server: Server) -> list[str]:
        """Every route that leads to ``server``, that from disk first: it is what the others are
        compared with."""
        leading = (
            name
            for name in routes.names()
            if name not in self.leaves_out
            and is_tried(name)
            and routes.make(name).lacking(server) is None
        )
        return sorted(leading, key=lambda name: name != "disk")

    def judge(self, seen: PushedByRoutes) -> list[Mismatch]:
        if seen.never_came_up:
            return [Mismatch("the server", "to come up", seen.never_came_up)]
        wrong: list[Mismatch] = []
        if seen.routes is not None:
            wrong += expect("routes that were pushed by", seen.routes, list(seen.pushes))
        if len(seen.pushes) < 2:
            # They are compared with one another.
            wrong.append(Mismatch("routes", "two or more", ", ".join(seen.pushes) or "none"))
        for route, push in seen.pushes.items():
            where = f"push by '{route}'"
            if push.outcome == "failed":
                wrong.append(Mismatch(where, "to arrive", push.reason))
                continue
            # Where the layout over the ranks is not known here, the routes are compared with one
            # another; the oracle always answers.
            wrong += expect(f"{where}, log-probabilities", "agrees", push.logprobs.says)
            if not seen.changed.get(route):
                wrong.append(Mismatch(f"{where}, checksums", "changed ones", "none"))
            wrong += expect(f"{where}, unlike the first route", [], seen.unlike.get(route))
        wrong += expect("checksums after restoring the first weights", [], seen.restored)
        return wrong

    def figures(self, seen: PushedByRoutes) -> list[Figure]:
        name = self.id.rpartition("/")[2]
        return [
            Figure.of(f"{name}, {route}", "s", "lower", push.seconds)
            for route, push in seen.pushes.items()
        ]


@register
class OntoTensorParallel(_Pushed):
    id = "weights/on-tensor-2"
    alike = "tensor-2"
    model = "tiny-qwen3-moe"
    sentence = (
        "With tensor parallelism of 2 a push by each route gives every rank its part of the new "
        "weights."
    )
    args: ClassVar[dict[str, Any]] = {"tp-size": 2}
    needs = (TWO_DEVICES, CHECKSUMS)

    def judge(self, seen: PushedByRoutes) -> list[Mismatch]:
        wrong = super().judge(seen)
        if not seen.never_came_up:
            wrong += expect("ranks", 2, seen.ranks)
        return wrong


@register
class OntoPipelineParallel(_Pushed):
    id = "weights/on-pipeline-2"
    alike = "pipeline-2"
    sentence = (
        "With pipeline parallelism of 2 a push by each route gives every stage its layers of the "
        "new weights."
    )
    args: ClassVar[dict[str, Any]] = {"pp-size": 2}
    leaves_out = frozenset({"distributed", "shared-memory"})
    needs = (TWO_DEVICES, CHECKSUMS)


@register
class OntoExperts(_Pushed):
    id = "weights/on-experts"
    alike = "qwen3-moe"
    sentence = "A push onto a mixture of experts by each route reaches every expert."
    model = "tiny-qwen3-moe"
    needs = (CHECKSUMS,)

    def judge(self, seen: PushedByRoutes) -> list[Mismatch]:
        wrong = super().judge(seen)
        for route, push in seen.pushes.items():
            if push.outcome != "failed":
                wrong += expect(f"push by '{route}', checksums", "agrees", push.checksums.says)
        return wrong
