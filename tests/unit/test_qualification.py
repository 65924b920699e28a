"""A whole run over scripted servers: what it starts, how it ends, whom it blames, what it writes.

The servers are real ones on sockets; only SGLang behind them is scripted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from scripted_runtime import GENERATED, HANGS, ScriptedRunning, ScriptedRuntime
from scripted_server import Answer

from sglang_harness.errors import (
    EngineError,
    ImageError,
    Interrupted,
    ModelError,
    NotProvided,
    Refused,
    SpecError,
    TimeIsOver,
    Unresponsive,
)
from sglang_harness.run import qualification
from sglang_harness.run.qualification import Qualification, Request
from sglang_harness.runtime.death import Death, Unknown
from sglang_harness.server import state
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.check import Check, Context, Mismatch, Observation
from sglang_harness.verdict import Outcome, Verdict

REPORTS = ("verdict.json", "junit.xml", "server.log")


class Seen(Observation):
    weights: str = ""
    wrong: list[str] = Field(default_factory=list)


def check(
    check_id: str,
    observe: Callable[[Context], object] = lambda _: None,
    *,
    wrong: bool = False,
    **attributes: Any,
) -> Check[Any]:
    """A check that sees what the server's weights are, and does ``observe`` before."""

    def look(self: Any, context: Context) -> Seen:
        observe(context)
        with context.server.client.cleanup(5.0):
            (rank,) = context.server.client.checksums().ranks
        return Seen(weights=rank["w"], wrong=["it"] if wrong else [])

    def judge(self: Any, seen: Seen) -> list[Mismatch]:
        found = [Mismatch(w, "right", "wrong") for w in seen.wrong]
        return [
            *found,
            *([] if seen.weights == "first" else [Mismatch("w", "first", seen.weights)]),
        ]

    body = {
        "id": check_id,
        "sentence": "It is so.",
        "observation": Seen,
        "observe": look,
        "judge": judge,
        **attributes,
    }
    made: type[Check[Any]] = type("Made", (Check,), body)
    return made()


class Silent:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def begin(self, check_id: str, number: int, total: int) -> None: ...

    def end(self, result: Any) -> None: ...


Run = Callable[..., Verdict]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs checks over a scripted runtime; the results lie in ``tmp_path``."""
    monkeypatch.setattr(qualification, "STATES_ITSELF_WITHIN", 0.5)
    monkeypatch.setattr(state, "ANSWERS_WITHIN", 0.5)
    monkeypatch.setattr(state, "LOOKED_AT_WITHIN", 2.0)

    def run(*checks: Check[Any], runtime: ScriptedRuntime | None = None, **fields: Any) -> Verdict:
        monkeypatch.setattr(qualification.suite, "select", lambda *_: list(checks))
        asked = {
            name: fields.pop(name)
            for name in ("keep_on_failure", "strict_known", "viewer")
            if name in fields
        }
        viewer = asked.pop("viewer", None) or Silent()
        limits = {"check": 1.0, "start": 5.0, "request": 5.0, **fields.pop("limits", {})}
        request = Request(
            spec=ServerSpec.make(limits=limits, **fields),
            out=tmp_path,
            runtime=runtime or ScriptedRuntime(),
            **asked,
        )
        return Qualification(request, viewer).run()

    return run


def outcomes(verdict: Verdict) -> dict[str, str]:
    return {c.id: c.outcome.value for c in verdict.checks}


def messages(verdict: Verdict) -> dict[str, str]:
    return {c.id: c.message for c in verdict.checks}


def written(folder: Path) -> Verdict:
    assert all((folder / name).is_file() for name in REPORTS), "every report is there"
    return Verdict.read(folder / "verdict.json")


def pushes(context: Context) -> None:
    """Leaves other weights."""
    context.server.client.update_weights_from_disk("/other")


def pauses(context: Context) -> None:
    context.server.client.pause()


def pushes_and_waits(context: Context) -> None:
    """Leaves other weights, and is not done when its time is over."""
    pushes(context)
    pauses(context)
    context.server.client.generate([1])


def fails_to_load(running: ScriptedRunning) -> None:
    running.sglang.disk_works = False
    running.sglang.weights = "first"


def dies(context: Context) -> None:
    server: Any = context.server
    server.running.sglang.mortal.die()
    server.running.watch.wait(5.0)
    server.raise_if_dead()


# --- a clean run ----------------------------------------------------------------------------------


def test_a_run_in_which_all_is_well_passes_and_leaves_nothing(run: Run, tmp_path: Path):
    runtime = ScriptedRuntime()
    verdict = run(check("a/one"), check("a/two", pushes_then_restores), runtime=runtime)
    assert (verdict.verdict, outcomes(verdict)) == ("pass", {"a/one": "pass", "a/two": "pass"})
    assert written(tmp_path).run_id == verdict.run_id
    assert [r.ends for r in runtime.running] == [1]
    assert not runtime.keeping
    assert (tmp_path / "server.log").read_text() == "log of server 0"


def pushes_then_restores(context: Context) -> None:
    pushes(context)
    context.server.client.update_weights_from_disk("/m")


@pytest.mark.parametrize("asked", ["auto", "cold", "warm"])
def test_the_first_server_is_cold_whatever_was_asked_for(run: Run, asked: str):
    runtime = ScriptedRuntime()
    verdict = run(check("a/one"), runtime=runtime, start=asked)
    assert [order.spec.start for order in runtime.orders] == ["cold"]
    assert [(s.name, s.how) for s in verdict.servers] == [("the server", "cold")]
    assert [p.name for p in verdict.phases] == ["create", "import", "load", "first generation"]
    assert not any("warm" in caveat for caveat in verdict.caveats)


def in_its_own(context: Context) -> None:
    with context.own_server():
        pass


def test_where_every_check_has_its_own_server_no_other_is_started(run: Run):
    runtime = ScriptedRuntime()
    checks = [check(f"a/{n}", in_its_own, own_server=True) for n in ("one", "two")]
    verdict = run(*checks, runtime=runtime)
    assert len(runtime.running) == 1, "the second check takes over the server of the first"
    assert {order.spec.start for order in runtime.orders} == {"auto"}
    assert {(s.name, s.how) for s in verdict.servers} == {("tiny", "warm")}
    assert verdict.phases == []
    assert verdict.sglang_version == "0.0.1"
    assert verdict.image == {"image": "an/image"}
    assert any("of 1 servers were started warm" in c for c in verdict.caveats)
    assert runtime.running[0].ends == 1


def test_everything_that_a_runtime_cannot_vouch_for_is_in_the_verdict(run: Run):
    told = ("IPython is a stand-in.", "Kernels of sm90 only.")
    verdict = run(check("a/one", lambda _: None), runtime=ScriptedRuntime(caveats=told))
    assert [c for c in verdict.caveats if c in told] == list(told)


def test_beside_a_first_server_the_others_run_from_its_image(run: Run):
    runtime = ScriptedRuntime()
    verdict = run(
        check("a/one"),
        check("a/own", in_its_own, own_server=True),
        runtime=runtime,
        sglang_version="0.5.20",
    )
    first, other = (order.spec for order in runtime.orders)
    assert (first.start, first.sglang_version) == ("cold", "0.5.20")
    assert (other.start, other.image, other.sglang_version) == ("auto", "an/image", None)
    assert [s.how for s in verdict.servers] == ["cold", "warm"]


def test_only_an_end_that_is_judged_is_waited_for(run: Run):
    judged, unjudged = ScriptedRuntime(), ScriptedRuntime()
    own = check("a/own", in_its_own, own_server=True)
    run(check("a/one"), own, check("a/stop", after_stop=True, wrong=True), runtime=judged)
    assert [r.ended_at_once for r in judged.running] == [False, True]
    run(check("a/one"), runtime=unjudged)
    assert [r.ended_at_once for r in unjudged.running] == [True]


def test_parents_stay_for_the_run_and_no_longer(run: Run):
    runtime = ScriptedRuntime()
    run(check("a/one"), runtime=runtime)
    assert (runtime.parents_kept, runtime.keeping) == (1, False)
    runtime = ScriptedRuntime(EngineError("it went"))
    run(check("a/one"), runtime=runtime)
    assert (runtime.parents_kept, runtime.keeping) == (1, False)


# --- a verdict whatever happens -------------------------------------------------------------------


def never_generates(running: ScriptedRunning) -> None:
    running.sglang.http.script["POST /generate"] = Answer(body={**GENERATED, "output_ids": []})


def is_dead_at_once(running: ScriptedRunning) -> None:
    running.start = lambda: running.sglang.mortal.die()  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("prepared", "says"),
    [(never_generates, "200"), (is_dead_at_once, "IndexError: index out of range in self")],
    ids=["200 without a token", "dies at its start"],
)
def test_a_server_that_never_comes_up_fails_the_run_with_its_log(
    run: Run, tmp_path: Path, prepared: Any, says: str
):
    runtime = ScriptedRuntime(prepared)
    verdict = run(check("a/one"), check("a/two"), runtime=runtime)
    assert verdict.verdict == "fail"
    assert outcomes(verdict) == {"launch/phases": "fail", "a/one": "not-run", "a/two": "not-run"}
    assert says in messages(verdict)["launch/phases"]
    assert messages(verdict)["a/one"] == "the server never came up"
    assert written(tmp_path).verdict == "fail"
    assert "log of server 0" in (tmp_path / "server.log").read_text()
    assert verdict.servers == []
    assert [r.ends for r in runtime.running] == [1]


@pytest.mark.parametrize("broken", [EngineError("no engine"), ImageError("no image")])
def test_an_engine_that_fails_at_the_start_is_an_error_with_a_verdict(
    run: Run, tmp_path: Path, broken: Exception
):
    run(check("a/one"), runtime=ScriptedRuntime(broken))
    verdict = written(tmp_path)
    assert (verdict.verdict, verdict.exit_code) == ("error", 2)
    assert messages(verdict) == {
        "launch/phases": str(broken),
        "a/one": "the server never came up",
    }


def test_a_server_whose_server_info_hangs_is_judged_all_the_same(run: Run, tmp_path: Path):
    def stuck(running: ScriptedRunning) -> None:
        running.sglang.http.script["GET /server_info"] = HANGS

    verdict = run(check("a/one"), runtime=ScriptedRuntime(stuck))
    assert outcomes(verdict) == {"a/one": "pass"}
    assert verdict.sglang_version is None
    assert written(tmp_path).verdict == "pass"


def test_an_attached_server_that_does_not_generate_has_failed(run: Run, tmp_path: Path):
    runtime = ScriptedRuntime(Unresponsive("it does not generate"), starts=False)
    verdict = run(check("a/one"), runtime=runtime)
    assert verdict.verdict == "fail"
    assert written(tmp_path).verdict == "fail"


def test_an_image_that_is_gone_when_the_server_has_to_be_replaced(run: Run, tmp_path: Path):
    runtime = ScriptedRuntime(lambda _: None, ImageError("the image is gone"))
    verdict = run(check("a/one", dies), check("a/two"), check("a/three"), runtime=runtime)
    assert outcomes(verdict) == {"a/one": "fail", "a/two": "not-run", "a/three": "not-run"}
    assert "the image is gone" in messages(verdict)["a/two"]
    assert verdict.verdict == "fail", "the server died; that the rest was not asked is no excuse"
    assert not any("was replaced" in caveat for caveat in verdict.caveats)
    assert written(tmp_path).verdict == "fail"


def test_a_replacement_that_does_not_come_up_is_told_with_its_reason(run: Run, tmp_path: Path):
    def dies_at_its_start(running: ScriptedRunning) -> None:
        why = "ValueError: SGLANG_GRPC_PORT (65750) must be between 1 and 65535"
        running.sglang.mortal.death = Death(1, False, "", why, (why,))
        running.start = lambda: running.sglang.mortal.die()  # type: ignore[method-assign]

    runtime = ScriptedRuntime(lambda _: None, dies_at_its_start)
    verdict = run(check("a/one", dies), check("a/two"), runtime=runtime)
    assert outcomes(verdict) == {"a/one": "fail", "a/two": "not-run"}
    (caveat,) = [c for c in verdict.caveats if "a/one" in c]
    for told in (caveat, messages(verdict)["a/two"]):
        assert "died under a/one, and its replacement did not come up: The server ended" in told
        assert "SGLANG_GRPC_PORT (65750)" in told
        assert "was replaced" not in told
    assert written(tmp_path).verdict == "fail"


def test_a_replacement_that_dies_of_the_first_question_is_not_laid_at_the_next_checks_door(
    run: Run, tmp_path: Path
):
    # The harness's own question for the state that later checks are to find again.
    def dies_of_checksums(running: ScriptedRunning) -> None:
        def answer(_: Any) -> Answer:
            running.sglang.mortal.die()
            return Answer(500, {})

        running.sglang.http.script["POST /weights_checker"] = answer

    runtime = ScriptedRuntime(lambda _: None, dies_of_checksums)
    verdict = run(check("a/one", dies), check("a/two"), check("a/x"), runtime=runtime)
    assert outcomes(verdict) == {"a/one": "fail", "a/two": "not-run", "a/x": "not-run"}
    (caveat,) = [c for c in verdict.caveats if "a/one" in c]
    assert "its replacement ended as soon as it had come up: The server ended" in caveat
    assert [r.ends for r in runtime.running] == [1, 1]
    assert "log of server 1" in (tmp_path / "server.log").read_text()


def test_an_exception_of_the_harness_loses_nothing_that_was_seen(run: Run, tmp_path: Path):
    class Breaks(Silent):
        def begin(self, check_id: str, number: int, total: int) -> None:
            if check_id == "a/two":
                raise KeyError("a slip of ours")

    runtime = ScriptedRuntime()
    verdict = run(check("a/one"), check("a/two"), check("a/x"), runtime=runtime, viewer=Breaks())
    assert (verdict.verdict, verdict.exit_code) == ("error", 2)
    assert "the harness failed: KeyError in test_qualification.py:" in verdict.reason
    assert outcomes(verdict) == {"a/one": "pass", "a/two": "not-run", "a/x": "not-run"}
    assert written(tmp_path).checks == verdict.checks
    assert "Traceback" in (tmp_path / "server.log").read_text()
    assert [r.ends for r in runtime.running] == [1]


def test_results_of_before_stay_until_there_are_new_ones(run: Run, tmp_path: Path):
    for name in REPORTS:
        (tmp_path / name).write_text("of before")
    with pytest.raises(ModelError):
        run(check("a/one"), runtime=ScriptedRuntime(ModelError("no such model")))
    assert {(tmp_path / name).read_text() for name in REPORTS} == {"of before"}
    verdict = run(check("a/one"))
    assert written(tmp_path).run_id == verdict.run_id


def test_an_interruption_ends_the_run_and_what_was_seen_is_written(run: Run, tmp_path: Path):
    import os
    import signal

    def interrupted(_: Context) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    runtime = ScriptedRuntime()
    with pytest.raises(Interrupted):
        run(check("a/one"), check("a/two", interrupted), check("a/three"), runtime=runtime)
    verdict = written(tmp_path)
    assert (verdict.verdict, verdict.interrupted) == ("error", True)
    assert outcomes(verdict) == {"a/one": "pass"}
    assert [r.ends for r in runtime.running] == [1]


# --- restored after every check -------------------------------------------------------------------


def test_a_check_whose_time_is_over_leaves_nothing_for_the_next_one(run: Run):
    runtime = ScriptedRuntime()
    verdict = run(check("a/slow", pushes_and_waits, changes=True), check("a/next"), runtime=runtime)
    assert outcomes(verdict) == {"a/slow": "fail", "a/next": "pass"}, "a paused server hangs"
    assert len(runtime.running) == 1, "it was restored, not replaced"
    (told,) = [c for c in verdict.caveats if "left the server changed" in c]
    assert told.startswith("a/slow left the server changed (paused, 1 tensors (w, ...)")


@pytest.mark.parametrize("leaves", [pushes, pauses])
def test_what_a_passing_check_left_is_restored_too(run: Run, leaves: Any):
    verdict = run(check("a/one", leaves, changes=True), check("a/two"), runtime=ScriptedRuntime())
    assert outcomes(verdict)["a/two"] == "pass"
    assert any(c.startswith("a/one left the server changed") for c in verdict.caveats)


def test_a_failing_check_that_should_change_nothing_is_looked_after_as_well(run: Run):
    verdict = run(check("a/one", pushes, wrong=True), check("a/two"))
    assert outcomes(verdict) == {"a/one": "fail", "a/two": "pass"}


def test_a_server_that_cannot_be_restored_is_replaced(run: Run):
    def pushes_for_good(context: Context) -> None:
        pushes(context)
        server: Any = context.server
        server.running.sglang.disk_works = False

    runtime = ScriptedRuntime()
    verdict = run(check("a/one", pushes_for_good, changes=True), check("a/two"), runtime=runtime)
    assert outcomes(verdict)["a/two"] == "pass"
    assert [s.weights for s in runtime.servers] == ["/other", "first"]
    assert [r.ends for r in runtime.running] == [1, 1]
    assert any("could not be restored after a/one" in c for c in verdict.caveats)
    assert [order.spec.start for order in runtime.orders] == ["cold", "auto"]


def test_an_attached_server_that_cannot_be_restored_is_judged_no_further(run: Run):
    def pushes_for_good(context: Context) -> None:
        pushes(context)
        server: Any = context.server
        server.running.sglang.disk_works = False

    runtime = ScriptedRuntime(starts=False)
    verdict = run(check("a/one", pushes_for_good, changes=True), check("a/two"), runtime=runtime)
    assert outcomes(verdict)["a/two"] == "not-run"
    assert "not started by this run" in messages(verdict)["a/two"]
    assert len(runtime.running) == 1


def test_a_server_that_is_only_read_is_sent_nothing_that_restores(run: Run):
    runtime = ScriptedRuntime(starts=False, may_change=False)
    verdict = run(
        check("a/one", wrong=True), check("a/changes", pushes, changes=True), runtime=runtime
    )
    assert outcomes(verdict) == {"a/one": "fail"}
    assert [o.id for o in verdict.outside_profile] == ["a/changes"]
    (server,) = runtime.servers
    assert server.asked("/flush_cache") == server.asked("/continue_generation") == 0


def test_a_server_that_dies_again_and_again_is_replaced_twice_and_no_more(run: Run):
    runtime = ScriptedRuntime()
    verdict = run(*(check(f"a/{n}", dies) for n in range(4)), runtime=runtime)
    assert list(outcomes(verdict).values()) == ["fail", "fail", "fail", "not-run"]
    assert len(runtime.running) == 3
    assert [r.ends for r in runtime.running] == [1, 1, 1]
    assert verdict.verdict == "fail"


# --- what makes the rest meaningless --------------------------------------------------------------


def test_a_gate_that_fails_turns_the_rest_into_not_run_and_the_verdict_stays_a_fail(run: Run):
    verdict = run(
        check("a/gate", wrong=True, gate=True),
        check("a/two"),
        check("a/own", in_its_own, own_server=True),
        check("a/stop", after_stop=True),
    )
    assert outcomes(verdict) == {
        "a/gate": "fail",
        "a/two": "not-run",
        "a/own": "not-run",
        "a/stop": "not-run",
    }
    assert "a/gate failed" in messages(verdict)["a/two"]
    assert (verdict.verdict, verdict.reason) == ("fail", "failed: a/gate")


def test_a_gate_that_could_not_be_asked_keeps_nothing_from_being_asked(run: Run):
    def lacks(_: Context) -> None:
        raise NotProvided("torch is missing")

    verdict = run(check("a/gate", lacks, gate=True), check("a/two"))
    assert outcomes(verdict) == {"a/gate": "not-run", "a/two": "pass"}
    assert verdict.verdict == "error"


def test_when_the_time_of_the_run_is_over_the_rest_is_not_run(run: Run):
    def long(context: Context) -> None:
        with pytest.raises(TimeIsOver):
            context.server.client.send(_hanging())

    verdict = run(
        check("a/one", long),
        check("a/two"),
        check("a/own", in_its_own, own_server=True),
        runtime=ScriptedRuntime(hangs_at("/hang")),
        limits={"run": 1.2, "check": 60.0},
    )
    assert outcomes(verdict) == {"a/one": "pass", "a/two": "not-run", "a/own": "not-run"}
    assert "limit of 1.2 s was over" in messages(verdict)["a/two"]
    assert verdict.verdict == "error"


def _hanging() -> Any:
    from sglang_harness.client.call import Call

    return Call("GET", "/hang", lambda _: None)


def hangs_at(path: str) -> Callable[[ScriptedRunning], None]:
    def prepare(running: ScriptedRunning) -> None:
        running.sglang.http.script[f"GET {path}"] = HANGS

    return prepare


# --- blame ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Answer(500, {"error": {"message": "boom"}}), Outcome.FAIL),
        (Answer(ending="cut", body={"text": "a"}), Outcome.FAIL),
        (HANGS, Outcome.FAIL),
        (Answer(401, {"error": "Unauthorized"}), Outcome.ERROR),
    ],
    ids=["500", "cut off", "hangs", "401"],
)
def test_a_plain_generation_that_goes_wrong_is_laid_at_the_right_door(
    run: Run, answer: Answer, outcome: Outcome
):
    def asks(context: Context) -> None:
        server: Any = context.server
        server.running.sglang.http.script["POST /generate"] = answer
        context.server.client.generate([1, 2, 3])

    verdict = run(check("a/one", asks), runtime=ScriptedRuntime())
    assert verdict.checks[0].outcome is outcome
    assert verdict.verdict == outcome.value


def test_a_container_that_somebody_removed_is_not_a_death_and_the_rest_is_asked_of_another(
    run: Run,
):
    def removed(context: Context) -> None:
        server: Any = context.server
        server.running.sglang.mortal.death = Unknown("its container was removed from outside")
        server.running.sglang.mortal.die()
        server.running.watch.wait(5.0)

    runtime = ScriptedRuntime()
    verdict = run(check("a/one", removed), check("a/two"), runtime=runtime)
    assert outcomes(verdict) == {"a/one": "error", "a/two": "pass"}
    assert "removed from outside" in messages(verdict)["a/one"]
    assert (verdict.verdict, len(runtime.running)) == ("error", 2)


def test_a_request_that_the_server_refuses_by_mistake_of_ours_is_an_error(run: Run):
    def asks(_: Context) -> None:
        raise Refused("POST /generate", 400, "no such field")

    assert run(check("a/one", asks)).verdict == "error"


# --- nothing is left ------------------------------------------------------------------------------


def test_what_fails_to_end_keeps_nothing_else_from_ending_and_is_told(run: Run):
    def fails(running: ScriptedRunning) -> None:
        running.fails_to_end = EngineError("409: removal is already in progress")

    runtime = ScriptedRuntime(lambda _: None, fails)
    verdict = run(check("a/one"), check("a/own", in_its_own, own_server=True), runtime=runtime)
    assert [r.ends for r in runtime.running] == [1, 1]
    assert any("removal is already in progress" in c for c in verdict.caveats)
    for running in runtime.running:
        running.sglang.http.close()


def test_what_a_server_left_behind_is_told_whether_or_not_it_is_judged(run: Run):
    def leaves(running: ScriptedRunning) -> None:
        running.left = ["volume sglang-harness-x"]

    verdict = run(check("a/one"), runtime=ScriptedRuntime(leaves))
    assert any("volume sglang-harness-x" in c for c in verdict.caveats)


def test_the_scratch_folder_goes_with_the_run(run: Run):
    seen: list[Path] = []

    def looks(context: Context) -> None:
        seen.append(context.scratch)
        (context.scratch / "file").write_text("x")

    run(check("a/one", looks))
    assert not seen[0].exists()


# --- secrets --------------------------------------------------------------------------------------


def test_a_secret_passed_by_the_environment_is_in_no_file_of_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = "a-value-that-nobody-may-read"
    monkeypatch.setenv("ACME_LICENCE", secret)

    def tells(running: ScriptedRunning) -> None:
        running.sglang.wrote = f"licence {secret}"

    def fails(_: Context) -> None:
        raise Refused("POST /generate", 500, f"bad licence {secret}")

    run(check("a/one", fails), runtime=ScriptedRuntime(tells), pass_environment=["ACME_LICENCE"])
    for name in REPORTS:
        assert secret not in (tmp_path / name).read_text()
    assert "licence <redacted>" in (tmp_path / "server.log").read_text()
    assert json.loads((tmp_path / "verdict.json").read_text())["checks"][0]["outcome"] == "fail"


def test_a_verdict_that_cannot_be_written_any_more_is_not_lost(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise SpecError("verdict.json cannot be written: No space left on device.")

    monkeypatch.setattr(qualification.suite, "select", lambda *_: [check("a/one")])
    monkeypatch.setattr(qualification.report, "write_all", full)
    request = Request(ServerSpec(), tmp_path, ScriptedRuntime())  # type: ignore[arg-type]
    asked = Qualification(request, Silent())
    with pytest.raises(SpecError):
        asked.run()
    assert asked.verdict is not None
    assert asked.verdict.verdict == "pass"
