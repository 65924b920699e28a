"""What right servers were seen to do, by check: recorded where there is a recording, written by
hand where the recorded server could not show it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lies_of_own_servers as own_servers
import push_evidence
import release_evidence

from sglang_harness.suite.checks.memory.readings import MIB
from sglang_harness.verdict import Outcome, Verdict

DATA = Path(__file__).parent.parent / "data"

RECORDED = Verdict.read(DATA / "recorded-full-tiny-0.5.23.json")
EVIDENCE = {c.id: c.evidence for c in RECORDED.checks if c.evidence is not None}
EVIDENCE |= own_servers.RECORDED
KNOWN = [c.id for c in RECORDED.checks if c.outcome is Outcome.KNOWN]

# What was not recorded as it has to be: the recorded server was started without
# deterministic inference and on a machine with no GPU, and it has the two defects of the
# registry.
BY_HAND: dict[str, dict[str, Any]] = {
    "sample/seed-repeats": {
        "first": [237, 12, 90, 301],
        "again": [237, 12, 90, 301],
        "in_company": [237, 12, 90, 301],
        "other_seeds": [[5, 6, 7, 8], [237, 12, 90, 301], [44, 3, 2, 1]],
    },
    "memory/device-given-back": {
        "before": {"GPU-1": 600 * MIB, "GPU-2": 0},
        "after": {"GPU-1": 610 * MIB, "GPU-2": 0},
        "waited_seconds": 0.4,
    },
    **release_evidence.evidence(EVIDENCE),
    **push_evidence.evidence(),
    "stop/abort-whole-id": EVIDENCE["stop/abort"],
    "hostile/out-of-vocabulary-ids": {
        **EVIDENCE["hostile/out-of-vocabulary-ids"],
        "status": 400,
        "reason": "token id 10000000 is out of the vocabulary",
        "death": "",
        "after": copy.deepcopy(EVIDENCE["hostile/out-of-vocabulary-ids"]["before"]),
    },
}

# Recorded on the same server by itself, after the whole run.
ROUTES = ("weights/tensor", "weights/tensor-bucket", "weights/shared-memory", "weights/distributed")
BY_HAND |= json.loads((DATA / "weights-routes-tiny-0.5.23.json").read_text("utf-8"))


def good(check_id: str) -> dict[str, Any]:
    """What a right server is seen to do; the caller's own copy."""
    return copy.deepcopy(BY_HAND.get(check_id) or EVIDENCE[check_id])
