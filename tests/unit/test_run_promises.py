"""What a run keeps, whoever does something wrong: a verdict, no server left, no secret written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from scripted_runtime import ScriptedRunning, ScriptedRuntime
from scripted_server import Answer
from test_qualification import (
    REPORTS,
    Silent,
    check,
    dies,
    in_its_own,
    messages,
    outcomes,
    pauses,
    pushes,
    run,
    written,
)

from sglang_harness import cli, container
from sglang_harness._base import paths, temporary
from sglang_harness._base.secrets import Redactor
from sglang_harness.errors import EngineError, Interrupted, Unreachable
from sglang_harness.runtime import Order
from sglang_harness.runtime.attach import SharedFolder
from sglang_harness.runtime.compose import ComposeServer
from sglang_harness.runtime.death import Death
from sglang_harness.runtime.process import SGLangProcess
from sglang_harness.runtime.warm.server import warm_or
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.check import Check, Context, Need, Observation
from sglang_harness.upkeep import kept_servers

__all__ = ["run"]


class Panic(BaseException):
    """As extension modules in Rust raise it (pyo3's PanicException)."""


@pytest.mark.parametrize("raised", [SystemExit(3), Panic("a panic")], ids=["exit", "panic"])
def test_a_check_that_raises_what_is_no_exception_loses_nothing(run, tmp_path, raised):
    def leaves(_: Context) -> None:
        raise raised

    runtime = ScriptedRuntime()
    verdict = run(check("a/one"), check("a/two", leaves), check("a/three"), runtime=runtime)
    assert outcomes(verdict)["a/one"] == "pass"
    assert written(tmp_path).verdict == "error"
    assert [r.ends for r in runtime.running] == [1]


class Closed(Silent):
    """A terminal that has gone: rich ends the program then."""

    def __init__(self, at: str, error: BaseException) -> None:
        super().__init__()
        self.at, self.error = at, error

    def say(self, message: str) -> None:
        if self.at in message:
            raise self.error


@pytest.mark.parametrize("error", [SystemExit(1), OSError("broken pipe")], ids=["exit", "os"])
def test_a_viewer_that_fails_at_the_stop_keeps_no_server_running(run, tmp_path, error):
    runtime = ScriptedRuntime()
    verdict = run(check("a/one"), runtime=runtime, viewer=Closed("stopping the server", error))
    assert [r.ends for r in runtime.running] == [1]
    assert written(tmp_path).run_id == verdict.run_id


@pytest.mark.parametrize("error", [SystemExit(1), OSError("broken pipe")], ids=["exit", "os"])
def test_a_viewer_that_fails_at_the_end_keeps_no_report_from_being_written(run, tmp_path, error):
    run(check("a/one", wrong=True, gate=True), check("a/two"), viewer=Closed("not run", error))
    assert written(tmp_path).verdict == "fail"


def test_a_viewer_that_fails_when_interrupted(run, tmp_path):
    def interrupted(_: Context) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(check("a/one", interrupted), viewer=Closed("interrupted by", OSError("pipe")))
    assert written(tmp_path).interrupted


def scratches() -> set[Path]:
    return {f.path for f in temporary.found() if "-scratch-" in f.path.name}


def test_parents_that_cannot_be_kept_leave_no_scratch_folder(run, tmp_path):
    class NoParents(ScriptedRuntime):
        def keeping_parents(self) -> Any:
            raise EngineError("no parents")

    before = scratches()
    run(check("a/one"), runtime=NoParents())
    assert written(tmp_path).verdict == "error"
    assert scratches() - before == set()


def test_a_server_that_cannot_be_kept_is_stopped(run, tmp_path, monkeypatch):
    def fails(_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(kept_servers, "hold", fails)
    runtime = ScriptedRuntime()
    run(check("a/one", wrong=True), runtime=runtime, keep_on_failure=True)
    assert [r.ends for r in runtime.running] == [1]


def test_a_server_whose_log_cannot_be_read_when_it_is_to_be_kept(run, monkeypatch):
    held = []
    monkeypatch.setattr(kept_servers, "hold", held.append)

    def unreadable(running):
        def logs(*, tail=None):
            raise EngineError("no engine")

        running.logs = logs

    runtime = ScriptedRuntime(unreadable)
    run(check("a/one", wrong=True), runtime=runtime, keep_on_failure=True)
    assert held or [r.ends for r in runtime.running] == [1]


def test_a_dead_server_is_not_kept(run, monkeypatch):
    held = []
    monkeypatch.setattr(kept_servers, "hold", held.append)
    runtime = ScriptedRuntime()
    run(*(check(f"a/{n}", dies) for n in range(4)), runtime=runtime, keep_on_failure=True)
    assert not held


def test_keep_when_the_harness_failed(run, monkeypatch):
    held = []
    monkeypatch.setattr(kept_servers, "hold", held.append)

    class Breaks(Silent):
        def begin(self, check_id: str, number: int, total: int) -> None:
            if check_id == "a/two":
                raise KeyError("a slip of ours")

    verdict = run(check("a/one"), check("a/two"), keep_on_failure=True, viewer=Breaks())
    assert verdict.verdict == "error"
    assert held


SECRET = "a-value-that-nobody-may-read"


def secretive(run: Any, monkeypatch: Any, tmp_path: Path, *checks: Any, **how: Any) -> None:
    monkeypatch.setenv("ACME_LICENCE", SECRET)
    with suppress(EngineError):
        run(*checks, pass_environment=["ACME_LICENCE"], **how)
    found = [n for n in REPORTS if SECRET in (tmp_path / n).read_text()]
    assert found == []


def test_no_secret_of_a_server_that_dies_at_its_start(run, monkeypatch, tmp_path):
    def prepared(running: ScriptedRunning) -> None:
        running.sglang.mortal.death = Death(1, False, "", f"ValueError: {SECRET}", (SECRET,))
        running.start = lambda: running.sglang.mortal.die()

    secretive(run, monkeypatch, tmp_path, check("a/one"), runtime=ScriptedRuntime(prepared))


def test_no_secret_in_what_keeps_the_first_server_from_starting(run, monkeypatch, tmp_path):
    runtime = ScriptedRuntime(EngineError(f"refused: invalid env ACME_LICENCE={SECRET}"))
    secretive(run, monkeypatch, tmp_path, check("a/one"), runtime=runtime)


def test_no_secret_in_a_failure_of_the_harness(run, monkeypatch, tmp_path):
    class Breaks(Silent):
        def begin(self, check_id: str, number: int, total: int) -> None:
            raise KeyError(SECRET)

    secretive(run, monkeypatch, tmp_path, check("a/one"), viewer=Breaks())


def test_no_secret_in_why_a_server_could_not_be_replaced(run, monkeypatch, tmp_path):
    runtime = ScriptedRuntime(lambda _: None, EngineError(f"bad env {SECRET}"))
    secretive(run, monkeypatch, tmp_path, check("a/one", dies), check("a/two"), runtime=runtime)


def test_no_secret_in_why_something_is_outside(run, monkeypatch, tmp_path):
    need = Need("x", lambda _: f"refused: {SECRET}")
    secretive(run, monkeypatch, tmp_path, check("a/one", needs=(need,)))


def test_no_secret_in_why_an_own_server_was_not_used_again(run, monkeypatch, tmp_path):
    def own(context: Context) -> None:
        with context.own_server() as server:
            s: Any = server
            s.running.sglang.http.script["POST /flush_cache"] = Answer(400, {"error": SECRET})

    secretive(run, monkeypatch, tmp_path, check("a/one"), check("a/own", own, own_server=True))


def test_the_limit_of_the_run_in_a_start_is_not_the_servers_failure(run):
    def never(running: ScriptedRunning) -> None:
        running.sglang.http.script["GET /ready"] = Answer(503, {})

    runtime = ScriptedRuntime(lambda _: None, never)
    verdict = run(
        check("a/one"),
        check("a/own", in_its_own, own_server=True),
        runtime=runtime,
        limits={"run": 2.0, "start": 60.0, "check": 30.0},
    )
    assert outcomes(verdict)["a/own"] != "fail", messages(verdict)["a/own"]


def test_no_server_is_started_for_checks_that_a_gate_has_closed(run):
    runtime = ScriptedRuntime()
    run(check("a/gate", dies, gate=True), check("a/two"), runtime=runtime)
    assert len(runtime.running) == 1


def changes_later(context: Context) -> None:
    """Other weights come after the check has looked, and do not go away again."""
    server: Any = context.server
    sglang = server.running.sglang
    sglang.disk_works = False
    seen = sglang.http.script["POST /weights_checker"]

    def once(asked: Any) -> Answer:
        answer = seen(asked)
        sglang.weights = "/other"
        return answer

    sglang.http.script["POST /weights_checker"] = once


def test_an_attached_server_that_cannot_be_restored_after_the_last_check_is_told(run):
    runtime = ScriptedRuntime(starts=False)
    verdict = run(check("a/one", changes_later, changes=True), runtime=runtime)
    assert runtime.servers[0].weights == "/other"
    assert any("could not be restored after a/one" in c for c in verdict.caveats)


def test_an_interrupted_run_restores_the_server_that_it_was_given(run):
    def interrupted(context: Context) -> None:
        pushes(context)
        pauses(context)
        os.kill(os.getpid(), signal.SIGTERM)

    runtime = ScriptedRuntime(starts=False)
    with pytest.raises(Interrupted):
        run(check("a/one", interrupted, changes=True), runtime=runtime)
    (server,) = runtime.servers
    assert (server.weights, server.paused) == ("first", False)


def test_a_server_that_dies_by_itself_is_no_pass(run):
    def then_dies(context: Context) -> None:
        pass

    class Dies(Silent):
        def __init__(self, runtime):
            super().__init__()
            self.runtime = runtime

        def end(self, result):
            if result.id == "a/one":
                s = self.runtime.running[0].sglang
                s.mortal.die()
                s.mortal.watch.wait(5.0)

    runtime = ScriptedRuntime()
    verdict = run(check("a/one"), check("a/two"), runtime=runtime, viewer=Dies(runtime))
    assert len(runtime.running) == 2
    assert verdict.verdict == "fail", verdict.caveats


def test_an_attached_server_that_dies_while_it_is_restored_fails_the_run(run):
    def dies_late(context: Context) -> None:
        server: Any = context.server
        sglang = server.running.sglang
        sglang.http.script["GET /ready"] = lambda _: (
            sglang.mortal.die(),
            sglang.mortal.watch.wait(5),
            Answer(500, {}),
        )[2]
        raise Unreachable("POST /generate", "connection refused")

    runtime = ScriptedRuntime(starts=False)
    verdict = run(check("a/one", dies_late), check("a/two"), runtime=runtime)
    assert outcomes(verdict) == {"a/one": "fail", "a/two": "not-run"}
    assert verdict.verdict == "fail", verdict.reason


@pytest.mark.parametrize(
    ("route", "answer"),
    [
        ("POST /weights_checker", {"success": True, "message": "", "ranks": ["x"]}),
        ("GET /model_info", [1]),
        ("GET /v1/models", {"data": [[]]}),
        ("GET /server_info", ["x"]),
        ("GET /openapi.json", {"paths": {"/a": [1]}}),
    ],
)
def test_nonsense_at_the_start_costs_no_check(run, route, answer):
    def prepared(running: ScriptedRunning) -> None:
        running.sglang.http.script[route] = Answer(body=answer)

    def nothing(_: Context) -> None:
        raise Unreachable("x", "y")

    verdict = run(
        check("a/one", nothing), check("a/two", nothing), runtime=ScriptedRuntime(prepared)
    )
    assert "harness failed" not in verdict.reason, verdict.reason


@pytest.mark.parametrize(
    "body",
    [
        '{"output_ids": [1e999], "meta_info": {"id": 1, "finish_reason": null}}',
        "[" * 100000,
    ],
    ids=["inf", "deep"],
)
def test_nonsense_is_the_servers_failure(run, body):
    def asks(context: Context) -> None:
        server: Any = context.server
        server.running.sglang.http.script["POST /generate"] = Answer(body=body)
        server.client.generate([1])

    verdict = run(check("a/one", asks))
    assert outcomes(verdict) == {"a/one": "fail"}, messages(verdict)


def test_a_need_that_fails_costs_only_its_check(run):
    def bad(_: Any) -> str | None:
        return str(int("x"))

    verdict = run(check("a/one", needs=(Need("x", bad),)), check("a/two"))
    assert outcomes(verdict)["a/two"] == "pass"


def test_three_own_servers_one_in_use(run):
    alive = []

    def nests(context: Context) -> None:
        with context.own_server(server_args={"a": 1}) as outer:
            with context.own_server(server_args={"b": 1}):
                pass
            with context.own_server(server_args={"c": 1}):
                r: Any = outer.running
                alive.append(r.ends)

    run(check("a/one"), check("a/own", nests, own_server=True))
    assert alive == [0]


def test_own_server_interrupted_at_its_start_has_its_log_written(run, tmp_path):
    def prepared(running: ScriptedRunning) -> None:
        running.sglang.wrote = "log of the own one"
        running.sglang.http.script["GET /ready"] = lambda _: (
            os.kill(os.getpid(), signal.SIGTERM),
            Answer(503, {}),
        )[1]

    with pytest.raises(Interrupted):
        run(
            check("a/one"),
            check("a/own", in_its_own, own_server=True),
            runtime=ScriptedRuntime(lambda _: None, prepared),
        )
    assert "log of the own one" in (tmp_path / "server.log").read_text()


def test_a_signal_at_the_start_of_the_clean_up_skips_none_of_it(run, tmp_path, monkeypatch):
    from sglang_harness._base import signals

    calm = signals.Interruptions.calm

    def late(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        calm(self)

    monkeypatch.setattr(signals.Interruptions, "calm", late)
    runtime = ScriptedRuntime()
    with pytest.raises(Interrupted):
        run(check("a/one"), runtime=runtime)
    assert [r.ends for r in runtime.running] == [1]


class ExitFails(ScriptedRuntime):
    def keeping_parents(self) -> Any:

        @contextmanager
        def keeping():
            yield
            raise RuntimeError("parents do not end")

        return keeping()


def test_parents_that_do_not_end(run, tmp_path):
    runtime = ExitFails()
    run(check("a/one"), runtime=runtime)
    assert written(tmp_path).verdict == "error"
    assert [r.ends for r in runtime.running] == [1]


class Seen(Observation):
    what: Any = None


def sees(value: Any) -> Check[Any]:
    body = {
        "id": "a/odd",
        "sentence": "It is so.",
        "observation": Seen,
        "observe": lambda *_: value,
        "judge": lambda *_: [],
    }
    made: type[Check[Any]] = type("Made", (Check,), body)
    return made()


@pytest.mark.parametrize(
    "value",
    [Seen(what={1}), Seen(what=Path("/x")), Seen(what=b"\xff"), Seen(what=object()), {"what": 1}],
    ids=["set", "path", "bytes", "object", "no observation"],
)
def test_evidence_that_json_does_not_know_costs_nobody_the_verdict(run, tmp_path, value):
    verdict = run(sees(value), check("a/next"))
    assert outcomes(verdict)["a/next"] == "pass"
    assert written(tmp_path).run_id == verdict.run_id


@pytest.mark.parametrize("at", ["begin", "end"])
def test_what_should_be_asked_after_the_stop_and_cannot_be_is_no_pass(run, at):
    class Breaks(Silent):
        def begin(self, check_id: str, number: int, total: int) -> None:
            if at == "begin" and check_id == "a/stop":
                raise KeyError("a slip of ours")

        def end(self, result: Any) -> None:
            if at == "end" and result.id == "a/stop":
                raise KeyError("a slip of ours")

    verdict = run(
        check("a/one"),
        check("a/stop", after_stop=True),
        check("a/last", after_stop=True),
        viewer=Breaks(),
    )
    assert {"a/stop", "a/last"} <= outcomes(verdict).keys()
    assert verdict.verdict != "pass"


def test_a_record_that_cannot_be_written_leaves_no_key_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "state", lambda: tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    server: Any = SimpleNamespace(
        running=SimpleNamespace(shared_folder=None, run_id="r", api_key="k" * 64),
        about=lambda: {"container": "c"},
        address="http://127.0.0.1:1",
        model=None,
    )
    with pytest.raises(OSError, match="full"):
        kept_servers.hold(server)
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []


def test_copies_that_stay_in_a_shared_folder_are_told(monkeypatch, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "weights").write_text("x")
    shared = SharedFolder(tmp_path / "shared", PurePosixPath("/shared"))
    inside = shared.share(tmp_path / "weights")

    def fails(_: Path) -> None:
        raise OSError("stale file handle")

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", fails)
        with pytest.raises(EngineError):
            shared.unshare(inside)
        assert any("stale file handle" in line for line in shared.clear())
    assert list((tmp_path / "shared").iterdir()) != []


def test_a_key_in_the_command_of_a_compose_file_is_the_servers_key(monkeypatch):
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    server: Any = ComposeServer.__new__(ComposeServer)
    server._ours, server.model = False, None
    server._container = SimpleNamespace(
        reload=lambda: None,
        attrs={
            "Config": {"Entrypoint": None, "Cmd": ["--api-key", "of-the-file"], "Env": []},
            "HostConfig": {"NetworkMode": "host", "PortBindings": {}},
            "Mounts": [],
        },
    )
    server._look_at_container()
    assert server.api_key == "of-the-file"


def test_a_parent_is_given_back_where_its_server_is_not_announced():
    given = []
    found = object()
    parents: Any = SimpleNamespace(for_server=lambda *_, **__: found, give=given.append)

    def say(_: str) -> None:
        raise SystemExit(1)

    order = Order(ServerSpec(), model=Path("/m"), run_id="r", say=say)
    with pytest.raises(SystemExit):
        warm_or(
            lambda: SimpleNamespace(started=None),  # type: ignore[arg-type, return-value]
            parents,
            order,
            recipe=lambda: None,  # type: ignore[arg-type, return-value]
            what="starting",
            runtime="docker",
            device="cpu",
        )
    assert given == [found]


def test_a_secret_in_the_last_words_of_a_process_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setenv("ACME_LICENCE", SECRET)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ValueError: $ACME_LICENCE"\nexit 1\n')
    python.chmod(0o755)
    spec = ServerSpec.make(model="owner/name", pass_environment=["ACME_LICENCE"])
    server = SGLangProcess(spec, python=python, model=None, device="cpu", run_id="r")
    try:
        server.start()
        death = server.watch.wait(20.0)
    finally:
        server.end(at_once=True)
    assert death is not None
    assert SECRET not in f"{death.sentence()} {death.advice()}"


@pytest.mark.parametrize("written_as", [str, repr, json.dumps, quote, str.strip])
def test_a_secret_is_known_however_it_is_written(written_as):
    secret = ' it\'s "a" se\\cret-ü '
    assert "cret" not in Redactor(secret).text(f"x={written_as(secret)}")


def test_each_value_of_a_secret_flag_is_a_secret():
    spec = ServerSpec.make(server_args={"hub-token": [SECRET, SECRET[::-1]]})
    shown = str(spec.redactor(None).data(spec.model_dump(mode="json")))
    assert SECRET not in shown
    assert SECRET[::-1] not in shown


def test_how_a_server_ends_is_not_judged_where_it_was_killed_to_be_replaced(run):
    def killed(running: ScriptedRunning) -> None:
        end = running.end
        running.end = lambda *, at_once=False: end(at_once=at_once) or (137 if at_once else 0)

    runtime = ScriptedRuntime(killed, EngineError("no engine"))
    verdict = run(
        check("a/one", changes_later, changes=True),
        check("a/stop", after_stop=True),
        runtime=runtime,
    )
    assert outcomes(verdict) == {"a/one": "pass", "a/stop": "not-run"}
    assert verdict.verdict == "error"


def test_a_slip_of_the_command_is_not_the_exit_code_of_a_server_that_failed(monkeypatch, capsys):
    def slips(**_: Any) -> None:
        raise KeyError("a slip of ours")

    monkeypatch.setattr(cli, "app", slips)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "a slip of ours" in capsys.readouterr().err


def test_the_last_log_line_of_a_container_that_is_waited_for_hides_what_its_spec_hides(monkeypatch):
    told: dict[str, Any] = {}
    monkeypatch.setattr(container, "wait_until_ready", lambda *_, **how: told.update(how))
    monkeypatch.setenv("ACME_LICENCE", SECRET)
    waited: Any = container.SGLangServerContainer.__new__(container.SGLangServerContainer)
    waited.spec = ServerSpec(pass_environment=["ACME_LICENCE"])
    waited._address, waited.api_key, waited._watch, waited.started_at = "http://x", "k", object(), 0
    container.AnswersGeneration().wait_until_ready(waited)
    assert SECRET not in told["redactor"].text(SECRET)
