"""A driver for tests on machines with no GPU; see ``tests/nvml_mock``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import nvml_mock
from nvml_mock import Device, Scenario


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scenario]:
    """Two idle GPUs, ``GPU-a`` and ``GPU-b``, behind the real binding; leases of its own."""
    if reason := nvml_mock.why_not():
        pytest.skip(reason)
    monkeypatch.setenv("SGLANG_HARNESS_GPU_LEASES", str(tmp_path / "leases"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    scenario = Scenario(tmp_path / "scenario", [Device("GPU-a"), Device("GPU-b")])
    with nvml_mock.installed(scenario):
        yield scenario
