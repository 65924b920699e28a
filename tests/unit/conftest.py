"""What several files of tests use: a GPU driver without a GPU (see ``tests/nvml_mock``), and the
model before and after a push."""

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


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model that a server has at first."""
    return _tiny(tmp_path_factory.mktemp("models") / "old", 0)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights for it."""
    return _tiny(tmp_path_factory.mktemp("models") / "new", 7)


def _tiny(folder: Path, seed: int) -> Path:
    # Only tests that push need torch.
    from sglang_harness.checkpoint.made import tiny

    tiny.write(folder, seed)
    return folder
