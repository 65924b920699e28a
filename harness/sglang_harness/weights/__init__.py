"""New weights for a running server: the routes that they take, and the evidence that they
arrived."""

from __future__ import annotations

from sglang_harness.weights.adapters import AdapterPusher
from sglang_harness.weights.pusher import WeightPusher
from sglang_harness.weights.report import (
    AdapterFailed,
    AdapterReport,
    NotPrepared,
    PushFailed,
    PushReport,
)

__all__ = [
    "AdapterFailed",
    "AdapterPusher",
    "AdapterReport",
    "NotPrepared",
    "PushFailed",
    "PushReport",
    "WeightPusher",
]
