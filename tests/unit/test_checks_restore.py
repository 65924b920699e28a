"""Whatever ends a check, the server is restored: a deadline that is over ends the check and never
the calls that restore the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Answer

from sglang_harness import suite
from sglang_harness.errors import HarnessError
from sglang_harness.suite import run_check
from sglang_harness.verdict import CheckResult, Outcome

pytest.importorskip("torch")
pytest.importorskip("transformers")

from model_server import ModelServer

from sglang_harness.checkpoint.made import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    tiny.write(path, 0)
    return path


@pytest.fixture
def double(model: Path) -> Iterator[ModelServer]:
    with ModelServer(model) as double:
        yield double


def asked(check_id: str, double: ModelServer, scratch: Path) -> CheckResult:
    with double.server.client.within(1000):
        return run_check(suite.registered()[check_id], double.context(scratch))[0]


def time_is_over_at(double: ModelServer, step: str) -> None:
    """The check's time is over when the double comes to ``step`` for the first time."""
    client = double.server.client

    def over(right: Any) -> Any:
        if client._deadline is not None:
            client._deadline = time.monotonic()
        return right

    double.lies[step] = over


def test_what_was_paused_is_continued_when_the_time_is_over(
    double: ModelServer, tmp_path: Path
) -> None:
    double.step_seconds = 0.05
    time_is_over_at(double, "pauses")
    result = asked("control/pause", double, tmp_path)
    assert result.outcome not in (Outcome.PASS, Outcome.FAIL)
    assert double.asked("POST /continue_generation") == 1
    # The next check finds a server that answers.
    assert double.server.client.generate("x", sampling={"max_new_tokens": 1}).output_ids


@pytest.mark.parametrize(
    ("check_id", "step"),
    [
        ("weights/disk", "loaded"),
        ("weights/disk-restore", "loaded"),
        ("weights/stale-prefix", "loaded"),
        ("weights/disk-missing-path", "refusal"),
        ("memory/updates-do-not-grow", "loaded"),
        ("memory/colocated-order", "loaded"),
        ("memory/cycles", "loaded"),
    ],
)
def test_the_first_weights_are_loaded_again_when_the_time_is_over(
    check_id: str, step: str, double: ModelServer, tmp_path: Path
) -> None:
    time_is_over_at(double, step)
    result = asked(check_id, double, tmp_path)
    assert result.outcome not in (Outcome.PASS, Outcome.FAIL)
    last = double.http.asked("POST /update_weights_from_disk")[-1].json()
    assert last["model_path"] == str(double.first)
    assert last["weight_version"] == "default"
    assert (double.folder, double.version) == (double.first, "default")
    assert double.released == []


@pytest.mark.parametrize(
    "check_id", ["memory/release-without-saver", "memory/colocated-order", "memory/cycles"]
)
def test_released_memory_is_resumed_when_the_time_is_over(
    check_id: str, double: ModelServer, tmp_path: Path
) -> None:
    time_is_over_at(double, "freed")
    result = asked(check_id, double, tmp_path)
    assert result.outcome not in (Outcome.PASS, Outcome.FAIL)
    assert double.asked("POST /resume_memory_occupation") == 1
    assert double.released == []


def test_requests_that_an_error_left_behind_do_not_keep_the_first_weights_away(
    double: ModelServer, tmp_path: Path
) -> None:
    """A server refuses to flush while requests run, and a flush comes before the weights."""
    running: list[str] = []

    def loads(path: Path) -> Path:
        if not double.asked("POST /abort_request"):
            running.append("a request that the check has sent")
        return path

    def flushed(right: Answer) -> Answer:
        return Answer(400, {"message": "requests are running"}) if running else right

    def abort(rid: str) -> str:
        running.clear()
        return rid

    double.lies.update(loaded=loads, flushed=flushed, abort=abort)
    asked("weights/stale-prefix", double, tmp_path)
    assert double.asked("POST /abort_request") == 1
    assert double.folder == double.first


def test_an_error_within_a_check_is_told_and_not_that_of_restoring(
    double: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise HarnessError("read no memory")

    monkeypatch.setattr(double, "read", fails)
    result = asked("memory/release-without-saver", double, tmp_path)
    assert result.outcome is Outcome.ERROR
    assert "read no memory" in result.message
