"""All checks that have servers of their own, in one run, as a person asks for them: other
architectures, several processes, adapters, and what kills a server.

A start takes some 40 s on two idle cores; a server that lives is handed on to the next check.
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

ASKED = {name for name, check in registered().items() if check.own_server}

#: Seconds: some twenty starts on a busy machine.
LIMIT = 2700


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    selected = [word for name in ASKED for word in ("-k", name)]
    done = subprocess.run(
        [*COMMAND, "qualify", "--model", "tiny", "--profile", "full", "--strict-known", *selected],
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
    assert len(ASKED) > 20
    assert all(check.evidence for check in verdict.checks)
    failed = {check.id for check in verdict.checks if check.outcome is not Outcome.PASS}
    # What 0.5.23 does wrong is in the registry, and nothing that serves is.
    assert {c.id for c in verdict.checks if c.outcome is Outcome.KNOWN} == failed
    assert {name.split("/")[0] for name in failed} <= {"hostile", "memory"}


def test_float32_is_right_to_a_hundred_thousandth(verdict: Verdict) -> None:
    errors = {
        figure.name.split(":")[0]: figure.value
        for figure in verdict.figures
        if figure.name.endswith("largest log-probability error")
    }
    assert errors.keys() == {
        a for a in ASKED if a.startswith(("architectures/", "parallel/", "lora/"))
    }
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
    assert 10 <= len(titles) < len(ASKED), "some died, some were handed on"
    for wanted in ("tiny-qwen2", "tiny-mixtral", "--tp-size=2", "--pp-size=2", "--enable-lora"):
        assert any(wanted in title for title in titles), wanted


def test_nothing_of_the_run_is_left(verdict: Verdict) -> None:
    assert names_on_engine(verdict.run_id) == []


def test_the_saved_run_is_judged_alike_without_a_server(verdict: Verdict) -> None:
    again, changed = judge_saved(verdict)
    assert changed == []
    assert again.verdict == "pass"
