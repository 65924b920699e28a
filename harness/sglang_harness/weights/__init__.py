"""New weights for a running server: the routes that they take, and the witnesses that they
arrived."""

from __future__ import annotations

from sglang_harness.weights.adapters import AdapterFailed, AdapterPusher, AdapterReport
from sglang_harness.weights.pusher import WeightPusher
from sglang_harness.weights.report import PushFailed, PushReport

__all__ = [
    "AdapterFailed",
    "AdapterPusher",
    "AdapterReport",
    "PushFailed",
    "PushReport",
    "WeightPusher",
]
