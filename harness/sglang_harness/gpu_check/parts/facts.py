"""What this machine is, as far as it can be asked."""

from __future__ import annotations

from typing import Any

from sglang_harness._base import host
from sglang_harness.gpu_check.part import Context, Part


def run(context: Context) -> dict[str, Any]:
    del context
    return host.describe()


PART = Part("facts", "What is this machine?", 60.0, run)
