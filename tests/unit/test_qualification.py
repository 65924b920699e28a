"""Which servers a run starts, how, in which order, and what the verdict says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harness._base.secrets import Redactor
from sglang_harness.errors import ServerDied
from sglang_harness.run import qualification, server_pool
from sglang_harness.run.qualification import Qualification, Request
from sglang_harness.runtime import Started
from sglang_harness.runtime.death import Death
from sglang_harness.server import Stopped
from sglang_harness.server.readiness import Phase, StartReport
from sglang_harness.spec import ServerSpec
from sglang_harness.verdict import Verdict

DEATH = Death(1, False, "", "ValueError: no", ())


class Running:
    """What a run looks at of a server that answers nothing."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.model = None
        self.device = "cpu"
        self.may_change = True
        how = "cold" if spec.start == "cold" else "warm"
        self.running = SimpleNamespace(
            runtime="docker", owned=True, started=Started(how), watch=SimpleNamespace(death=None)
        )
        self.report = StartReport(phases=[Phase("create", 1.0), Phase("import", 2.0)])
        self.client = SimpleNamespace(
            retries=[],
            within=lambda _: nullcontext(),
            server_info=lambda: {"version": "0.5.23"},
            has_route=lambda *_: True,
        )
        self.memory = SimpleNamespace(readings=[], samplers={}, first_call_only=False)
        self.redactor = Redactor("")
        self.lacks: dict[str, str | None] = {}
        self.stopped: Stopped | None = None
        self.ended_at_once: bool | None = None

    def about(self) -> dict[str, Any]:
        return {"image": "an/image"}

    def logs(self) -> str:
        return "what it wrote"

    def stop(self, *, at_once: bool = False) -> Stopped:
        self.ended_at_once = at_once
        self.stopped = Stopped(0, 0.1, [])
        return self.stopped


class Starts:
    """Stands in for ``Server.start``: hands out servers, and remembers what was asked for."""

    def __init__(self) -> None:
        self.servers: list[Running] = []
        self.fails: Exception | None = None

    def __call__(self, spec: ServerSpec, **_: Any) -> Running:
        if self.fails is not None:
            raise self.fails
        self.servers.append(Running(spec))
        return self.servers[-1]


class Keeps:
    """A runtime whose parents are counted."""

    name = "docker"
    starts = True
    caveat: str | None = None

    def __init__(self) -> None:
        self.open = 0
        self.opened = 0

    def for_another_server(self) -> Keeps:
        return self

    @contextmanager
    def keeping_parents(self) -> Iterator[None]:
        self.open, self.opened = self.open + 1, self.opened + 1
        try:
            yield
        finally:
            self.open -= 1


class Silent:
    def say(self, message: str) -> None: ...

    def begin(self, check_id: str, number: int, total: int) -> None: ...

    def end(self, result: Any) -> None: ...


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Starts:
    start = Starts()
    for module in (qualification, server_pool):
        monkeypatch.setattr(module.Server, "start", start)
    monkeypatch.setattr(server_pool.State, "of", lambda _: None)
    monkeypatch.setattr(server_pool, "restore", lambda *_: None)
    monkeypatch.setattr(qualification, "_engine", dict)
    return start


def run(out: Path, *patterns: str, runtime: Keeps | None = None, **fields: Any) -> Verdict:
    request = Request(
        spec=ServerSpec(**{"model": "tiny", **fields}),
        out=out,
        runtime=runtime or Keeps(),  # type: ignore[arg-type]
        patterns=list(patterns),
    )
    return Qualification(request, Silent()).run()


@pytest.mark.parametrize("asked", ["auto", "cold", "warm"])
def test_the_first_server_is_cold_whatever_was_asked_for(
    start: Starts, tmp_path: Path, asked: str
) -> None:
    verdict = run(tmp_path, "launch/phases", start=asked)
    assert [s.spec.start for s in start.servers] == ["cold"]
    assert [(s.name, s.how) for s in verdict.servers] == [("the server", "cold")]
    assert [p.name for p in verdict.phases] == ["create", "import"]
    assert not any("warm" in caveat for caveat in verdict.caveats)


def test_where_every_check_has_its_own_server_no_other_is_started(
    start: Starts, tmp_path: Path
) -> None:
    verdict = run(tmp_path, "hostile/out-of", "hostile/weights-unknown-names")
    assert start.servers
    assert {s.spec.start for s in start.servers} == {"auto"}
    assert {(s.name, s.how, s.seconds) for s in verdict.servers} == {("tiny", "warm", 3.0)}
    assert verdict.phases == []
    assert verdict.sglang_version == "0.5.23"
    assert verdict.image == {"image": "an/image"}
    assert any(f"of {len(start.servers)} servers were started warm" in c for c in verdict.caveats)


def test_a_version_and_not_an_image_is_what_the_first_of_their_own_runs(
    start: Starts, tmp_path: Path
) -> None:
    run(tmp_path, "hostile/out-of", sglang_version="0.5.20")
    assert {(s.spec.sglang_version, s.spec.image) for s in start.servers} == {("0.5.20", None)}


def test_beside_a_first_server_the_others_run_from_its_image(start: Starts, tmp_path: Path) -> None:
    verdict = run(tmp_path, "launch/phases", "hostile/out-of", sglang_version="0.5.20")
    first, *others = start.servers
    assert (first.spec.start, first.spec.sglang_version) == ("cold", "0.5.20")
    assert others
    assert {(s.spec.start, s.spec.image) for s in others} == {("auto", "an/image")}
    assert [s.how for s in verdict.servers] == ["cold", *["warm"] * len(others)]


def test_only_an_end_that_is_judged_is_waited_for(start: Starts, tmp_path: Path) -> None:
    run(tmp_path, "launch/phases", "launch/stop", "hostile/out-of")
    first, *others = start.servers
    assert first.ended_at_once is False
    assert {s.ended_at_once for s in others} == {True}
    run(tmp_path, "launch/phases")
    assert start.servers[-1].ended_at_once is True


def test_parents_stay_for_the_run_and_no_longer(start: Starts, tmp_path: Path) -> None:
    runtime = Keeps()
    run(tmp_path, "launch/phases", runtime=runtime)
    assert (runtime.opened, runtime.open) == (1, 0)
    start.fails = ServerDied(DEATH)
    verdict = run(tmp_path, "hostile/out-of", runtime=runtime)
    assert verdict.verdict == "fail"
    assert (runtime.opened, runtime.open) == (2, 0)


@pytest.mark.parametrize("patterns", [("launch/phases",), ("hostile/out-of",)])
def test_a_server_that_never_comes_up_fails_the_run_with_its_words(
    start: Starts, tmp_path: Path, patterns: tuple[str, ...]
) -> None:
    died = ServerDied(DEATH)
    died.log = "its last words"
    start.fails = died
    verdict = run(tmp_path, *patterns)
    assert verdict.verdict == "fail"
    assert "ValueError: no" in verdict.checks[0].message
    assert "its last words" in (tmp_path / "server.log").read_text()
    assert verdict.servers == []


def test_a_replacement_for_one_that_died_is_warm_where_it_can_be(
    start: Starts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = qualification.run_check

    def kills(check: Any, context: Any) -> Any:
        if check.id == "launch/phases":
            context.server.running.watch.death = DEATH
        return asked(check, context)

    monkeypatch.setattr(qualification, "run_check", kills)
    verdict = run(tmp_path, "launch/phases", "launch/log")
    assert [s.spec.start for s in start.servers] == ["cold", "auto"]
    assert [s.how for s in verdict.servers] == ["cold", "warm"]
    assert all(s.stopped for s in start.servers)
