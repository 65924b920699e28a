"""What becomes of a check whose own server does not come up, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harness import suite
from sglang_harness._base.secrets import Redactor
from sglang_harness.errors import DidNotComeUp, MissingExtra, ServerDied
from sglang_harness.run import server_pool
from sglang_harness.run.server_pool import OwnServers
from sglang_harness.runtime.death import Death
from sglang_harness.server import Server
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


class Lives:
    """Stands in for a server that is up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.within: list[float] = []
        self.bounded = False
        self.client = SimpleNamespace(within=self._within)
        self.running = SimpleNamespace(watch=SimpleNamespace(death=None))
        self.ended = 0

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        self.within.append(seconds)
        self.bounded = True
        yield
        self.bounded = False

    def logs(self) -> str:
        return f"what {self.name} wrote"

    def stop(self, *, at_once: bool = False) -> None:
        assert at_once, "nobody judges how it ends"
        self.ended += 1


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Lives]:
    """The servers that were started, in their order."""
    started: list[Lives] = []

    def start(spec: ServerSpec, **_: Any) -> Any:
        started.append(Lives(f"server {len(started)}"))
        return started[-1]

    monkeypatch.setattr(server_pool.Server, "start", start)
    monkeypatch.setattr(server_pool.State, "of", lambda server: f"first of {server.name}")
    monkeypatch.setattr(server_pool, "restore", lambda *_: None)
    return started


@pytest.fixture
def servers() -> OwnServers:
    wanted = ServerSpec.make(model="/models/large", server_args={"quantization": "fp8"})
    return OwnServers(
        wanted,
        SimpleNamespace(),  # type: ignore[arg-type]
        image="an/image",
        run_id="r",
        say=lambda _: None,
        started=lambda _, __: None,
    )


def test_the_log_of_a_server_that_died_at_its_start_is_kept_under_what_it_was(
    servers: OwnServers, monkeypatch: pytest.MonkeyPatch
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
    servers: OwnServers, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server_pool.Server, "start", Starts(MissingExtra("A tiny model", "torch")))
    with pytest.raises(NotProvided, match=r"sglang-harness\[torch\]"), servers.lent():
        pytest.fail("it cannot be made")


def test_the_check_has_its_time_from_when_the_server_is_up(
    servers: OwnServers, starts: list[Lives]
):
    with servers.lent():
        assert starts[0].within == [servers._wanted.limits.check]
        assert starts[0].bounded
    assert not starts[0].bounded, "putting back is not the check's time"


def test_it_is_stopped_and_its_log_kept_where_the_check_did_not_come_to_its_end(
    servers: OwnServers, starts: list[Lives]
):
    def check() -> None:
        with servers.lent():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check()
    assert [each.ended for each in starts] == [1]
    title = "--- a server of its own: tiny --quantization=fp8 ---"
    assert servers.logs == [f"{title}\nwhat server 0 wrote"]
    assert servers.stopped == starts


def test_one_that_could_be_put_back_is_handed_on_to_whoever_asks_for_the_same(
    servers: OwnServers, starts: list[Lives]
):
    for _ in range(3):
        with servers.lent(model="tiny", server_args={"tp_size": 2}):
            pass
    with servers.lent(model="tiny", server_args={"tp-size": 2}):
        pass
    assert [each.ended for each in starts] == [0]
    with servers.lent(model="tiny-qwen3"):
        assert [each.ended for each in starts] == [1, 0], "never two of them at once"
    servers.close()
    servers.close()
    assert [each.ended for each in starts] == [1, 1]


def test_one_that_died_or_could_not_be_put_back_is_never_handed_on(
    servers: OwnServers, starts: list[Lives], monkeypatch: pytest.MonkeyPatch
):
    with servers.lent():
        pass
    starts[0].running.watch.death = DEATH
    with servers.lent():
        pass

    def cannot(*_: Any) -> None:
        raise CannotRestore("other weights")

    monkeypatch.setattr(server_pool, "restore", cannot)
    with servers.lent():
        pass
    with servers.lent():
        pass
    assert len(starts) == 3
    assert [each.ended for each in starts] == [1, 1, 1]
