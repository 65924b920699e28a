"""What checks ask: a few prompts, and sampling parameters for greedy answers."""

from __future__ import annotations

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):",
    "Water boils at",
)
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def greedy(tokens: int) -> dict[str, object]:
    """Sampling parameters for exactly ``tokens`` most probable tokens."""
    return {**GREEDY, "max_new_tokens": tokens}
