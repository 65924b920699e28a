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
from sglang_harness.errors import SpecError
from sglang_harness.runtime.process import ProcessRuntime
from sglang_harness.verdict import Verdict

Run = Callable[..., "subprocess.CompletedProcess[str]"]


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
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_suite_runs_without_a_container_and_says_so(
    tmp_path: Path, command: Run, no_secret_in_sight: SecretWatch
) -> None:
    """No engine answers where DOCKER_HOST points; asked for, the process does not mind."""
    done = command(
        "qualify", "--model", "tiny", "--runtime", "process",
        "-k", "launch/", "-k", "generate/", "-k", "weights/", "-k", "memory/",
        env={"DOCKER_HOST": "unix:///nonexistent.sock", **no_secret_in_sight.environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    verdict = Verdict.read(tmp_path / "out" / "verdict.json")
    assert verdict.verdict == "pass"
    assert verdict.runtime == "process"
    assert any("No container" in caveat for caveat in verdict.caveats)
    assert {r.source for r in verdict.memory} == {"process"}
    no_secret_in_sight.check(done.stdout, done.stderr, tmp_path / "out")


def test_what_only_a_container_gives_is_refused_in_one_line() -> None:
    runtime = ProcessRuntime()
    for spec, held, words in (
        (ServerSpec(model="tiny", image="any"), False, "runs no images"),
        (ServerSpec(model="tiny"), True, "cannot be held"),
        (ServerSpec(model="tiny", device="gpu"), False, "--python"),
    ):
        with pytest.raises(SpecError, match=words):
            runtime.prepare(spec, run_id="x", held=held, say=print)
