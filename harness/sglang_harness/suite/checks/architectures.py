"""Does it serve each architecture, whatever the run's own model is? A seeded tiny model of each
gets a server of its own."""

from __future__ import annotations

from typing import ClassVar

from sglang_harness.errors import DidNotComeUp
from sglang_harness.suite.check import Check, Context, Mismatch, register
from sglang_harness.suite.lib.served import Served, figures_of, observe_served, wrong_served
from sglang_harness.verdict import Figure


class _Architecture(Check[Served]):
    """Loads, and answers as the same checkpoint does in transformers."""

    model: ClassVar[str]
    observation = Served
    profile = "full"
    own_server = True

    def observe(self, context: Context) -> Served:
        seen = Served()
        try:
            with context.own_server(model=self.model, server_args={}) as server:
                observe_served(context, server, seen)
        except DidNotComeUp as error:
            seen.never_came_up = str(error)
        return seen

    def judge(self, seen: Served) -> list[Mismatch]:
        return wrong_served(seen)

    def figures(self, seen: Served) -> list[Figure]:
        return figures_of(self.id, seen)


@register
class Llama(_Architecture):
    id = "architectures/llama"
    sentence = "A Llama is served as transformers computes it, alone and in a batch."
    model = "tiny"


@register
class Qwen2(_Architecture):
    id = "architectures/qwen2"
    sentence = (
        "A Qwen2 (biases, tied embeddings) is served as transformers computes it, alone and in "
        "a batch."
    )
    model = "tiny-qwen2"


@register
class Qwen3(_Architecture):
    id = "architectures/qwen3"
    sentence = (
        "A Qwen3 (norms of queries and keys) is served as transformers computes it, alone and "
        "in a batch."
    )
    model = "tiny-qwen3"


@register
class Qwen3Moe(_Architecture):
    id = "architectures/qwen3-moe"
    alike = "qwen3-moe"
    sentence = (
        "A Qwen3-MoE (four experts, two a token) is served as transformers computes it, alone "
        "and in a batch."
    )
    model = "tiny-qwen3-moe"


@register
class Mixtral(_Architecture):
    id = "architectures/mixtral"
    sentence = (
        "A Mixtral (four experts, two a token) is served as transformers computes it, alone and "
        "in a batch."
    )
    model = "tiny-mixtral"
