"""The suite as parts of gpu-check: what its verdicts mean for a part, and that reports are kept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_check_contexts import context, figures, headline
from scripted_runtime import ScriptedRuntime
from test_reports import result, verdict_of

from sglang_harness import suite
from sglang_harness.gpu_check import served
from sglang_harness.gpu_check.budget import within_share
from sglang_harness.gpu_check.part import NotHere
from sglang_harness.gpu_check.parts import qualify as part
from sglang_harness.gpu_check.parts.qualify import Told, cut_short, groups
from sglang_harness.run.qualification import TIME_IS_OVER
from sglang_harness.verdict import Outcome, Outside, Verdict

OVER = TIME_IS_OVER.format(120.0)


def told(*verdicts: Verdict) -> Told:
    found = Told()
    for verdict in verdicts:
        found.add(verdict)
    return found


PASSED = result(Outcome.PASS, "launch/phases")
KNOWN = result(Outcome.KNOWN, "chat/json-schema", message="it died", known_defect="sglang-1")
FAILED = result(Outcome.FAIL, "weights/disk", message="expected b, got a")


def test_a_part_holds_where_the_verdict_is_pass():
    found = told(verdict_of(PASSED, KNOWN))
    found.judge()
    assert found.in_one_line() == "1 pass, 1 known, 0 outside the profile"


def test_a_failed_check_fails_it_with_its_reason():
    with pytest.raises(AssertionError, match="1 checks: weights/disk fail: expected b, got a"):
        told(verdict_of(PASSED, FAILED)).judge()


def test_what_another_check_is_the_reason_of_is_counted_there():
    after = result(Outcome.NOT_RUN, "a/b", message="the server died", because="weights/disk")
    assert len(told(verdict_of(FAILED, after)).wrong) == 1


def test_what_the_harness_could_not_provide_fails_it():
    lacking = result(Outcome.NOT_RUN, "a/b", message="peft is not installed")
    assert told(verdict_of(PASSED, lacking)).wrong == ["a/b not-run: peft is not installed"]


def test_many_reasons_are_cut_and_counted():
    bad = [result(Outcome.FAIL, f"a/{n}", message="no") for n in range(part.SHOWN + 3)]
    with pytest.raises(AssertionError, match=r"^8 checks: a/0 fail: no; .*; and 3 more"):
        told(verdict_of(*bad)).judge()


def test_a_defect_that_did_not_show_is_a_notice():
    told(verdict_of(PASSED, result(Outcome.FIXED, "a/b"))).judge()


def test_time_that_was_over_is_no_failure_and_every_check_that_was_not_asked_is_named():
    unasked = [result(Outcome.NOT_RUN, name, message=OVER) for name in ("lora/a", "lora/b")]
    with pytest.raises(NotHere, match=r"before 2 checks.*lora/a, lora/b"):
        told(verdict_of(PASSED, *unasked)).judge()


def test_a_check_that_the_end_of_the_time_cut_short_has_not_failed():
    cut = result(Outcome.ERROR, "a/slow", message="no answer in time")
    later = result(Outcome.NOT_RUN, "a/later", message=OVER)
    assert cut_short([PASSED, cut, later]) == {"a/slow", "a/later"}
    assert told(verdict_of(PASSED, cut, later)).wrong == []
    # A server that is wrong stays wrong, and an error in the middle of a run is one.
    assert cut_short([PASSED, FAILED, later]) == {"a/later"}
    assert cut_short([cut, PASSED, later]) == {"a/later"}
    assert told(verdict_of(PASSED, cut)).wrong


def test_a_selection_that_this_target_cannot_be_asked_is_outside_and_not_wrong():
    outside = [Outside(id="parallel/tensor-2", reason="needs 2 GPUs")]
    found = told(verdict_of(outside_profile=outside))
    assert (found.wrong, found.outside) == ([], {"needs 2 GPUs": ["parallel/tensor-2"]})
    assert told(verdict_of()).wrong


def test_every_check_that_is_no_pass_has_a_row_with_its_reason():
    rows = part.rows([PASSED, KNOWN, FAILED])
    assert [(row["id"], row["outcome"], row["known_defect"]) for row in rows] == [
        ("chat/json-schema", "known", "sglang-1"),
        ("weights/disk", "fail", None),
    ]


# --- what profile full adds -----------------------------------------------------------------------


def test_every_check_that_full_adds_is_in_one_group_and_what_needs_two_gpus_is_the_last():
    checks = suite.select("full", [])
    found = groups(checks)
    added = [check.id for check in checks if check.profile == "full"]
    assert sorted(id for ids in found.values() for id in ids) == sorted(added)
    assert list(found) == list(part.SUBJECTS)
    assert "weights/on-experts" in found["architectures"]
    two = {c.id for c in checks if any("2 GPUs" in need.name for need in c.needs)}
    assert set(found["parallel"]) == two


def test_without_time_every_check_of_full_is_named(tmp_path: Path):
    given, _ = context(tmp_path, runtime=ScriptedRuntime(), seconds=part.KEPT)
    with pytest.raises(NotHere) as error:
        part.full(given)
    for ids in groups(suite.select("full", [])).values():
        assert all(id in str(error.value) for id in ids)


def test_on_one_gpu_nothing_is_started_for_checks_that_need_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def qualify(_: Any, name: str, *words: Any, **more: Any) -> Verdict:
        asked.append(name)
        return verdict_of(PASSED)

    monkeypatch.setattr(part, "qualify", qualify)
    given, _ = context(tmp_path, seconds=600, device="gpu", gpus=["GPU-1"])
    figures_of = part.full(given)
    assert asked == [f"qualify-full-{s}" for s in part.SUBJECTS if s != "parallel"]
    assert "parallel/tensor-2" in figures_of["outside"]["needs 2 GPUs"]


# --- time -----------------------------------------------------------------------------------------


def test_a_part_leaves_time_for_those_after_it_where_there_is_little_for_all(tmp_path: Path):
    given, _ = context(tmp_path, seconds=300.0, ends_at=time.time() + 100)
    assert within_share(given, 0.4, least=10) == pytest.approx(40, abs=2)
    # No less than it needs, and no more than its own limit.
    assert within_share(given, 0.4, least=70) == pytest.approx(70, abs=2)
    given, _ = context(tmp_path, seconds=300.0, ends_at=time.time() + 3600)
    assert within_share(given, 0.4, least=10) == pytest.approx(300, abs=2)


# --- a run of the suite ---------------------------------------------------------------------------


def test_a_run_of_the_suite_keeps_its_reports_beside_the_results(tmp_path: Path):
    runtime = ScriptedRuntime()
    given, _ = context(tmp_path, runtime=runtime, seconds=120)
    spec = part._spec(given, 60.0, model="tiny")
    verdict = part.qualify(given, "qualify-some", spec, patterns=["control/pause"])
    assert [check.id for check in verdict.checks] == ["control/pause"]
    written = json.loads((tmp_path / "qualify-some-0.5.23" / "verdict.json").read_text())
    assert written["verdict"] == verdict.verdict
    assert (tmp_path / "qualify-some-0.5.23" / "server.log").exists()
    assert [running.ends for running in runtime.running] == [1]


def test_quick_puts_its_figures_down_also_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(part, "qualify", lambda *_, **__: verdict_of(PASSED, FAILED))
    given, reports = context(tmp_path)
    with pytest.raises(AssertionError, match="weights/disk"):
        part.tiny(given)
    assert figures(reports)["not_passed"][0]["id"] == "weights/disk"
    assert figures(reports)["counts"] == {"pass": 1, "fail": 1}
    assert headline(reports).startswith("fail: 1 pass, 1 fail")


def test_servers_of_the_suite_leave_room_for_one_another_on_a_gpu(tmp_path: Path):
    given, _ = context(tmp_path, device="gpu", gpus=["GPU-1"])
    assert part._spec(given, 60.0).server_args["mem-fraction-static"] == served.MEMORY
    given, _ = context(
        tmp_path, device="gpu", gpus=["GPU-1"], server_args={"mem-fraction-static": 0.7}
    )
    assert part._spec(given, 60.0).server_args["mem-fraction-static"] == 0.7
    assert served.memory_share(given) == {}
    given, _ = context(tmp_path)
    assert "mem-fraction-static" not in part._spec(given, 60.0).server_args
