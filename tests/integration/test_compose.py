"""Servers by compose: for a person's hands, and as a runtime of the harness."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from commands import COMMAND_LIMIT, names_on_engine
from secret_watch import SecretWatch

from sglang_harness import checkpoint
from sglang_harness._base import assets
from sglang_harness.runtime import images
from sglang_harness.runtime.compose import compose_command
from sglang_harness.verdict import Verdict

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.engine


@pytest.fixture
def compose() -> Run:
    model = checkpoint.locate("tiny", print)
    environment = {
        **os.environ,
        "SGLANG_MODEL": str(model),
        "SGLANG_API_KEY": "a-key-for-this-test-alone",
        "SGLANG_PORT": "30177",
        "COMPOSE_PROJECT_NAME": "sglang-harness-test",
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*compose_command(), *words], capture_output=True, text=True, timeout=COMMAND_LIMIT,
            cwd=assets.root(), env=environment,
        )  # fmt: skip

    return run


def test_compose_asks_for_the_gpu_as_the_harness_does(compose: Run) -> None:
    done = compose("--profile", "gpu", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    gpu = json.loads(done.stdout)["services"]["gpu"]
    assert gpu["image"] == assets.pins()["GPU_IMAGE"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert gpu["ipc"] == "shareable"
    assert gpu["ulimits"]["memlock"] == -1
    assert gpu["ports"][0]["host_ip"] == "127.0.0.1"


def test_compose_without_a_model_says_what_to_set() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "SGLANG_MODEL"}
    done = subprocess.run(
        [*compose_command(), "--profile", "cpu", "config"],
        capture_output=True, text=True, timeout=60, cwd=assets.root(), env=environment,
    )  # fmt: skip
    assert done.returncode != 0
    assert "SGLANG_MODEL" in done.stderr
    assert "sglang-harness model" in done.stderr


def test_compose_brings_the_same_server_up_and_takes_it_down(compose: Run) -> None:
    images.build_cpu_image(None, print)
    try:
        up = compose("--profile", "cpu", "up", "--detach", "--wait", "--wait-timeout", "300")
        assert up.returncode == 0, up.stderr
        headers = {"Authorization": "Bearer a-key-for-this-test-alone"}
        body = {"text": "Hello", "sampling_params": {"max_new_tokens": 2}}
        url = "http://127.0.0.1:30177/generate"
        assert requests.post(url, json=body, timeout=60).status_code == 401
        answer = requests.post(url, json=body, headers=headers, timeout=60)
        assert answer.json()["meta_info"]["completion_tokens"] == 2
    finally:
        down = compose("--profile", "cpu", "down", "--timeout", "60")
    assert down.returncode == 0, down.stderr
    left = compose("--profile", "cpu", "ps", "--all", "--quiet")
    assert left.stdout.strip() == ""


def test_the_suite_runs_on_our_own_compose_file(
    tmp_path: Path, command: Run, no_secret_in_sight: SecretWatch
) -> None:
    done = command(
        "qualify", "--model", "tiny", "--runtime", "compose",
        "-k", "launch/", "-k", "generate/", "-k", "weights/disk", "-k", "weights/tensor",
        "-k", "weights/shared-memory", "-k", "memory/snapshots",
        env=no_secret_in_sight.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    verdict = Verdict.read(tmp_path / "out" / "verdict.json")
    assert (verdict.verdict, verdict.runtime) == ("pass", "compose")
    assert verdict.image is not None
    assert verdict.image["service"] == "cpu"
    assert verdict.image["read_only_root"] is True
    assert names_on_engine(verdict.run_id) == []
    no_secret_in_sight.check(done.stdout, done.stderr, tmp_path / "out")


THEIRS = """
services:
  sglang:
    image: {image}
    init: true
    ports: ["127.0.0.1::8123"]
    environment:
      HF_HUB_OFFLINE: "1"
    volumes: ["{model}:/weights:ro"]
    command: >-
      --model-path /weights --host 0.0.0.0 --port 8123 --device cpu --dtype float32
      --attention-backend torch_native --sampling-backend pytorch --mem-fraction-static 0.1
      --max-total-tokens 4096 --disable-overlap-schedule --sleep-on-idle
    depends_on: [beside]
  beside:
    image: {image}
    entrypoint: ["sleep", "600"]
    stop_grace_period: 1s
"""


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    file = tmp_path / "my-compose.yaml"
    image, model = images.build_cpu_image(None, print), checkpoint.locate("tiny", print)
    file.write_text(THEIRS.format(image=image, model=model))
    return file


def test_a_service_of_somebodys_own_file_is_judged_as_it_is(
    tmp_path: Path, command: Run, theirs: Path
) -> None:
    """Its port, its model and what it depends on are all its file's to say."""
    before = theirs.read_bytes()
    done = command(
        "qualify", "--compose-file", str(theirs), "--compose-service", "sglang",
        "-k", "launch/", "-k", "generate/greedy", "-k", "weights/disk",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    verdict = Verdict.read(tmp_path / "out" / "verdict.json")
    assert (verdict.verdict, verdict.runtime) == ("pass", "compose")
    judged = {c.id for c in verdict.checks}
    assert {"launch/stop", "generate/greedy-tokens", "weights/disk"} <= judged
    assert names_on_engine(verdict.run_id) == [], "what it depends on is gone too"
    assert theirs.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--compose-service", "no-such"), "has no service 'no-such' (it has beside, sglang)"),
        ((), "has more than one service (it has beside, sglang)"),
        (("--compose-service", "sglang", "--gpus", "0"), "'gpus' cannot be combined"),
        (("--compose-service", "sglang", "--server-arg", "tp-size=2"), "'server_args' cannot be"),
        (("--compose-service", "sglang", "--runtime", "docker"), "belongs to the runtime"),
        (("--compose-service", "sglang", "--python", "/bin/sh"), "--python belongs to"),
        (("--compose-service", "sglang", "--url", "http://127.0.0.1:1"), "names a running server"),
    ],
)
def test_a_slip_about_a_compose_file_is_one_line_and_starts_nothing(
    command: Run, theirs: Path, words: tuple[str, ...], told: str
) -> None:
    before = set(names_on_engine())
    done = command("qualify", "--compose-file", str(theirs), *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert set(names_on_engine()) <= before


def test_a_compose_file_that_is_none_is_told_in_composes_own_words(
    tmp_path: Path, command: Run
) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("services: [this is no mapping]\n")
    done = command("qualify", "--compose-file", str(file))
    assert done.returncode == 2
    assert "Compose failed" in done.stderr
    assert "services must be a mapping" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
