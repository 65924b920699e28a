"""What becomes of a check whose own server does not come up, and what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harness import qualify, suite
from sglang_harness.errors import DidNotComeUp, MissingExtra, ServerDied
from sglang_harness.qualify import Qualification, Request
from sglang_harness.runtime.death import Death
from sglang_harness.secrets import Redactor
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.check import NotProvided, run_check
from sglang_harness.verdict import Outcome

#: Whose start is part of what they ask.
ASKING = [c for c in suite.registered().values() if c.id.startswith(("arch", "parallel/", "lora/"))]
DEATH = Death(1, False, "ValueError: no such flag", "", ())
VIEWER: Any = SimpleNamespace(say=lambda _: None)


def context(error: BaseException, device: str = "cpu") -> Any:
    """Of a context, what a check touches before its server is up."""

    @contextmanager
    def own_server(**asked: Any) -> Iterator[Server]:
        seen.update(asked)
        raise error
        yield

    seen: dict[str, Any] = {}
    server = SimpleNamespace(
        client=SimpleNamespace(retries=[]), redactor=Redactor(""), device=device
    )
    return SimpleNamespace(
        server=server, own_server=own_server, asked=seen, scratch=Path("/nowhere"), seed=0
    )


@pytest.mark.parametrize("check", ASKING, ids=lambda c: c.id)
def test_a_server_that_does_not_come_up_fails_the_check_that_asks_for_it_with_evidence(check: Any):
    result, figures = run_check(check, context(DidNotComeUp("The server ended (exit code 1)")))
    assert result.outcome is Outcome.FAIL
    assert "expected one that comes up, got The server ended (exit code 1)" in result.message
    assert result.evidence is not None
    assert figures == []


@pytest.mark.parametrize("check", ASKING, ids=lambda c: c.id)
def test_what_the_harness_lacks_is_not_laid_at_the_servers_door(check: Any):
    result, _ = run_check(check, context(NotProvided("torch is missing")))
    assert result.outcome is Outcome.NOT_RUN
    assert result.message == "torch is missing"


@pytest.mark.parametrize("check", ASKING, ids=lambda c: c.id)
def test_each_says_its_flags_itself_and_serves_a_tiny_model(check: Any):
    asked = context(DidNotComeUp("no"))
    run_check(check, asked)
    assert asked.asked["model"].startswith("tiny")
    # None would be the flags of the run, which are for the run's model.
    assert asked.asked["server_args"] is not None
    assert check.own_server
    assert check.profile == "full"


def test_the_torch_backend_of_lora_is_for_a_cpu_alone():
    check = suite.registered()["lora/adapter-from-disk"]
    for device, backend in (("cpu", "torch_native"), ("gpu", None)):
        asked = context(DidNotComeUp("no"), device)
        run_check(check, asked)
        assert asked.asked["server_args"].get("lora-backend") == backend


# --- the run's side -------------------------------------------------------------------------------


class Starts:
    """Stands in for ``Server.start``: what it was asked for, and how it ends."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.specs: list[ServerSpec] = []

    def __call__(self, spec: ServerSpec, **_: Any) -> Any:
        self.specs.append(spec)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def run(tmp_path: Path) -> Qualification:
    spec = ServerSpec.make(model="/models/large", server_args={"quantization": "fp8"})
    made = Qualification(Request(spec=spec, out=tmp_path / "out"), VIEWER)
    first: Any = SimpleNamespace(about=lambda: {"image": "an/image"})
    made._servers.append(first)
    return made


def test_the_log_of_a_server_that_died_at_its_start_is_kept_under_what_it_was(
    run: Qualification, monkeypatch: pytest.MonkeyPatch
):
    died = ServerDied(DEATH)
    died.server_log = "its last words"  # type: ignore[attr-defined]
    monkeypatch.setattr(qualify.Server, "start", starts := Starts(died))
    with (
        pytest.raises(DidNotComeUp, match="no such flag"),
        run._own_server(model="tiny-qwen3", server_args={"tp-size": 2}),
    ):
        pytest.fail("it never came up")
    (spec,) = starts.specs
    assert (spec.image, spec.model, spec.server_args) == ("an/image", "tiny-qwen3", {"tp-size": 2})
    (log,) = run._logs
    assert log.splitlines() == [
        "--- a server of its own that did not come up: tiny-qwen3 --tp-size=2 ---",
        "its last words",
    ]


def test_a_missing_package_is_what_the_harness_lacks(
    run: Qualification, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(qualify.Server, "start", Starts(MissingExtra("A tiny model", "torch")))
    with pytest.raises(NotProvided, match=r"sglang-harness\[torch\]"), run._own_server():
        pytest.fail("it cannot be made")


def test_it_is_stopped_and_its_log_kept_whatever_the_check_does(
    run: Qualification, monkeypatch: pytest.MonkeyPatch
):
    ended: list[str] = []
    server = SimpleNamespace(
        client=SimpleNamespace(deadline=None),
        logs=lambda: "what it wrote",
        stop=lambda: ended.append("stopped"),
    )
    monkeypatch.setattr(qualify.Server, "start", starts := Starts(server))
    before = time.monotonic()

    def check() -> None:
        with run._own_server():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check()
    deadline = server.client.deadline
    # The start has a limit of its own; the check's begins when the server is up.
    assert deadline is not None
    assert 0 <= deadline - before - starts.specs[0].limits.check < 60
    assert ended == ["stopped"]
    assert run._logs == [
        "--- a server of its own for one check: tiny --quantization=fp8 ---\nwhat it wrote"
    ]
