"""A server of somebody else's: looked at without harm, and changed only where that is allowed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sglang_harness import Server
from sglang_harness.runtime.path_map import EXCHANGE, FolderReach
from sglang_harness.verdict import Verdict

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.engine


@dataclass
class Theirs:
    """A server that these tests know only by its address and its key."""

    server: Server

    @property
    def environment(self) -> dict[str, str]:
        return {"SGLANG_API_KEY": str(self.server.running.api_key)}

    def requests_since(self, line: int) -> set[str]:
        """Method and path of each request in its log, from a line on."""
        lines = self.server.running.logs().splitlines()[line:]
        found = (re.search(r'"(\w+ /\S*) HTTP', line) for line in lines)
        return {match[1].split("?")[0] for match in found if match}

    @property
    def lines(self) -> int:
        return len(self.server.running.logs().splitlines())


@pytest.fixture
def theirs(shared_server: Server) -> Theirs:
    return Theirs(shared_server)


def test_without_leave_it_is_only_read(tmp_path: Path, command: Run, theirs: Theirs) -> None:
    server, line = theirs.server, theirs.lines
    before, info = server.client.checksums(), server.client.model_info()
    done = command(
        "qualify", "--url", server.address, "--model", str(server.model), env=theirs.environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    verdict = Verdict.read(tmp_path / "out" / "verdict.json")
    assert (verdict.verdict, verdict.runtime) == ("pass", "attach")
    judged = {c.id for c in verdict.checks}
    assert {"generate/greedy-tokens", "generate/logprobs", "generate/32-at-once"} <= judged
    reasons = {o.id: o.reason for o in verdict.outside_profile}
    assert "--allow-changes was not given" in reasons["weights/disk"]
    assert "this run did not start the server" in reasons["launch/stop"]
    changing = {
        f"POST {path}"
        for path in (
            "/update_weights_from_disk", "/flush_cache", "/pause_generation",
            "/continue_generation", "/release_memory_occupation", "/begin_weight_update",
        )
    }  # fmt: skip
    assert theirs.requests_since(line) & changing == set()
    assert server.client.checksums() == before
    assert server.client.model_info() == info
    assert any("read-only" in caveat for caveat in verdict.caveats)


def test_with_leave_what_is_changed_is_put_back(
    tmp_path: Path, command: Run, theirs: Theirs
) -> None:
    server = theirs.server
    before, info = server.client.checksums(), server.client.model_info()
    assert isinstance(server.reach, FolderReach)
    share = f"{server.reach.folder}:{EXCHANGE}"
    files = set(server.reach.folder.iterdir())
    done = command(
        "qualify", "--url", server.address, "--model", str(server.model),
        "--allow-changes", "--share", share, "-k", "weights/disk", "-k", "weights/tensor",
        "-k", "weights/shared-memory", "-k", "weights/push-retract", "-k", "hostile/out-of",
        env=theirs.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    verdict = Verdict.read(tmp_path / "out" / "verdict.json")
    assert verdict.verdict == "pass"
    judged = {c.id for c in verdict.checks}
    assert {"weights/disk", "weights/disk-restore", "weights/tensor"} <= judged
    reasons = {o.id: o.reason for o in verdict.outside_profile}
    assert "did not start the server" in reasons["weights/shared-memory"]
    assert "a server of its own" in reasons["hostile/out-of-vocabulary-ids"]
    assert server.client.checksums() == before
    assert server.client.model_info() == info
    assert set(server.reach.folder.iterdir()) == files, "what was shared is gone"
    assert server.running.watch.death is None


def test_without_its_key_nothing_is_asked(command: Run, theirs: Theirs) -> None:
    for environment, sent in (({}, "none"), ({"SGLANG_API_KEY": "0" * 64}, "SGLANG_API_KEY")):
        done = command("qualify", "--url", theirs.server.address, env=environment)
        assert done.returncode == 2
        assert "requires an API key" in done.stderr
        assert sent in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


PLUGIN_TEST = """
def test_it_answers(generate):
    assert generate("Hello", max_new_tokens=4).completion_tokens == 4


def test_it_may_not_be_changed(push_weights):
    push_weights({model!r})


def test_another_cannot_be_started(fresh_sglang_server):
    assert False, "never runs"
"""

pytest_plugins = ["pytester"]


def test_the_plugin_uses_it_and_may_not_change_it(
    pytester: pytest.Pytester, theirs: Theirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = theirs.server
    monkeypatch.setenv("SGLANG_API_KEY", theirs.environment["SGLANG_API_KEY"])
    pytester.makepyfile(PLUGIN_TEST.replace("{model!r}", repr(str(server.model))))
    before = server.client.checksums()
    done = pytester.runpytest_subprocess("--sglang-url", server.address, timeout=200)
    done.assert_outcomes(passed=1, failed=1, skipped=1)
    assert "--allow-changes" in done.stdout.str()
    assert server.client.checksums() == before
