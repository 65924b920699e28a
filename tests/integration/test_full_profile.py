"""Servers of other architectures, of several processes and with adapters, as a person asks.

One run for all of it: every check starts a server of its own, some 40 s each on two idle cores.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from commands import COMMAND, names_on_engine

from sglang_harness.judging import judge_saved
from sglang_harness.suite import registered
from sglang_harness.verdict import Outcome, Verdict

pytestmark = pytest.mark.engine

SUBJECTS = ("architectures/", "parallel/", "lora/")
ASKED = {check for check in registered() if check.startswith(SUBJECTS)}

#: Seconds: eleven starts on a busy machine.
LIMIT = 1800


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    selected = [word for subject in SUBJECTS for word in ("-k", subject)]
    done = subprocess.run(
        [*COMMAND, "qualify", "--model", "tiny", "--profile", "full", *selected],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return folder / "out"


@pytest.fixture(scope="module")
def verdict(out: Path) -> Verdict:
    return Verdict.read(out / "verdict.json")


def test_every_one_of_them_is_asked_and_passes_with_evidence(verdict: Verdict) -> None:
    assert verdict.verdict == "pass"
    assert verdict.outside_profile == []
    assert {check.id for check in verdict.checks} == ASKED
    assert len(ASKED) == 10
    assert all(check.outcome is Outcome.PASS and check.evidence for check in verdict.checks)


def test_float32_is_right_to_a_hundred_thousandth(verdict: Verdict) -> None:
    errors = {
        figure.name.split(":")[0]: figure.value
        for figure in verdict.figures
        if figure.name.endswith("largest log-probability error")
    }
    assert errors.keys() == ASKED
    # In nats. Some tokens were scored, or it would be 0.
    assert all(0 < error < 5e-5 for error in errors.values()), errors


def test_several_processes_were_really_several(verdict: Verdict) -> None:
    evidence = {check.id: check.evidence or {} for check in verdict.checks}
    assert len(evidence["parallel/tensor-2"]["ranks"]) == 2
    assert {r["stated"] for r in evidence["parallel/data-2"]["routed"]} == {0, 1}
    assert set(evidence["parallel/data-2"]["by_itself"]) == {0, 1}
    assert evidence["parallel/pipeline-2"]["ranks"][0]["place"]["pp_size"] == 2


def test_the_log_of_each_server_is_kept_under_its_name(out: Path) -> None:
    log = (out / "server.log").read_text()
    titles = [line for line in log.splitlines() if line.startswith("--- a server of its own")]
    assert len(titles) == len(ASKED)
    for wanted in ("tiny-qwen2", "tiny-mixtral", "--tp-size=2", "--pp-size=2", "--enable-lora"):
        assert any(wanted in title for title in titles), wanted
    assert "Scheduler hit an exception" not in log


def test_nothing_of_the_run_is_left(verdict: Verdict) -> None:
    assert names_on_engine(verdict.run_id) == []


def test_the_saved_run_is_judged_alike_without_a_server(verdict: Verdict) -> None:
    again, changed = judge_saved(verdict)
    assert changed == []
    assert again.verdict == "pass"
