"""How evidence is altered, one value at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from evidence import good

PER_TOKEN = ("output_ids", "served", "served_ids", "oracle", "best_ids", "best")


class Alteration(NamedTuple):
    check: str
    name: str
    """What is wrong with the server, or what is odd about it and still right."""
    alter: Callable[[dict[str, Any]], object]
    """Changes good evidence in place."""
    piece: str = ""
    """What the message has to say."""

    def altered(self) -> dict[str, Any]:
        evidence = good(self.check)
        self.alter(evidence)
        return evidence


def put(changes: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    """Puts values at places such as ``answers.0.finish``."""

    def alter(evidence: dict[str, Any]) -> None:
        for place, value in changes.items():
            *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
            inner: Any = evidence
            for step in way:
                inner = inner[step]
            inner[last] = copy.deepcopy(value)

    return alter


def at(*way: str | int, do: Callable[[Any], object]) -> Callable[[dict[str, Any]], object]:
    """Alters what is at one place, by a function that changes it in place."""

    def alter(evidence: dict[str, Any]) -> None:
        inner: Any = evidence
        for step in way:
            inner = inner[step]
        do(inner)

    return alter


def off_by(amount: float, *way: str | int) -> Callable[[dict[str, Any]], object]:
    *before, last = way
    return at(*before, do=lambda inner: inner.__setitem__(last, inner[last] + amount))


def swap(first: Any, second: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        first[key], second[key] = second[key], first[key]


def shift(values: list[Any]) -> None:
    """Every value stands one place too far left."""
    values.append(values.pop(0))


def other_tokens(answer: dict[str, Any]) -> None:
    """An answer of improbable tokens that are scored as such, for example by q and k swapped."""
    answer["output_ids"] = [i + 1 for i in answer["output_ids"]]
    answer["oracle"] = [best - 4.0 for best in answer["best"]]
    if answer["served"]:
        answer["served_ids"] = list(answer["output_ids"])
        answer["served"] = list(answer["oracle"])


def cut(answer: dict[str, Any], tokens: int) -> None:
    """An answer that ends early and counts right."""
    for key in PER_TOKEN:
        del answer[key][tokens:]
    answer["completion_tokens"] = tokens
