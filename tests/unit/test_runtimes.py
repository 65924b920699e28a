"""What runtimes and their servers say of themselves, and which one a name and options mean."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest
from fake_docker import FakeDocker
from scripted_server import Answer, ScriptedServer

from sglang_harness import checkpoint, options
from sglang_harness.errors import AttachError, EngineError, SpecError
from sglang_harness.runtime import Introduction, Kind, KindOption, Order, Running, Runtime, registry
from sglang_harness.runtime.attach import Attachment, SharedFolder
from sglang_harness.runtime.compose import Project
from sglang_harness.runtime.docker import SGLangServerContainer
from sglang_harness.server import Server
from sglang_harness.sharing.xdist import RemoteServer, ServerOwner
from sglang_harness.spec import ServerSpec

GENERATED = {
    "text": "x",
    "output_ids": [1],
    "meta_info": {
        "id": "1", "finish_reason": {"type": "length"}, "prompt_tokens": 1, "completion_tokens": 1,
    },
}  # fmt: skip


def served(path: str = "/models/it", **script: Any) -> ScriptedServer:
    return ScriptedServer(
        {
            "GET /model_info": Answer(body={"model_path": path, "weight_version": "default"}),
            "GET /server_info": Answer(body={"version": "0.5.23", "device": "cpu"}),
            "POST /generate": Answer(body=GENERATED),
            **{f"GET /{path}": Answer(body={}) for path in ("ready", "health", "v1/models")},
            **script,
        }
    )


# --- which runtime a name and options mean --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "chosen"),
    [
        ("auto", {}, "auto"),
        ("docker", {}, "docker"),
        ("docker", {"python": None, "compose-file": None}, "docker"),
        ("process", {}, "process"),
        ("process", {"python": "/bin/python"}, "process"),
        ("auto", {"python": "/bin/python"}, "process"),
        ("auto", {"compose-file": __file__, "compose-service": "x"}, "compose"),
    ],
)
def test_an_option_of_one_runtime_means_that_runtime(
    name: str, given: dict[str, Any], chosen: str
) -> None:
    assert registry.choose(name, given).name == chosen


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("podman", {}, "--sglang-runtime 'podman' is unknown. It can be auto, docker, "),
        ("docker", {"python": "/p"}, "--sglang-python belongs to the runtime 'process', and the "),
        ("process", {"compose-file": "/f"}, "--sglang-compose-file belongs to the runtime 'com"),
        ("auto", {"python": "/p", "compose-file": "/f"}, "the runtime is 'process'"),
        ("compose", {"compose-service": "x"}, "--compose-file is missing"),
    ],
)
def test_options_of_another_runtime_are_rejected_with_a_reason(
    name: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        registry.choose(name, given, prefix="--sglang-")


def test_a_runtime_is_added_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make(given: Any) -> Runtime:
        made.append(dict(given))
        return Attachment("http://127.0.0.1:1")

    kind = Kind("slurm", make, (KindOption("partition", "a partition"),))
    monkeypatch.setattr(registry, "KINDS", (*registry.KINDS, kind))
    registry.choose("slurm")
    registry.choose("auto", {"partition": "gpu"})
    assert made == [{}, {"partition": "gpu"}]
    with pytest.raises(SpecError, match="--partition belongs to the runtime 'slurm'"):
        registry.choose("docker", {"partition": "gpu"})


def test_every_option_belongs_to_one_runtime() -> None:
    names = [option.name for option in registry.OPTIONS]
    assert len(names) == len(set(names))
    assert {"python", "compose-file", "compose-service"} <= set(names)
    described = {option.name for option in options.table() if option.starts}
    assert set(names) <= described, "the command line and pytest take it"


# --- a server that runs already -------------------------------------------------------------------


def test_attaching_is_a_start_that_starts_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with served(str(tmp_path)) as http:
        runtime: Runtime = Attachment(http.url)
        server = Server.start(ServerSpec(), runtime=runtime, say=said.append)
        assert not runtime.starts
        assert not server.running.owned
        assert server.running.started.how == "elsewhere"
        assert server.model == tmp_path, "the stated path is here too"
        assert server.spec.model == str(tmp_path)
        assert not server.may_change
        assert said == [f"attached to SGLang 0.5.23 at {http.url} (cpu)"]
        server.stop()


def test_the_default_model_is_not_fetched_for_a_server_that_runs_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def located(*_: Any) -> None:
        raise AssertionError("nothing is located that was not named")

    monkeypatch.setattr(checkpoint, "locate", located)
    with served() as http, Server.attach(Attachment(http.url)) as server:
        assert server.model is None


def test_one_that_does_not_generate_is_told_and_left() -> None:
    spec = ServerSpec.make(limits={"start": 0.5})
    with (
        served(**{"POST /generate": Answer(500, body={"error": "no"})}) as http,
        pytest.raises(AttachError, match="answers, but does not generate"),
    ):
        Server.start(spec, runtime=Attachment(http.url))


def test_from_an_address_no_other_server_can_be_had() -> None:
    with pytest.raises(SpecError, match="runs already"):
        Attachment("http://127.0.0.1:1").for_another_server()


@pytest.mark.parametrize(
    ("allow", "words"), [(False, "Attached read-only"), (True, "with reversible changes")]
)
def test_what_a_verdict_cannot_vouch_for_is_the_runtimes_to_say(allow: bool, words: str) -> None:
    (told,) = Attachment("http://127.0.0.1:1", allow_changes=allow).caveats
    assert words in told
    (told,) = registry.choose("process").caveats
    assert "No container" in told
    assert registry.choose("docker").caveats == ()
    assert registry.choose("auto").caveats == ()


# --- the same through xdist -----------------------------------------------------------------------


class Asked:
    """Answers a worker's questions in this process."""

    def __init__(self, owner: ServerOwner) -> None:
        self._answers = owner.answers()

    def ask(self, question: str, *arguments: Any, timeout: float | None = 0.0) -> Any:
        del timeout
        return self._answers[question](*arguments)


@pytest.mark.parametrize("shares", [True, False])
def test_a_worker_knows_of_the_shared_server_what_its_owner_knows(
    tmp_path: Path, shares: bool
) -> None:
    # A worker took each server for one that reads this machine's files.
    folder = SharedFolder.parse(f"{tmp_path}:/inside") if shares else None
    with served() as http:
        owner = ServerOwner()
        threading.Thread(target=owner.work, daemon=True).start()
        owner.configure(ServerSpec(), Attachment(http.url, shared=folder))
        running = RemoteServer(owner.handle(), Asked(owner))  # type: ignore[arg-type]
        assert not running.owned
        assert not running.may_change
        assert running.cores() == []
        assert (running.why_no_files() is None) is shares
        assert running.shared_folder is None
        assert "xdist" in str(running.why_no_sidecar())
        with pytest.raises(EngineError, match="No sidecar can be started: the workers of"):
            running.start_sidecar("")
        if shares:
            assert str(running.share(tmp_path / "x")) == "/inside/x"
        running.end()
        assert owner.close() == []


# --- connections to the engine --------------------------------------------------------------------


class Connection(FakeDocker):
    """One client of an engine that has every image."""

    def __init__(self) -> None:
        super().__init__()
        self.api = SimpleNamespace(headers={})
        self.images = SimpleNamespace(get=lambda _: SimpleNamespace(labels={}))


def test_a_server_in_a_container_has_one_connection_to_the_engine_and_closes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Testcontainers' own was never closed.
    made: list[Connection] = []

    def connect(**_: Any) -> Connection:
        made.append(Connection())
        return made[-1]

    monkeypatch.setattr(docker, "from_env", connect)
    server = SGLangServerContainer(ServerSpec(), model=None, image="image", device="cpu")
    server.end()
    assert [each.closed for each in made] == [1]


# --- compose --------------------------------------------------------------------------------------


def project(tmp_path: Path, compose: str, within: float) -> Project:
    """A project of a stand-in for compose, which is a shell script."""
    script = tmp_path / "compose"
    script.write_text(f"#!/bin/sh\n{compose}\n")
    script.chmod(0o755)
    file = tmp_path / "compose.yaml"
    file.touch()
    return Project(
        [file], name="x", command=[str(script)], services=["a"], environment={"KEY": "secret"},
        within=within,
    )  # fmt: skip


def test_compose_that_hangs_is_ended_and_told_with_what_it_waited_for(tmp_path: Path) -> None:
    slow = project(tmp_path, "echo 'a Pulling' >&2; sleep 60", within=0.5)
    with pytest.raises(EngineError, match=r"took longer than 0\.5 s: a Pulling") as caught:
        slow.start()
    assert "'compose " in caught.value.message
    assert "pulled" in caught.value.advice


def test_composes_answers_and_failures_are_read(tmp_path: Path) -> None:
    right = project(tmp_path, """echo '{"services":'; echo '{"a": {}}}'; echo noise >&2""", 30)
    assert right.described() == {"services": {"a": {}}}
    knows = project(tmp_path, """echo "{\\"key\\": \\"$KEY\\"}" """, 30)
    assert knows.described() == {"key": "secret"}
    wrong = project(tmp_path, "echo first >&2; echo 'no such service.' >&2; exit 1", 30)
    with pytest.raises(EngineError, match=r"Compose failed: no such service\.$"):
        wrong.described()
    silent = project(tmp_path, "exit 1", 30)
    with pytest.raises(EngineError, match="it wrote nothing"):
        silent.described()


# --- what is ordered ------------------------------------------------------------------------------


class Recorder:
    """A runtime that keeps what it is ordered, and makes nothing."""

    name = "recorder"
    starts = True
    decides_gpus = False
    decides_model = False
    caveats: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def for_another_server(self) -> Recorder:
        return self

    def keeping_parents(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, order: Order) -> Running:
        self.orders.append(order)
        raise EngineError("no more than the order")


def test_a_model_is_located_once_whichever_runtime_it_turns_out_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    located: list[str] = []

    def locate(name: str, _: Any) -> Path:
        located.append(name)
        return tmp_path

    recorder = Recorder()
    monkeypatch.setattr(checkpoint, "locate", locate)
    monkeypatch.setattr(registry.AutoRuntime, "_decide", lambda *_: recorder)
    with pytest.raises(EngineError, match="no more than the order"):
        Server.start(ServerSpec(model="it"), runtime=registry.choose("auto"), run_id="r", held=True)
    assert located == ["it"]
    (order,) = recorder.orders
    assert (order.model, order.run_id, order.held) == (tmp_path, "r", True)


# --- preparing ------------------------------------------------------------------------------------


def test_an_attachment_asks_with_its_key_and_takes_the_model_that_was_named() -> None:
    asked: list[Any] = []

    def identify(url: str, key: str | None) -> Introduction:
        asked.append((url, key))
        return Introduction("0.5.23", "/there", "gpu")

    named = Path("/here/model")
    order = Order(ServerSpec(model="x"), model=named, run_id="r", identify=identify)
    running = Attachment("http://127.0.0.1:1", api_key="k").prepare(order)
    assert asked == [("http://127.0.0.1:1", "k")]
    assert (running.model, running.model_path(), running.device) == (named, "/there", "gpu")
    running.end()
