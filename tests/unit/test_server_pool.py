"""What becomes of a check whose own server does not come up, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_runtime import HANGS, ScriptedRuntime

from sglang_harness import suite
from sglang_harness._base.secrets import Redactor
from sglang_harness.client.call import Call
from sglang_harness.errors import (
    DidNotComeUp,
    EngineError,
    Interrupted,
    MissingExtra,
    NoAnswerInTime,
    ServerDied,
    TimeIsOver,
)
from sglang_harness.run import server_pool
from sglang_harness.run.server_pool import ServerPool
from sglang_harness.runtime.death import Death
from sglang_harness.server import Server, state
from sglang_harness.server.state import CannotRestore
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.check import NotProvided, run_check
from sglang_harness.verdict import Outcome

#: Whose start is part of what they ask.
ASKING = [c for c in suite.registered().values() if c.id.startswith(("arch", "parallel/", "lora/"))]
DEATH = Death(1, False, "ValueError: no such flag", "", ())


def context(error: BaseException, device: str = "cpu") -> Any:
    """Of a context, what a check touches before its server is up."""

    @contextmanager
    def own_server(**asked: Any) -> Iterator[Server]:
        seen.update(asked)
        raise error
        yield

    seen: dict[str, Any] = {}
    server = SimpleNamespace(client=SimpleNamespace(), redactor=Redactor(""), device=device)
    return SimpleNamespace(
        server=server, own_server=own_server, asked=seen, scratch=Path("/nowhere"), seed=0
    )


@pytest.mark.parametrize("check", ASKING, ids=lambda c: c.id)
def test_a_server_that_does_not_come_up_fails_the_check_that_asks_for_it_with_evidence(check: Any):
    result, figures = run_check(check, context(DidNotComeUp("The server ended (exit code 1)")))
    assert result.outcome is Outcome.FAIL
    assert "expected to come up, got The server ended (exit code 1)" in result.message
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
def servers() -> ServerPool:
    wanted = ServerSpec.make(model="/models/large", server_args={"quantization": "fp8"})
    return ServerPool(
        wanted,
        SimpleNamespace(),  # type: ignore[arg-type]
        image="an/image",
        run_id="r",
        say=lambda _: None,
        started=lambda _, __: None,
        left=lambda: 3600.0,
    )


def test_the_log_of_a_server_that_died_at_its_start_is_kept_under_what_it_was(
    servers: ServerPool, monkeypatch: pytest.MonkeyPatch
):
    died = ServerDied(DEATH)
    died.log = "its last words"
    monkeypatch.setattr(server_pool.Server, "start", starts := Starts(died))
    with (
        pytest.raises(DidNotComeUp, match="no such flag"),
        servers.lent(model="tiny-qwen3", server_args={"tp-size": 2}),
    ):
        pytest.fail("it never came up")
    (spec,) = starts.specs
    assert (spec.image, spec.model, spec.server_args) == ("an/image", "tiny-qwen3", {"tp-size": 2})
    (log,) = servers.logs
    assert log.splitlines() == [
        "--- a server of its own that did not come up: tiny-qwen3 --tp-size=2 ---",
        "its last words",
    ]


def test_a_missing_package_is_what_the_harness_lacks(
    servers: ServerPool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server_pool.Server, "start", Starts(MissingExtra("A tiny model", "torch")))
    with pytest.raises(MissingExtra, match=r"sglang-harness\[torch\]"), servers.lent():
        pytest.fail("it cannot be made")


# --- over real sockets ----------------------------------------------------------------------------


@pytest.fixture
def runtime() -> ScriptedRuntime:
    return ScriptedRuntime()


@pytest.fixture
def pool(runtime: ScriptedRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerPool]:
    monkeypatch.setattr(state, "ANSWERS_WITHIN", 0.5)
    made = ServerPool(
        ServerSpec.make(limits={"check": 0.5, "start": 5.0, "request": 5.0}),
        runtime,
        image="an/image",
        run_id="r",
        say=lambda _: None,
        started=lambda _, __: None,
        left=lambda: 60.0,
    )
    yield made
    made.close()


@pytest.mark.parametrize(
    "error",
    [Interrupted(2), KeyboardInterrupt(), ValueError("a slip of ours"), CannotRestore("no")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_goes_wrong_while_it_is_restored_the_server_is_ended_and_not_used_again(
    pool: ServerPool, runtime: ScriptedRuntime, monkeypatch: pytest.MonkeyPatch, error: Any
):
    def goes_wrong(*_: Any) -> None:
        raise error

    monkeypatch.setattr(server_pool, "restore", goes_wrong)
    if isinstance(error, Exception):
        with pool.lent():
            pass
    else:
        with pytest.raises(type(error)), pool.lent():
            pass
    assert [r.ends for r in runtime.running] == [1]
    pool.close()
    assert [r.ends for r in runtime.running] == [1], "ended once"


def test_a_check_that_is_interrupted_leaves_no_server(pool: ServerPool, runtime: ScriptedRuntime):
    def check() -> None:
        with pool.lent():
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        check()
    assert [r.ends for r in runtime.running] == [1]


def test_closing_ends_every_server_although_one_of_them_cannot_be_ended(
    pool: ServerPool, runtime: ScriptedRuntime
):
    with pool.lent():
        with pool.lent(model="tiny-qwen3"):
            pass
        first, second = runtime.running
        first.fails_to_end = EngineError("409: removal is already in progress")
        pool.close()
        assert (first.ends, second.ends) == (1, 1)
    assert any("removal is already in progress" in line for line in pool.left_behind)
    first.sglang.http.close()


def test_other_weights_are_gone_before_the_next_check_has_the_server(
    pool: ServerPool, runtime: ScriptedRuntime
):
    with pool.lent() as server:
        server.client.update_weights_from_disk("/other")
    with pool.lent() as again:
        assert again is server
        assert again.client.checksums().ranks[0]["w"] == "first"
    assert len(runtime.running) == 1


@pytest.mark.parametrize("stuck", [True, False], ids=["stuck", "slow"])
def test_a_server_that_hangs_until_the_checks_time_is_over_is_told_from_a_slow_one(
    pool: ServerPool, runtime: ScriptedRuntime, stuck: bool
):
    def check() -> None:
        with pool.lent() as server:
            if stuck:
                server.client.pause()
            runtime.servers[0].http.script["GET /slow"] = HANGS
            server.client.send(Call("GET", "/slow", lambda _: None))

    with pytest.raises(NoAnswerInTime) as raised:
        check()
    assert isinstance(raised.value, TimeIsOver) is not stuck
    assert ("does not generate any more" in str(raised.value)) is stuck
    assert [r.ends for r in runtime.running] == [1]


def test_after_the_runs_time_no_other_server_is_started(runtime: ScriptedRuntime):
    pool = ServerPool(
        ServerSpec.make(),
        runtime,
        image=None,
        run_id="r",
        say=lambda _: None,
        started=lambda _, __: None,
        left=lambda: 0.0,
    )
    with pytest.raises(NotProvided, match="limit was over"), pool.lent():
        pytest.fail("it was started")
    assert runtime.running == []


def test_it_is_stopped_and_its_log_kept_where_the_check_did_not_come_to_its_end(
    pool: ServerPool, runtime: ScriptedRuntime
):
    def check() -> None:
        with pool.lent(server_args={"quantization": "fp8"}):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check()
    assert [r.ends for r in runtime.running] == [1]
    assert runtime.running[0].ended_at_once, "how it ends is not judged"
    title = "--- a server of its own: tiny --quantization=fp8 ---"
    assert pool.logs == [f"{title}\nlog of server 0"]
    assert len(pool.stopped) == 1


def test_one_that_could_be_restored_is_handed_on_to_a_check_that_asks_for_the_same(
    pool: ServerPool, runtime: ScriptedRuntime
):
    for name in ("tp_size", "tp-size", "tp_size"):
        with pool.lent(model="tiny", server_args={name: 2}):
            pass
    assert [r.ends for r in runtime.running] == [0]
    with pool.lent(model="tiny-qwen3"):
        assert [r.ends for r in runtime.running] == [1, 0], "never two of them at once"
    pool.close()
    pool.close()
    assert [r.ends for r in runtime.running] == [1, 1]


def test_one_that_died_or_could_not_be_restored_is_never_handed_on(
    pool: ServerPool, runtime: ScriptedRuntime
):
    with pool.lent():
        pass
    runtime.servers[0].mortal.die()
    assert runtime.running[0].watch.wait(5.0) is not None
    with pool.lent() as server:
        server.client.update_weights_from_disk("/other")
        runtime.servers[1].disk_works = False
    with pool.lent():
        pass
    assert [r.ends for r in runtime.running] == [1, 1, 0]
    assert any("not used again" in log for log in pool.logs)
