"""What the doctor says of memory, disk and models of 0.5B, 8B and 70B."""

from __future__ import annotations

import pytest

from sglang_harness._base import headroom
from sglang_harness.upkeep import doctor


def found(
    monkeypatch: pytest.MonkeyPatch, memory: float, disk: float, *, tmpfs: bool = False
) -> dict[str, doctor.Finding]:
    """By subject, on a machine with so many GB."""
    left = headroom.Memory(int(memory * 1e9), "a memory limit of 9.0 GB (control group)")
    monkeypatch.setattr(headroom, "memory", lambda: left)
    monkeypatch.setattr(
        headroom, "disk", lambda folder: headroom.DiskRoom(folder, int(disk * 1e9), tmpfs)
    )
    return {each.subject: each for each in doctor._room()}


def test_each_model_is_held_read_layer_by_layer_or_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    told = found(monkeypatch, 8, 100)
    assert told["memory"].found == (
        "8.0 GB available; the bound is a memory limit of 9.0 GB (control group)"
    )
    assert (told["0.5B model"].state, told["8B model"].state) == ("ok", "ok")
    assert told["0.5B model"].found.startswith("fits, its reference model held:")
    assert told["8B model"].found == (
        "fits, its reference model read layer by layer: the second checkpoint takes 16.1 GB of "
        "disk and the checks at least 6.3 GB of memory; holding the reference model takes 32.4 GB"
    )
    assert told["70B model"].state == "note"
    assert told["70B model"].found.startswith("not enough memory and disk:")
    assert "TMPDIR" in told["70B model"].advice


def test_a_folder_in_memory_is_told_and_counts_as_memory(monkeypatch: pytest.MonkeyPatch):
    told = found(monkeypatch, 8, 100, tmpfs=True)
    assert told["temporary files"].state == "note"
    assert "a tmpfs" in told["temporary files"].found
    assert told["8B model"].found.startswith("not enough memory:")
    assert "TMPDIR" in told["temporary files"].advice


def test_a_large_machine_takes_all_of_them(monkeypatch: pytest.MonkeyPatch):
    told = found(monkeypatch, 1000, 1000)
    assert {each.state for each in told.values()} == {"ok"}
    assert "its reference model held" in told["70B model"].found
