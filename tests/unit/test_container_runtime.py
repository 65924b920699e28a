"""A server in a container: how its end is noticed, and how it is torn down when things fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import docker
import pytest
import requests
from fake_docker import FakeDocker, FakeThing, refusal

from sglang_harness.errors import EngineError, Interrupted
from sglang_harness.runtime import container as container_module
from sglang_harness.runtime import engine as engine_module
from sglang_harness.runtime.attached import AttachedContainer
from sglang_harness.runtime.compose import ComposeServer
from sglang_harness.runtime.container import RunningContainer
from sglang_harness.runtime.death import Death, DeathWatch, Unknown
from sglang_harness.spec import ServerSpec

UNREACHABLE = requests.exceptions.ConnectionError("connection refused")


class InContainer(RunningContainer):
    """A server in a container of a fake engine, with a folder and a volume of its own."""

    def __init__(self, engine: FakeDocker, folder: Path) -> None:
        self.spec = ServerSpec()
        self.image = "image"
        self.api_key = "the-key"
        self.device = "cpu"
        self.run_id = "run"
        self.fake = engine
        self.made: FakeThing = engine.containers.create("image", name="server")
        self.__dict__["_engine"] = engine
        self._container = self.made  # type: ignore[assignment]
        self._temporary = engine.volumes.create(name="server-tmp")
        self.folder = folder
        self.folder.mkdir()

    def _clear_away(self) -> list[str]:
        if self.folder.exists():
            self.folder.rmdir()
        return []

    def look(self) -> Death | Unknown:
        return self._wait_for_death()


class Sidecar:
    """One that says what it left, or fails."""

    name = "peer"

    def __init__(self, end: Callable[[], list[str]]) -> None:
        self.end = end


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    made = FakeDocker()
    monkeypatch.setattr(docker, "from_env", lambda **_: made)
    monkeypatch.setattr(container_module, "LOOK_AGAIN", 0.01)
    return made


@pytest.fixture
def server(engine: FakeDocker, tmp_path: Path) -> InContainer:
    return InContainer(engine, tmp_path / "exchange")


# --- how its end is noticed -----------------------------------------------------------------------


def test_a_container_that_ended_by_itself_is_a_death(server: InContainer):
    server.made.attrs["State"] |= {"ExitCode": 137, "OOMKilled": True}
    death = server.look()
    assert isinstance(death, Death)
    assert (death.exit_code, death.out_of_memory) == (137, True)
    assert death.last_words == ("a line", "the last line")


def test_an_engine_that_says_nothing_of_memory_is_read_all_the_same(server: InContainer):
    del server.made.attrs["State"]["OOMKilled"]
    del server.made.attrs["State"]["FinishedAt"]
    death = server.look()
    assert isinstance(death, Death)
    assert (death.exit_code, death.noticed_after) == (0, None)


@pytest.mark.parametrize("call", ["containers.get", "container.wait", "container.logs"])
def test_a_container_that_was_removed_from_outside_is_not_a_death(server: InContainer, call: str):
    server.fake.refuses[call] = refusal(404, "No such container")
    assert server.look() == Unknown("its container was removed from outside this run")


def test_a_container_that_is_killed_in_order_to_be_removed_is_not_a_death(server: InContainer):
    server.made.attrs["State"] |= {"ExitCode": 137, "Status": "removing"}
    assert server.look() == Unknown("its container was removed from outside this run")


@pytest.mark.parametrize("error", [UNREACHABLE, refusal(500, "daemon is shutting down")])
@pytest.mark.parametrize("call", ["containers.get", "container.reload", "container.logs"])
def test_an_engine_that_fails_is_not_a_death_of_the_server(
    server: InContainer, call: str, error: BaseException
):
    server.fake.refuses[call] = error
    if call == "container.reload":
        server.fake.waits_cut = 1
    seen = server.look()
    assert isinstance(seen, Unknown)
    assert seen.reason.startswith("the Docker engine stopped answering")


def test_a_wait_whose_connection_is_cut_is_begun_again(server: InContainer):
    server.fake.waits_cut = 2
    assert isinstance(server.look(), Death)
    assert server.fake.calls.count("container.wait") == 3


def test_the_watchs_own_connection_to_the_engine_is_closed(server: InContainer):
    server.look()
    assert server.fake.closed == 1


# --- how it is torn down --------------------------------------------------------------------------


def everything_is_gone(server: InContainer) -> bool:
    return server.fake.names() == [] and not server.folder.exists()


def test_an_end_removes_everything_and_says_how_the_server_ended(server: InContainer):
    server.made.attrs["State"]["ExitCode"] = 7
    assert server.end() == 7
    assert everything_is_gone(server)
    assert (server._failures, server.logs()) == ([], "a line\nthe last line")
    assert server.fake.closed == 1
    assert server.end() == 7


@pytest.mark.parametrize(
    "error",
    [
        refusal(404, "No such container"),
        refusal(409, "removal of container server is already in progress"),
    ],
)
@pytest.mark.parametrize("call", ["container.stop", "container.remove", "volume.remove"])
def test_what_is_going_already_is_not_a_failure(
    server: InContainer, call: str, error: BaseException
):
    server.fake.refuses[call] = error
    server.end()
    assert server._failures == []
    assert not server.folder.exists()


@pytest.mark.parametrize("error", [refusal(500, "driver failed"), UNREACHABLE, ValueError("bug")])
@pytest.mark.parametrize(
    ("call", "stays"),
    [
        ("container.stop", []),
        ("container.logs", []),
        ("container.remove", ["container server"]),
        ("volume.remove", ["volume server-tmp"]),
    ],
)
def test_a_step_that_fails_is_told_and_skips_none_of_the_others(
    server: InContainer, call: str, stays: list[str], error: BaseException
):
    server.fake.refuses[call] = error
    server.end()
    assert server.fake.names() == stays
    assert not server.folder.exists()
    (told,) = server._failures
    assert str(error) in told


def test_a_sidecar_that_fails_keeps_the_server_from_nothing(server: InContainer):
    def fails() -> list[str]:
        raise requests.exceptions.ReadTimeout("timed out")

    server._beside.append(Sidecar(lambda: ["container peer"]))  # type: ignore[arg-type]
    server._beside.append(Sidecar(fails))  # type: ignore[arg-type]
    server.end()
    assert everything_is_gone(server)
    assert server._failures == ["sidecar peer: ReadTimeout: timed out", "container peer"]


def test_an_interrupted_end_removes_everything_before_it_is_over(server: InContainer):
    server.fake.refuses["container.stop"] = Interrupted(15)
    with pytest.raises(Interrupted):
        server.end()
    assert everything_is_gone(server)


def test_an_end_is_expected_unless_the_server_was_dead_already(server: InContainer):
    never = threading.Event()
    server._watch = DeathWatch(lambda: never.wait() and Death(0, False, "", "", ()))  # type: ignore[arg-type,return-value]
    server.end()
    assert server._watch.expected
    never.set()


@pytest.mark.parametrize("fails", ["down", "list"])
def test_a_compose_project_that_cannot_be_taken_down_keeps_no_folder(
    engine: FakeDocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
):
    def refused() -> None:
        raise EngineError("Compose failed: no such service")

    monkeypatch.setattr(engine_module, "connect", lambda **_: engine)
    server = ComposeServer(
        ServerSpec(), file=tmp_path / "compose.yaml", service="sglang", command=["true"],
        device="cpu", image="image", model=None, additions={}, made={"services": ["sglang"]},
        environment={"SGLANG_API_KEY": "key"}, arguments={}, run_id="run", held=False,
    )  # fmt: skip
    monkeypatch.setattr(server._project, "down", refused if fails == "down" else lambda: None)
    volume = engine.volumes.create(name=f"{server.name}-tmp", labels={"org.sglang-harness": "1"})
    volume.attrs["Labels"] = volume.labels
    if fails == "list":
        engine.refuses["volumes.list"] = UNREACHABLE
    server.end()
    assert not server.reach.folder.exists()
    assert ("volume" in "".join(engine.names())) == (fails == "list")
    (told,) = server._failures
    assert "failed" in told or "refused" in told


# --- sidecars -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [UNREACHABLE, refusal(409, "name in use"), Interrupted(2)],
    ids=["unreachable", "refused", "interrupted"],
)
@pytest.mark.parametrize("call", ["containers.create", "attach_socket", "container.start"])
def test_a_sidecar_that_cannot_be_started_leaves_nothing(
    engine: FakeDocker, call: str, error: BaseException
):
    engine.refuses[call] = error
    expected = Interrupted if isinstance(error, Interrupted) else Exception
    with pytest.raises(expected):
        AttachedContainer("The peer", "peer", image="image")
    assert engine.names() == []
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (refusal(404, "No such container"), []),
        (refusal(409, "removal of container peer is already in progress"), []),
        (UNREACHABLE, ["container peer: ConnectionError: connection refused"]),
    ],
)
def test_a_sidecars_end_tells_what_failed_and_closes_its_connection(
    engine: FakeDocker, error: BaseException, told: list[str]
):
    beside = AttachedContainer("The peer", "peer", image="image")
    engine.refuses["container.remove"] = error
    engine.containers.there.clear()
    assert beside.end() == told
    assert engine.closed == 1
