"""Lies of servers that the checks ``weights/...`` have to refuse, and oddities that are right."""

from __future__ import annotations

import copy
import math
from typing import Any

from alterations import (
    Alteration,
    at,
    off_by,
    other_tokens,
    put,
)
from evidence import ROUTES


def stale(evidence: dict[str, Any]) -> None:
    """After the update that flushes, what the server says is still the old weights' word."""
    evidence["flushed"] = copy.deepcopy(evidence["unflushed"])


def control_unseen(evidence: dict[str, Any]) -> None:
    """The stale answer agrees with the new weights: then staleness could not be seen at all."""
    unflushed = evidence["unflushed"]
    unflushed["oracle"] = list(unflushed["served"])


def nothing_changed(evidence: dict[str, Any]) -> None:
    """The server says success, and serves the old weights under the new label."""
    evidence["unchanged"] = list(evidence["parameters"])
    evidence["old_oracle_error"] = 3e-6
    for answer in evidence["answers"]:
        other_tokens(answer)


def half_changed(evidence: dict[str, Any]) -> None:
    evidence["unchanged"] = [p for p in evidence["parameters"] if "layers.1" in p]


def not_a_number(evidence: dict[str, Any]) -> None:
    for answer in evidence["answers"]:
        answer["served"] = [math.nan] * len(answer["served"])


LIES = [
    Alteration(
        "weights/disk",
        "success, and nothing changed",
        nothing_changed,
        "checksums: expected all of 15 parameters changed, got unchanged: lm_head.weight",
    ),
    Alteration(
        "weights/disk",
        "success, and half of the tensors changed",
        half_changed,
        "got unchanged: model.layers.1.input_layernorm.weight",
    ),
    Alteration(
        "weights/disk",
        "the checksums changed, the old weights are served",
        put({"old_oracle_error": 2e-5}),
        "distance to the old reference model: expected more than 0.001",
    ),
    Alteration(
        "weights/disk",
        "a tensor loaded in a wrong layout",
        at("answers", 1, do=other_tokens),
        "new weights, 'Once upon a time, in a small village by the sea, there lived', token 0",
    ),
    Alteration(
        "weights/disk",
        "a log-probability off by a hundredth",
        off_by(0.01, "answers", 0, "served", 11),
        "new weights, 'The capital of France is', token 11 (",
    ),
    Alteration("weights/disk", "NaN was loaded", not_a_number, "got nan (off by nan"),
    Alteration(
        "weights/disk",
        "the update failed",
        put({"success": False}),
        "update: expected success, got ",
    ),
    Alteration(
        "weights/disk",
        "/model_info keeps the old label",
        put({"info_version": "default"}),
        "weight version in /model_info: expected 'harness-new', got 'default'",
    ),
    Alteration(
        "weights/disk",
        "answers carry the old label",
        put({"answer_version": "default"}),
        "weight version in answers: expected 'harness-new', got 'default'",
    ),
    Alteration(
        "weights/disk-restore",
        "one checksum is another after going back",
        put({"differing_checksums": ["model.norm.weight"]}),
        "checksums after going back: expected [], got ['model.norm.weight']",
    ),
    Alteration(
        "weights/disk-restore",
        "the update between changed nothing",
        put({"changed_by_update": 0}),
        "checksums after the update: expected changed ones, got none",
    ),
    Alteration(
        "weights/disk-restore",
        "a log-probability off by a hundredth after going back",
        off_by(0.01, "after", 1, "logprobs", 3),
        "answer 1, token 3 (167): expected log-probability",
    ),
    Alteration(
        "weights/disk-restore",
        "another answer than before",
        put({"after.0.ids.7": 5, "after.0.logprobs.7": -0.5}),
        "answer 0, token 7: expected token 253, got token 5",
    ),
    Alteration(
        "weights/disk-restore",
        "the label of the new weights stays",
        put({"info_after.weight_version": "harness-new"}),
        "weight_version: expected 'default', got 'harness-new'",
    ),
    Alteration(
        "weights/disk-restore",
        "the served name is the variant's",
        put({"info_after.served_model_name": "/exchange/variant"}),
        "served_model_name: expected '/models/tiny-2-seed0', got '/exchange/variant'",
    ),
    Alteration(
        "weights/stale-prefix",
        "the old prefix is served after the update",
        stale,
        "cached tokens after the update: expected 0, got 87",
    ),
    Alteration(
        "weights/stale-prefix",
        "the old prefix is served, and not counted as cached",
        at(do=lambda e: (stale(e), e["flushed"].update(cached_tokens=0))),
        "after the update, token 0: expected token 359",
    ),
    Alteration(
        "weights/stale-prefix",
        "only the log-probabilities are stale",
        off_by(0.01, "flushed", "served", 0),
        "after the update, token 0 (359): expected log-probability",
    ),
    Alteration(
        "weights/stale-prefix",
        "nothing was ever cached",
        put({"warmed_cached_tokens": 0}),
        "the same prompt again: expected cached tokens, got none",
    ),
    Alteration(
        "weights/stale-prefix",
        "a control that gives nothing away",
        control_unseen,
        "the control, answered from a stale prefix",
    ),
    Alteration(
        "weights/disk-missing-path",
        "a missing path is answered 200",
        put({"status": 200, "reason": "success False: no such folder"}),
        "answer: expected a refusal (4xx), got 200 success False: no such folder",
    ),
    Alteration(
        "weights/disk-missing-path",
        "a missing path is called the server's own fault",
        put({"status": 500, "reason": "Internal Server Error"}),
        "answer: expected a refusal (4xx), got 500 Internal Server Error",
    ),
    Alteration(
        "weights/disk-missing-path",
        "refused, and half loaded",
        put({"differing_checksums": ["lm_head.weight"]}),
        "checksums: expected [], got ['lm_head.weight']",
    ),
    Alteration(
        "weights/disk-missing-path",
        "refused, and the missing path is the model's from now on",
        put({"model_path_after": "/exchange/there-is-no-such-folder"}),
        "model_path: expected '/models/tiny-2-seed0', got '/exchange/there-is-no-such-folder'",
    ),
    Alteration(
        "weights/disk-missing-path",
        "refused, and answers differ",
        put({"after.ids.2": 1, "after.logprobs.2": -0.5}),
        "answer afterwards, token 2: expected token 166, got token 1",
    ),
    Alteration(
        "weights/disk-missing-path",
        "refused, and a log-probability is off by a hundredth",
        off_by(0.01, "after", "logprobs", 7),
        "answer afterwards, token 7 (253): expected log-probability",
    ),
]

HARMLESS = [
    Alteration(
        "weights/disk",
        "a computed buffer stays as it is",
        at(
            do=lambda e: [
                e[k].append("model.layers.0.self_attn.rotary_emb.cos_sin_cache")
                for k in ("parameters", "unchanged")
            ]
        ),
    ),
    Alteration(
        "weights/disk",
        "bfloat16, which the noise on the weights moves by 0.68 nats",
        at(
            do=lambda e: [
                e.update(old_oracle_error=0.68),
                *[answer.update(tolerance=0.3) for answer in e["answers"]],
            ]
        ),
    ),
]

for route in ROUTES:
    LIES += [
        Alteration(
            route,
            "the way there failed",
            put({"there.outcome": "failed", "there.reason": "bucket 1: no memory", "back": None}),
            "push of the new weights: expected a proven one, got failed: bucket 1: no memory",
        ),
        Alteration(
            route,
            "one witness of two said nothing",
            put({"back.outcome": "unproven", "back.reason": "checksums: not known"}),
            "push of the first weights: expected a proven one, got unproven",
        ),
        Alteration(
            route,
            "nothing changed",
            put({"changed": 0}),
            "pushing new weights: expected changed",
        ),
        Alteration(
            route,
            "one parameter is not what disk makes of it",
            put({"unlike_disk": ["model.norm.weight"]}),
            "checksums unlike those from disk: expected [], got ['model.norm.weight']",
        ),
        Alteration(
            route,
            "one parameter does not come back",
            put({"unlike_before": ["lm_head.weight"]}),
            "checksums after pushing the first weights: expected [], got ['lm_head.weight']",
        ),
        Alteration(
            route,
            "another answer than before",
            off_by(0.01, "after", 1, "logprobs", 3),
            "answer 1, token 3",
        ),
    ]
