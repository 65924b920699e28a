"""The pytest plugin on real servers, as another project's tests use it."""

from __future__ import annotations

import re

import pytest
from commands import COMMAND_LIMIT, names_on_engine

from sglang_harness._base import paths

pytest_plugins = ["pytester"]

#: Looked up here: a pytester has a home of its own.
CACHE = str(paths.cache())


@pytest.fixture(autouse=True)
def _what_was_made_before_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HARNESS_CACHE", CACHE)


PUSHING = """
import pytest

from sglang_harness.client import calls


@pytest.mark.parametrize("seed", range(1, 21))
def test_each_pushes_other_weights_and_finds_the_first_ones(seed, generate, push_weights):
    first = generate("Hello", max_new_tokens=4)
    assert first.weight_version == "default"
    push_weights(f"tiny:{seed}", version=f"step-{seed}")
    pushed = generate("Hello", max_new_tokens=4)
    assert pushed.weight_version == f"step-{seed}"
    assert pushed.output_ids != first.output_ids


def test_one_pauses_and_walks_away(sglang_server):
    sglang_server.client.pause("retract")


def test_one_leaves_a_long_request_running(sglang_server):
    long = {"max_new_tokens": 1500, "ignore_eos": True}
    next(sglang_server.client.stream("Once", sampling=long))


def test_one_leaves_a_session_open(sglang_server):
    sglang_server.client.send(calls.begin_weight_update())


def test_the_next_finds_it_as_it_was(generate):
    assert generate("Hello", max_new_tokens=4).weight_version == "default"


def test_one_fails(sglang_server):
    assert sglang_server.client.model_info()["model_path"] == "nowhere"
"""


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", *words, timeout=COMMAND_LIMIT
    )  # fmt: skip


def test_twenty_pushes_cost_one_start_and_a_failing_test_shows_its_server(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(PUSHING)
    done = run(pytester)
    done.assert_outcomes(passed=24, failed=1)
    text = done.stdout.str()
    (summary,) = re.findall(
        r"sglang: 1 server started \((.+) s, 1 of them warm\); state restored after 25 tests", text
    )
    assert float(summary) > 1
    assert "replaced" not in text
    assert "- start of the session's server -" in text
    assert re.search(r"create [\d.]+ s, import [\d.]+ s, load [\d.]+ s, first generation", text)
    assert "log of the session's server, last 60 lines" in text
    assert "POST /generate HTTP/1.1" in text, "what the server wrote is there"


SHARED = """
import os

import pytest

CRASH = os.environ["CRASH_ONCE"]


@pytest.mark.parametrize("seed", range(1, 7))
def test_each_worker_has_the_server_to_itself(seed, generate, push_weights):
    before = generate("Hello", max_new_tokens=4)
    assert before.weight_version == "default"
    push_weights(f"tiny:{seed}", version=f"step-{seed}")
    for _ in range(3):
        assert generate("Hello", max_new_tokens=4).weight_version == f"step-{seed}"


def test_a_worker_dies_with_other_weights_pushed(generate, push_weights):
    push_weights("tiny:9", version="never-put-back")
    assert generate("Hello", max_new_tokens=4).weight_version == "never-put-back"
    os.close(os.open(CRASH, os.O_CREAT | os.O_EXCL))
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("seed", range(10, 14))
def test_the_others_go_on(seed, sglang_server, generate):
    assert generate("Hello", max_new_tokens=4).weight_version == "default"
    assert sglang_server.running.host_pids()
    assert sglang_server.about()["container"].startswith("sglang-harness-")
    assert "generate" in sglang_server.logs()
    assert sglang_server.memory.mark("here")[0].used_bytes > 300 << 20
"""


@pytest.mark.engine
def test_the_workers_of_xdist_share_one_server_and_one_that_is_killed_takes_nothing_along(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRASH_ONCE", str(pytester.path / "crashed"))
    pytester.makepyfile(SHARED)
    done = run(pytester, "-n", "2", "-v")
    assert (pytester.path / "crashed").exists()
    # The test that killed its worker is the one that failed.
    done.assert_outcomes(passed=10, failed=1)
    text = done.stdout.str()
    assert "sglang: 1 server started " in text
    assert "replaced" not in text


CALLED_OFF = """
import os
import signal
import time


def test_the_job_is_called_off(sglang_server):
    print(f"container {sglang_server.about()['container']}.")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.engine
def test_sigterm_takes_the_container_down_before_the_run_ends(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CALLED_OFF)
    done = run(pytester, "-s", "--sglang-runtime", "docker")
    assert done.ret == 128 + 15
    (container,) = re.findall(r"container (sglang-harness-\S+)\.", done.stdout.str())
    assert container not in names_on_engine()


KILLED = """
import os
import signal



def test_one_kills_it_and_says_nothing(sglang_server):
    main = sglang_server.running.host_pids()[0]
    os.kill(main, signal.SIGKILL)


def test_the_next_has_another(generate):
    assert generate("Hello", max_new_tokens=4).completion_tokens == 4
"""


def test_a_server_that_dies_under_a_test_is_told_and_replaced(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(KILLED)
    done = run(pytester, "--sglang-runtime", "process")
    done.assert_outcomes(passed=2, errors=1)
    text = done.stdout.str()
    assert "ServerDied: The server ended (exit code 137)" in text
    assert "sglang: 2 servers started" in text
    assert "sglang: a server had to be replaced: The server ended (exit code 137)" in text
    assert "Traceback" not in text
