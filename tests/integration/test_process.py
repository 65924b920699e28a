"""The same server without a container: for machines where no Docker engine can be had."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from secret_watch import SecretWatch

from sglang_harness import Server, ServerDied, ServerSpec
from sglang_harness._base.living import lives_as
from sglang_harness.errors import SpecError
from sglang_harness.runtime import Order
from sglang_harness.runtime.process import ProcessRuntime
from sglang_harness.verdict import Verdict

Run = Callable[..., "subprocess.CompletedProcess[str]"]

ACME = """
from sglang_harness.suite import Check, Mismatch, Observation, register


class Seen(Observation):
    tokens: int


@register
class Answers(Check[Seen]):
    id = "acme/answers"
    sentence = "It answers with two tokens."
    observation = Seen

    def observe(self, context):
        asked = {"max_new_tokens": 2, "ignore_eos": True}
        answer = context.server.client.generate("Hello", sampling=asked)
        return Seen(tokens=len(answer.output_ids))

    def judge(self, seen):
        return [] if seen.tokens == 2 else [Mismatch("tokens", "2", str(seen.tokens))]
"""


@pytest.fixture
def with_checks_of_another_package(tmp_path: Path) -> Path:
    """A folder that holds an installed package with one check."""
    site = tmp_path / "site"
    info = site / "acme_checks-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-checks\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[sglang_harness.checks]\nmine = acme_checks\n")
    (site / "acme_checks.py").write_text(ACME)
    return site


def test_a_process_serves_dies_and_leaves_nothing() -> None:
    server = Server.start(ServerSpec(model="tiny"), runtime=ProcessRuntime())
    try:
        assert (
            server.client.generate("Hello", sampling={"max_new_tokens": 3}).completion_tokens == 3
        )
        key = server.running.api_key
        assert key
        pids = server.running.host_pids()
        assert len(pids) >= 3, "the server, its scheduler and its detokenizer"
        for pid in pids:
            assert key not in " ".join(psutil.Process(pid).cmdline())
        (reading,) = server.memory.mark("test")
        assert reading.source == "process"
        assert reading.used_bytes > 300 << 20
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(ServerDied) as died:
            server.client.generate("Hello")
        assert died.value.death.exit_code == 137
    finally:
        stopped = server.stop()
    assert stopped.left_behind == []
    assert not any(lives_as(pid) for pid in pids)


def test_the_suite_runs_without_a_container_and_says_so(
    tmp_path: Path,
    command: Run,
    no_secret_in_sight: SecretWatch,
    with_checks_of_another_package: Path,
) -> None:
    """No engine answers where DOCKER_HOST points; asked for, the process does not mind."""
    done = command(
        "qualify", "--model", "tiny", "--runtime", "process",
        "-k", "launch/", "-k", "generate/", "-k", "weights/disk", "-k", "weights/tensor",
        "-k", "weights/shared-memory", "-k", "memory/snapshots", "-k", "acme/",
        env={
            "DOCKER_HOST": "unix:///nonexistent.sock",
            "PYTHONPATH": f"{with_checks_of_another_package}:{os.environ.get('PYTHONPATH', '')}",
            **no_secret_in_sight.environment,
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    verdict = Verdict.read(tmp_path / "out" / "verdict.json")
    assert verdict.verdict == "pass"
    assert verdict.runtime == "process"
    assert any("No container" in caveat for caveat in verdict.caveats)
    assert {r.source for r in verdict.memory} == {"process"}
    (theirs,) = (check for check in verdict.checks if check.id == "acme/answers")
    assert theirs.evidence == {"tokens": 2}
    assert verdict.environment["checks_added"][0]["package"] == "acme-checks"
    assert "acme/answers" in (tmp_path / "out" / "junit.xml").read_text()
    no_secret_in_sight.check(done.stdout, done.stderr, tmp_path / "out")


def test_what_only_a_container_gives_is_refused_in_one_line() -> None:
    runtime = ProcessRuntime()
    for spec, held, words in (
        (ServerSpec(model="tiny", image="any"), False, "runs no images"),
        (ServerSpec(model="tiny"), True, "cannot be held"),
        (ServerSpec(model="tiny", device="gpu"), False, "--python"),
    ):
        with pytest.raises(SpecError, match=words):
            runtime.prepare(Order(spec, model=None, run_id="x", held=held))
