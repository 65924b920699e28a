"""Which launch flags a server needs: the first that comes up and answers right is taken, and those
before it are told with their reasons."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_check_contexts import context, figures, headline
from scripted_runtime import GENERATED, ScriptedRunning, ScriptedRuntime
from scripted_server import Answer, Seen

from sglang_harness.checkpoint import locate
from sglang_harness.errors import DeviceNotIdle, EngineError, HarnessError, StartTimeout
from sglang_harness.gpu_check.outcomes import NotHere
from sglang_harness.gpu_check.parts import server_flags as part
from sglang_harness.gpu_check.parts.server_flags import LADDER, TOKENS, wrong_answer
from sglang_harness.oracle import Oracle, Scores


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def right(cache: None) -> list[int]:
    """What the tiny model answers."""
    folder = locate("tiny", lambda _: None)
    assert folder is not None
    oracle = Oracle(folder)
    ids = oracle.encode(part.PROMPT)
    for _ in range(TOKENS):
        probabilities = oracle.next_token_probabilities(ids)
        ids.append(probabilities.index(max(probabilities)))
    return ids[-TOKENS:]


def answering(ids: list[int]) -> Callable[[ScriptedRunning], None]:
    def prepared(running: ScriptedRunning) -> None:
        def generate(seen: Seen) -> Answer:
            count = int(seen.json()["sampling_params"]["max_new_tokens"])
            meta = {**GENERATED["meta_info"], "completion_tokens": min(count, len(ids))}
            return Answer(body={**GENERATED, "output_ids": ids[:count], "meta_info": meta})

        running.sglang.http.script["POST /generate"] = generate

    return prepared


def dying(running: ScriptedRunning) -> None:
    running.sglang.wrote = "\n".join(["line"] * 40 + ["no kernel image is available"])

    def start() -> None:
        raise EngineError("The server ended by itself.")

    running.start = start  # type: ignore[method-assign]


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a GPU, without one."""
    monkeypatch.setitem(LADDER, "cpu", LADDER["gpu"])


def given_args(runtime: ScriptedRuntime) -> list[dict[str, Any]]:
    return [dict(order.spec.server_args) for order in runtime.orders]


@pytest.mark.usefixtures("ladder")
def test_a_server_that_comes_up_with_everything_on_needs_one_start(
    tmp_path: Path, right: list[int]
):
    runtime = ScriptedRuntime(answering(right))
    given, reports = context(tmp_path, runtime=runtime)
    told = part.choose(given)
    assert told["server_args"] == {"enable-memory-saver": True}
    assert told["chosen"] == "everything on"
    assert told["server"] == {"version": "0.0.1", "dtype": "float32"}
    assert len(figures(reports)["tried"]) == len(runtime.running) == 1
    assert [running.ends for running in runtime.running] == [1]


@pytest.mark.usefixtures("ladder")
def test_what_failed_before_is_told_with_the_last_lines_of_its_log(
    tmp_path: Path, right: list[int]
):
    runtime = ScriptedRuntime(dying, dying, answering(right))
    given, reports = context(tmp_path, runtime=runtime)
    told = part.choose(given)
    assert told["chosen"] == "without CUDA graphs"
    assert told["server_args"] == dict(LADDER["gpu"][2].flags) == given_args(runtime)[2]
    tried = figures(reports)["tried"]
    assert [each["outcome"] for each in tried] == ["did not start", "did not start", "right"]
    assert tried[0]["why"] == "The server ended by itself."
    assert tried[0]["last_lines"][-1] == "no kernel image is available"
    assert len(tried[0]["last_lines"]) == part.LAST_LINES
    assert "2 starts before it failed" in headline(reports)
    assert "no kernel image" in (given.out / "server-0.log").read_text()


@pytest.mark.usefixtures("ladder")
def test_a_server_that_answers_wrong_is_not_taken(tmp_path: Path, right: list[int]):
    other = [right[0], (right[1] + 7) % 300, *right[2:]]
    runtime = ScriptedRuntime(answering(other), answering(right))
    given, reports = context(tmp_path, runtime=runtime)
    assert part.choose(given)["chosen"] == "without prefill graphs"
    first = figures(reports)["tried"][0]
    assert first["outcome"] == "wrong answer"
    assert f"token 1: expected {right[1]}" in first["why"]


@pytest.mark.usefixtures("ladder")
def test_none_that_comes_up_fails_with_the_reason_of_each(tmp_path: Path):
    given, reports = context(tmp_path, runtime=ScriptedRuntime(*[dying] * len(LADDER["gpu"])))
    with pytest.raises(AssertionError) as told:
        part.choose(given)
    for rung in LADDER["gpu"]:
        assert f"{rung.name}: The server ended by itself." in str(told.value)
    assert "server_args" not in figures(reports)


@pytest.mark.usefixtures("ladder")
@pytest.mark.usefixtures("ladder")
@pytest.mark.parametrize(
    "error", [StartTimeout("No generation within 20 s."), DeviceNotIdle("GPU-1 is not idle.")]
)
def test_what_other_flags_do_not_change_is_tried_once_and_no_failure(
    tmp_path: Path, error: HarnessError
):
    """Eight starts on a GPU that another had took the time of every part, and blamed SGLang."""

    def refusing(running: ScriptedRunning) -> None:
        def start() -> None:
            raise error

        running.start = start  # type: ignore[method-assign]

    runtime = ScriptedRuntime(refusing)
    given, reports = context(tmp_path, runtime=runtime, seconds=40.0)
    with pytest.raises(NotHere, match=error.message):
        part.choose(given)
    assert len(figures(reports)["tried"]) == 1


def test_a_flag_of_the_command_line_wins(tmp_path: Path, right: list[int]):
    runtime = ScriptedRuntime(answering(right))
    given, _ = context(tmp_path, runtime=runtime, server_args={"enable-memory-saver": False})
    assert part.choose(given)["server_args"] == {}
    assert given_args(runtime) == [{"enable-memory-saver": False}]


@pytest.mark.usefixtures("ladder")
def test_without_time_for_another_start_none_is_tried(tmp_path: Path):
    runtime = ScriptedRuntime()
    given, _ = context(tmp_path, runtime=runtime, seconds=part.LEAST / 2)
    with pytest.raises(AssertionError, match="no start was tried"):
        part.choose(given)
    assert runtime.running == []


def test_the_ladder_gives_up_more_with_every_rung_and_names_it():
    names = [rung.name for rung in LADDER["gpu"]]
    assert len(set(names)) == len(names)
    assert LADDER["gpu"][0].without == ()
    assert json.dumps([dict(rung.flags) for rung in LADDER["gpu"]])
    saver = ["enable-memory-saver" in rung.flags for rung in LADDER["gpu"]]
    assert saver == sorted(saver, reverse=True)
    assert [("memory saver" in rung.without) for rung in LADDER["gpu"]] == [not s for s in saver]


def test_a_near_tie_is_no_wrong_answer():
    scores = Scores((-1.0,) * TOKENS, (9, *[5] * (TOKENS - 1)), (-0.9,) * TOKENS)
    ids = [5] * TOKENS
    assert wrong_answer(ids, scores, 0.06) == ""
    assert "0.100 nats less probable" in wrong_answer(ids, scores, 0.04)
    assert wrong_answer(ids[:3], scores, 0.06) == f"expected {TOKENS} tokens, got 3"
