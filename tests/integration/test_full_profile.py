"""All checks that have servers of their own, as a person asks for them: other architectures,
several processes, adapters, and what kills a server. Their servers are forked from one parent; one
that lives is handed on to the next check.

Each kind once, and in 'make test-all' the rest of them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import COMMAND, names_on_engine

from sglang_harness.run.rejudge import judge_saved
from sglang_harness.suite import registered, select
from sglang_harness.verdict import Outcome, Verdict

pytestmark = pytest.mark.engine

ASKED = {name for name, check in registered().items() if check.own_server}

#: An architecture with experts and pushes onto it, two ranks and pushes onto them, an adapter, what
#: is survived, what kills, and what hurts memory.
EACH_KIND = {
    "architectures/qwen3-moe",
    "weights/on-experts",
    "parallel/tensor-2",
    "weights/on-tensor-2",
    "lora/adapter-from-disk",
    "lora/adapter-from-tensors",
    "hostile/out-of-vocabulary-ids",
    "hostile/weights-unknown-names",
    "hostile/weights-not-finite",
    "memory/resume-without-release",
}

#: Seconds: some fifteen servers on a busy machine.
LIMIT = 1500


class Run(NamedTuple):
    asked: set[str]
    out: Path

    @property
    def verdict(self) -> Verdict:
        return Verdict.read(self.out / "verdict.json")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(EACH_KIND, id="each-kind-once"),
        pytest.param(ASKED - EACH_KIND, id="the-rest", marks=pytest.mark.nightly),
    ],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("full")
    selected = [word for name in request.param for word in ("-k", name)]
    done = subprocess.run(
        [*COMMAND, "qualify", "--model", "tiny", "--profile", "full", "--strict-known", *selected],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # A part of an id selects every check that has it in its own.
    asked = {check.id for check in select("full", sorted(request.param))}
    assert asked >= request.param
    return Run(asked, folder / "out")


def test_every_one_of_them_is_asked_and_passes_with_evidence(run: Run) -> None:
    verdict = run.verdict
    assert verdict.verdict == "pass"
    assert verdict.outside_profile == []
    assert {check.id for check in verdict.checks} == run.asked
    assert len(ASKED) > 20
    assert ASKED >= EACH_KIND
    assert all(check.evidence for check in verdict.checks)
    failed = {check.id for check in verdict.checks if check.outcome is not Outcome.PASS}
    # What 0.5.23 does wrong is in the registry, and nothing that serves is.
    assert {c.id for c in verdict.checks if c.outcome is Outcome.KNOWN} == failed
    assert {name.split("/")[0] for name in failed} <= {"hostile", "memory"}


def test_no_server_is_started_for_nobody_and_all_are_forked(run: Run) -> None:
    verdict = run.verdict
    assert {start.how for start in verdict.servers} == {"warm"}
    assert len(verdict.servers) < len(run.asked) + 1, "some were handed on"
    assert verdict.phases == [], "no start was judged"
    assert any("were started warm" in caveat for caveat in verdict.caveats)
    assert all(0 < start.seconds < 120 for start in verdict.servers)


def test_float32_is_right_to_a_hundred_thousandth(run: Run) -> None:
    errors = {
        figure.name.split(":")[0]: figure.value
        for figure in run.verdict.figures
        if figure.name.endswith("largest log-probability error")
    }
    assert errors.keys() == {
        a for a in run.asked if a.startswith(("architectures/", "parallel/", "lora/"))
    }
    # In nats. Some tokens were scored, or it would be 0.
    assert all(0 < error < 5e-5 for error in errors.values()), errors


def test_several_processes_were_really_several(run: Run) -> None:
    evidence = {check.id: check.evidence or {} for check in run.verdict.checks}
    if "parallel/tensor-2" in run.asked:
        assert len(evidence["parallel/tensor-2"]["ranks"]) == 2
        return
    assert {r["stated"] for r in evidence["parallel/data-2"]["routed"]} == {0, 1}
    assert set(evidence["parallel/data-2"]["by_itself"]) == {0, 1}
    assert evidence["parallel/pipeline-2"]["ranks"][0]["place"]["pp_size"] == 2


def test_the_log_of_each_server_is_kept_under_its_name(run: Run) -> None:
    log = (run.out / "server.log").read_text()
    titles = [line for line in log.splitlines() if line.startswith("--- a server of its own")]
    assert len(titles) == len(run.verdict.servers)
    each, rest = ("tiny-qwen3-moe", "--tp-size=2", "--enable-lora"), ("tiny-mixtral", "--pp-size=2")
    for wanted in each if run.asked == EACH_KIND else ("tiny-qwen2", *rest):
        assert any(wanted in title for title in titles), wanted


def test_nothing_of_the_run_is_left(run: Run) -> None:
    assert names_on_engine(run.verdict.run_id) == []


def test_the_saved_run_is_judged_alike_without_a_server(run: Run) -> None:
    again, changed = judge_saved(run.verdict)
    assert changed == []
    assert again.verdict == "pass"
