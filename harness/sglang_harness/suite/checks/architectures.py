"""Is each architecture served rightly, whatever the run's own model is? A seeded tiny model of each
gets a server of its own; every architecture that tiny models are made of is checked."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang_harness.checkpoint.made import tiny
from sglang_harness.errors import DidNotComeUp
from sglang_harness.suite.check import Check, Context, Mismatch, register
from sglang_harness.suite.lib.served import Served, figures_of, observe_served, wrong_served
from sglang_harness.verdict import Figure

#: What tells a tiny model from a plain Llama, for the reader of the sentence.
SPECIAL = {
    "qwen2": "biases, tied embeddings",
    "qwen3": "norms of queries and keys",
    "qwen3-moe": "four experts, two a token",
    "mixtral": "four experts, two a token",
}
#: As their makers write them.
WRITTEN = {"qwen3-moe": "Qwen3-MoE"}


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


def _check_of(architecture: str) -> type[Check[Any]]:
    """The check of one of ``tiny.ARCHITECTURES``."""
    written = tiny.ARCHITECTURES[architecture].removesuffix("ForCausalLM")
    written = WRITTEN.get(architecture, written)
    if special := SPECIAL.get(architecture):
        written += f" ({special})"
    return type(
        f"{tiny.ARCHITECTURES[architecture]}IsServed",
        (_Architecture,),
        {
            "__doc__": _Architecture.__doc__,
            "__module__": __name__,
            "id": f"architectures/{architecture or 'llama'}",
            "alike": architecture,
            "model": f"tiny-{architecture}" if architecture else "tiny",
            "sentence": f"A {written} is served as transformers computes it, alone and in a batch.",
        },
    )


for _name in tiny.ARCHITECTURES:
    register(_check_of(_name))
