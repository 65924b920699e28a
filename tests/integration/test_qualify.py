"""The main job as a person runs it, and what happens when somebody interrupts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import requests
from commands import COMMAND, COMMAND_LIMIT, names_on_engine
from junitparser import JUnitXml

from sglang_harness.suite import registered
from sglang_harness.verdict import Outcome, Verdict, json_schema

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.engine


#: What needs servers of its own is asked in test_full_profile.py.
ON_ONE_SERVER = [name for name, check in registered().items() if not check.own_server]


@pytest.fixture(scope="module")
def run_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run of the profile 'full' with the tiny model, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    selected = [word for name in ON_ONE_SERVER for word in ("-k", name)]
    done = subprocess.run(
        [*COMMAND, "qualify", "--model", "tiny", "--profile", "full", "--strict-known", *selected],
        capture_output=True,
        text=True,
        timeout=2 * COMMAND_LIMIT,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return folder / "out", done.stdout


def test_a_healthy_server_passes_with_evidence_for_every_check(run_out: tuple[Path, str]) -> None:
    verdict = Verdict.read(run_out[0] / "verdict.json")
    assert verdict.verdict == "pass"
    assert verdict.sglang_version
    assert verdict.checks
    assert all(check.evidence for check in verdict.checks)
    assert {c.outcome.value for c in verdict.checks} == {"pass", "known"}
    assert any("stand-in" in caveat for caveat in verdict.caveats)
    assert verdict.image is not None
    assert verdict.image["digest"].startswith("sha256:")
    names = {figure.name for figure in verdict.figures}
    assert {"start: import", "time to first token", "push from disk, rate"} <= names
    assert {reading.mark for reading in verdict.memory} >= {"ready", "after push 8"}


def test_the_verdict_fits_its_published_schema(run_out: tuple[Path, str]) -> None:
    jsonschema.validate(json.loads((run_out[0] / "verdict.json").read_text()), json_schema())


def test_the_junit_page_says_the_same_as_the_verdict(run_out: tuple[Path, str]) -> None:
    verdict = Verdict.read(run_out[0] / "verdict.json")
    page = JUnitXml.fromfile(str(run_out[0] / "junit.xml"))
    known = sum(check.outcome.value == "known" for check in verdict.checks)
    # One case more: the verdict itself.
    assert page.tests == len(verdict.checks) + len(verdict.outside_profile) + 1
    assert (page.failures, page.errors) == (0, 0)
    assert page.skipped == known + len(verdict.outside_profile)


def test_no_secret_is_in_anything_that_was_written(run_out: tuple[Path, str]) -> None:
    out, printed = run_out
    log = (out / "server.log").read_text()
    assert re.search(r"api_key['\"]?[:=] ?['\"]<redacted>", log), "SGLang logs its key"
    for text in (log, (out / "verdict.json").read_text(), (out / "junit.xml").read_text(), printed):
        # A key is 43 characters after its name; nothing else here looks like that.
        assert not re.search(r"api_key['\"]?[:=] ?['\"][\w-]{43}", text)


def test_nothing_of_the_run_is_left(run_out: tuple[Path, str]) -> None:
    verdict = Verdict.read(run_out[0] / "verdict.json")
    assert names_on_engine(verdict.run_id) == []


def test_a_saved_run_is_judged_again_without_a_server(
    run_out: tuple[Path, str], command: Run
) -> None:
    done = command("judge", str(run_out[0]), env={"DOCKER_HOST": "unix:///nonexistent.sock"})
    assert done.returncode == 0, done.stderr
    assert "PASS" in done.stdout


def _interrupt(tmp_path: Path, when: str, number: int, *options: str) -> tuple[int, str, Path]:
    """Starts a run, sends a signal to it alone when it prints ``when``; waits for its end."""
    process = subprocess.Popen(
        [*COMMAND, "qualify", "--model", "tiny", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if when in line:
                process.send_signal(number)
                break
        printed += process.communicate(timeout=90)[0]
    finally:
        process.kill()
    return process.returncode, printed, tmp_path / "out"


@pytest.mark.parametrize(
    ("when", "number", "code"),
    [
        ("imports SGLang", signal.SIGINT, 130),
        ("generate/greedy-tokens", signal.SIGTERM, 143),
    ],
    ids=["ctrl-c-while-starting", "sigterm-while-checking"],
)
def test_an_interrupted_run_leaves_its_results_and_nothing_else(
    tmp_path: Path, when: str, number: int, code: int
) -> None:
    returncode, printed, out = _interrupt(tmp_path, when, number)
    assert returncode == code, printed
    assert "Traceback" not in printed
    verdict = Verdict.read(out / "verdict.json")
    assert verdict.verdict == "error"
    assert verdict.interrupted
    assert "interrupted" in verdict.reason
    assert names_on_engine(verdict.run_id) == []
    assert (out / "junit.xml").exists()
    assert (out / "server.log").exists()
    if "greedy" in when:
        assert (out / "server.log").read_text().strip()
        assert "generate/greedy-tokens" in {c.id for c in verdict.checks}


def test_an_interrupted_build_ends_its_children(tmp_path: Path) -> None:
    # A version that nothing else here builds, so that there is something to build.
    options = ("--sglang-version", "0.5.19")
    code, printed, out = _interrupt(tmp_path, "fetching", signal.SIGINT, *options)
    assert code == 130, printed
    assert "Traceback" not in printed
    assert Verdict.read(out / "verdict.json").interrupted
    left = subprocess.run(["pgrep", "-f", "docker/build.sh 0.5.19"], capture_output=True, text=True)
    assert left.stdout == "", "the build script still runs"


def test_a_failed_run_can_keep_its_server_for_a_person(tmp_path: Path, command: Run) -> None:
    done = command(
        "qualify", "--model", "tiny", "--keep-on-failure", "--check-timeout", "0.01",
        "-k", "generate/logprobs",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "keeps running" in done.stdout
    (address,) = re.findall(r"http://127\.0\.0\.1:\d+", done.stdout)
    (name,) = set(re.findall(r"sglang-harness-[0-9a-f]{8}", done.stdout))
    try:
        key = command("key", name).stdout.strip()
        headers = {"Authorization": f"Bearer {key}"}
        assert requests.get(f"{address}/model_info", headers=headers, timeout=10).status_code == 200
        assert name not in command("sweep").stdout, "a kept server is not swept"
    finally:
        stopped = command("down")
    assert f"stopped {name}" in stopped.stdout
    assert name not in names_on_engine()


def test_a_server_that_dies_at_its_start_is_a_failed_verdict_with_the_reason(
    tmp_path: Path, command: Run
) -> None:
    done = command("qualify", "--model", "tiny", "--server-arg", "no-such-flag=1")
    assert done.returncode == 1, done.stdout + done.stderr
    verdict = Verdict.read(tmp_path / "out" / "verdict.json")
    assert verdict.verdict == "fail"
    launch, *others = verdict.checks
    assert "does not know a flag" in launch.message
    assert "no-such-flag" in launch.message
    assert {c.message for c in others} == {"the server never came up"}
    assert {c.outcome for c in others} == {Outcome.NOT_RUN}
    assert f"{len(others)} checks not run: the server never came up" in done.stdout
    assert "no-such-flag" in (tmp_path / "out" / "server.log").read_text()


def test_an_image_that_is_nowhere_is_one_line(tmp_path: Path, command: Run) -> None:
    done = command("qualify", "--model", "tiny", "--image", "localhost:1/no/such:image")
    assert done.returncode == 2
    assert "cannot be pulled" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    never = command("qualify", "--model", "tiny", "--image", "no/such:image", "--pull", "never")
    assert never.returncode == 2
    assert "not on this engine" in never.stderr


def test_a_gpu_that_is_not_there_is_one_line(command: Run) -> None:
    from sglang_harness.runtime.device import gpus

    if gpus()[0]:
        pytest.skip("this machine has a GPU")
    done = command("qualify", "--model", "tiny", "--device", "gpu")
    assert done.returncode == 2
    assert "device is 'gpu', but" in done.stderr


def test_the_doctor_finds_the_engine(command: Run) -> None:
    done = command("doctor")
    assert done.returncode == 0, done.stdout
    assert "Docker engine" in done.stdout
    assert "8B model" in done.stdout


def test_what_a_dead_run_left_is_swept(tmp_path: Path, command: Run) -> None:
    process = subprocess.Popen(
        [*COMMAND, "qualify", "--model", "tiny"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    before = set(names_on_engine())
    for line in process.stdout:
        if "imports SGLang" in line:
            break
    mine = set(names_on_engine()) - before
    assert mine, "the run has a container by now"
    process.kill()  # SIGKILL: it cannot clean up
    process.wait(timeout=30)
    swept = command("sweep")
    assert swept.returncode == 0, swept.stderr
    assert mine.isdisjoint(names_on_engine())
