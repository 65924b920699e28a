"""Evidence of checks that start servers of their own, and the lies that they have to refuse.

``test_judges.py`` judges both. Recorded in two runs with SGLang 0.5.23 on a
CPU, floats rounded to seven places; the two replicas of ``parallel/data-2`` stood in the order in
which they had answered, and stand here as the client sorts them since.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_harness.suite.checks.lora import AGAIN

Evidence = dict[str, Any]
Lie = tuple[str, str, Callable[[Evidence], object], str]

#: One JSON object a line: the id of a check and what it saw.
RECORDED: dict[str, Evidence] = {
    record["id"]: record["evidence"]
    for record in map(
        json.loads,
        (Path(__file__).parent.parent / "data" / "recorded-own-servers-0.5.23.jsonl")
        .read_text(encoding="utf-8")
        .splitlines(),
    )
}

ARCHITECTURES = [check for check in RECORDED if check.startswith("architectures/")]
PARALLEL = [check for check in RECORDED if check.startswith("parallel/")]
LORA = [check for check in RECORDED if check.startswith("lora/")]


def improbable(answer: Evidence) -> None:
    """Tokens that the oracle finds improbable and the server scores as it would."""
    answer["output_ids"] = [i + 1 for i in answer["output_ids"]]
    answer["oracle"] = [best - 4.0 for best in answer["best"]]
    answer["served_ids"] = list(answer["output_ids"])
    answer["served"] = list(answer["oracle"])


def misscored(answer: Evidence, by: float = 0.01) -> None:
    """The right tokens with other log-probabilities, as a wrong scale would give."""
    answer["served"] = [each + by for each in answer["served"]]


def never_came_up(evidence: Evidence) -> None:
    for key, value in evidence.items():
        if isinstance(value, list):
            evidence[key] = []
        elif isinstance(value, dict) and key != "asked":
            evidence[key] = {}
    evidence["never_came_up"] = "The server ended (exit code 137): ValueError: no such thing"


def both_whole(evidence: Evidence) -> None:
    """Each 'rank' computes everything: right answers, and nothing is parallel."""
    for rank in evidence["ranks"]:
        rank["checksums"] = dict(evidence["ranks"][0]["checksums"])


def router_apart(evidence: Evidence) -> None:
    evidence["ranks"][1]["checksums"]["model.layers.1.mlp.gate.weight"] = "0" * 16


def only_norms(evidence: Evidence) -> None:
    for rank in evidence["ranks"]:
        rank["checksums"] = {n: c for n, c in rank["checksums"].items() if "norm" in n}


def whole_model_on_each_stage(evidence: Evidence) -> None:
    held = evidence["ranks"][0]["checksums"]
    for name in list(held):
        held[name.replace("layers.0.", "layers.1.")] = held[name]


def same_layer_twice(evidence: Evidence) -> None:
    again = copy.deepcopy(evidence["ranks"][0])
    again["place"]["pp_rank"] = 1
    evidence["ranks"].append(again)


def no_layer(evidence: Evidence) -> None:
    held = evidence["ranks"][0]["checksums"]
    evidence["ranks"][0]["checksums"] = {n: c for n, c in held.items() if "layers" not in n}


def one_replica_answers(evidence: Evidence) -> None:
    for routed in evidence["routed"]:
        routed["stated"] = 0


def one_cache(evidence: Evidence) -> None:
    evidence["routed"][2]["answer"]["cached_tokens"] = 41


def cold_again(evidence: Evidence) -> None:
    evidence["routed"][3]["answer"]["cached_tokens"] = 0


def other_weights(evidence: Evidence) -> None:
    evidence["ranks"][1]["checksums"]["model.norm.weight"] = "0" * 16


def second_replica_wrong(evidence: Evidence) -> None:
    for routed in evidence["routed"][2:]:
        improbable(routed["answer"])


def step(evidence: Evidence, what: str) -> Evidence:
    found: Evidence = next(each for each in evidence["steps"] if each["what"] == what)
    return found


def at_step(what: str, alter: Callable[[Evidence], object]) -> Callable[[Evidence], None]:
    """Alters every answer of one step."""

    def change(evidence: Evidence) -> None:
        for answer in step(evidence, what)["answers"]:
            alter(answer)

    return change


def indistinct(what: str) -> Callable[[Evidence], None]:
    """An adapter that changes nothing agrees with its oracle and with the base's."""
    return lambda evidence: step(evidence, what).update(off_others=1e-6)


def refused_from(number: int) -> Callable[[Evidence], None]:
    """The server refuses a load or an unload; what would have come next was not asked."""

    def change(evidence: Evidence) -> None:
        evidence["said"] = evidence["said"][: number + 1]
        evidence["said"][number].update(
            status=400, success=False, message="LoRA is not enabled", loaded=[]
        )
        evidence["steps"] = evidence["steps"][:1]

    return change


def refused_in_words(evidence: Evidence) -> None:
    evidence["said"][0].update(success=False, message="rank 8 is too large")


def not_listed(evidence: Evidence) -> None:
    evidence["said"][0]["loaded"] = ["another"]


def still_listed(evidence: Evidence) -> None:
    last = next(said for said in evidence["said"] if not said["there"])
    last["loaded"] = [last["name"]]


def breaks_when_asked_for_what_was_unloaded(evidence: Evidence) -> None:
    evidence["steps"] = [each for each in evidence["steps"] if each["what"] != AGAIN]
    evidence.update(unloaded_status=500, unloaded_reason="KeyError")


def refuses_what_was_unloaded(evidence: Evidence) -> None:
    breaks_when_asked_for_what_was_unloaded(evidence)
    evidence.update(unloaded_status=400, unloaded_reason="there is no such adapter")


def comes_back(evidence: Evidence) -> None:
    again = copy.deepcopy(step(evidence, "policy, second push"))
    evidence["steps"].append({**again, "what": AGAIN})
    evidence.update(unloaded_status=200, unloaded_reason="")


def _of_served() -> list[Lie]:
    lies: list[Lie] = []
    for check in [*ARCHITECTURES, *PARALLEL]:
        lies += [
            (check, "it dies at its start", never_came_up, "expected to come up, got The"),
            (
                check,
                "other tokens",
                lambda e: [improbable(answer) for answer in e["alone"]],
                "alone, token 0: expected token",
            ),
            (
                check,
                "right alone, other tokens in a batch",
                lambda e: improbable(e["together"][-1]),
                "in a batch, token 0: expected token",
            ),
            (
                check,
                "right tokens with other log-probabilities",
                lambda e: misscored(e["alone"][1]),
                "off by 0.0100",
            ),
            (
                check,
                "another model",
                lambda e: e.update(stated_architectures=["TransformersForCausalLM"]),
                "got ['TransformersForCausalLM']",
            ),
        ]
    return lies


def _of_parallel() -> list[Lie]:
    tensor, pipeline, data = "parallel/tensor-2", "parallel/pipeline-2", "parallel/data-2"
    lies: list[Lie] = [
        (
            check,
            "it states that it is not parallel",
            lambda e: e.update(stated=dict.fromkeys(e["asked"], 1)),
            "-size: expected 2, got 1",
        )
        for check in PARALLEL
    ]
    return [
        *lies,
        (tensor, "each rank holds everything", both_whole, "another part on each rank, got equal"),
        (tensor, "the ranks choose experts differently", router_apart, "unequal: model.layers.1"),
        (tensor, "one rank", lambda e: e["ranks"].pop(), "expected [0, 1], got [0]"),
        (
            tensor,
            "a matrix is missing on a rank",
            lambda e: e["ranks"][1]["checksums"].pop("lm_head.weight"),
            "names on rank 1",
        ),
        (tensor, "nothing but norms is told", only_norms, "matrices: expected some, got none"),
        (
            tensor,
            "the ranks stand in each other's place",
            lambda e: e["ranks"].reverse(),
            "expected [0, 1], got [1, 0]",
        ),
        (
            pipeline,
            "a stage holds all layers",
            whole_model_on_each_stage,
            "layers of stage 0: expected some of 2, got [0, 1]",
        ),
        (pipeline, "two stages hold the same layer", same_layer_twice, "got [0] too"),
        (pipeline, "a stage without a layer", no_layer, "expected some of 2, got []"),
        (
            pipeline,
            "the ranks know of one stage",
            lambda e: e["ranks"][0]["place"].update(pp_size=1),
            "pp_size of the ranks: expected {2}, got {1}",
        ),
        (data, "one replica answers everything", one_replica_answers, "replica 1, dp_rank: exp"),
        (data, "the replicas share a cache", one_cache, "expected none of its own, got 41"),
        (data, "a replica forgets at once", cold_again, "cached tokens: expected some, got none"),
        (data, "the replicas hold different weights", other_weights, "['model.norm.weight']"),
        (data, "the second replica answers other tokens", second_replica_wrong, "routed, token 0"),
        (data, "one scheduler", lambda e: e.update(states=1), "/server_info: expected 2, got 1"),
        (
            data,
            "a replica that is not there answers",
            lambda e: e.update(unknown_status=200),
            "a replica that is not there: expected a refusal (4xx), got 200",
        ),
        (
            data,
            "one replica does all the work",
            lambda e: e.update(by_itself=[0, 0, 0, 0]),
            "replicas at work by themselves: expected 0 and 1, got [0]",
        ),
    ]


def _of_lora() -> list[Lie]:
    lies: list[Lie] = []
    for check in LORA:
        first = RECORDED[check]["steps"][0 if "tensors" in check else 1]["what"]
        lies += [
            (check, "it dies at its start", never_came_up, "expected to come up, got The"),
            (check, "loading is refused", refused_from(0), "expected 200, got 400 LoRA is not"),
            (check, "success that is none", refused_in_words, "got 200 rank 8 is too large"),
            (check, "loaded, and not listed", not_listed, "loaded adapters: expected with"),
            (
                check,
                "unloaded, and still listed",
                still_listed,
                "loaded adapters: expected without",
            ),
            (
                check,
                "the adapter is not applied",
                at_step(first, improbable),
                "token 0: expected token",
            ),
            (
                check,
                "the adapter is applied at another strength",
                at_step(first, misscored),
                "off by 0.0100",
            ),
            (
                check,
                "an adapter that nobody could tell from the base",
                indistinct(first),
                "so that they can be told apart",
            ),
            (
                check,
                "scored with nothing",
                lambda e, f=first: step(e, f).update(off_others=math.nan),
                "so that they can be told apart",
            ),
            (
                check,
                "the base answers otherwise afterwards",
                at_step("base, after", improbable),
                "base, after, token 0",
            ),
            (
                check,
                "an adapter that was unloaded breaks the server",
                breaks_when_asked_for_what_was_unloaded,
                "expected a refusal (4xx), got 500 KeyError",
            ),
        ]
    disk, tensors = "lora/adapter-from-disk", "lora/adapter-from-tensors"
    return [
        *lies,
        (
            disk,
            "the base changes beside an adapter",
            at_step("base, beside one", improbable),
            "base, beside one, token 0",
        ),
        (
            disk,
            "in a batch both get the first one's answer",
            at_step("both in one batch, two", improbable),
            "both in one batch, two, token 0",
        ),
        (
            disk,
            "unloading one takes the other away",
            at_step("two, after unloading one", improbable),
            "two, after unloading one, token 0",
        ),
        (disk, "the second one is refused", refused_from(1), "loading two from disk: expected 200"),
        (
            disk,
            "one that was unloaded is answered by the base",
            at_step(AGAIN, improbable),
            "asked for after unloading, token 0",
        ),
        (
            tensors,
            "one that was unloaded is still served",
            comes_back,
            "an adapter that was unloaded: expected a refusal (4xx), got 200",
        ),
        (
            tensors,
            "the first push is still served after the second",
            at_step("policy, second push", improbable),
            "policy, second push, token 0",
        ),
        (tensors, "it cannot be unloaded", refused_from(1), "unloading policy: expected 200"),
    ]


LIES: list[Lie] = [*_of_served(), *_of_parallel(), *_of_lora()]

#: What a right server may also do.
HARMLESS: list[tuple[str, str, Callable[[Evidence], object]]] = [
    (
        "parallel/tensor-2",
        "an older server that tells no checksums",
        lambda e: e.update(ranks=[], ranks_unseen="this SGLang has no POST /weights_checker"),
    ),
    (
        "parallel/data-2",
        "an older server that does not say who answered",
        lambda e: (
            e.update(by_itself=[None] * 4),
            [routed.update(stated=None) for routed in e["routed"]],
        ),
    ),
    (
        "parallel/data-2",
        "another policy leaves the work to the idle one",
        lambda e: e.update(balance="total_tokens", by_itself=[0, 0, 0, 0]),
    ),
    (
        "architectures/qwen3",
        "an older server that does not name its architecture",
        lambda e: e.update(stated_architectures=[]),
    ),
    (
        "lora/adapter-from-disk",
        "a server that does not load again what was unloaded",
        refuses_what_was_unloaded,
    ),
    (
        "lora/adapter-from-disk",
        "a server that lists no adapters",
        lambda e: [said.update(loaded=[]) for said in e["said"]],
    ),
]
