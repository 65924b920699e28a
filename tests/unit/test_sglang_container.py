"""SGLangContainer beside Testcontainers' own: every builder adds, or is refused by name."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_docker import FakeDocker, refusal
from testcontainers.core import container as testcontainers_module
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from sglang_harness import ServerSpec, SGLangContainer
from sglang_harness import container as container_module
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.runtime import container as running_module
from sglang_harness.runtime.container import PORT

Made = dict[str, Any]


class FakeClient(DockerClient):
    """Testcontainers' own client, of a fake engine."""

    def __init__(self, engine: FakeDocker) -> None:
        self.client = engine

    def find_host_network(self) -> str | None:
        return None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    made = FakeDocker()
    for module in (testcontainers_module, running_module):
        monkeypatch.setattr(module, "DockerClient", lambda **_: FakeClient(made))
    # Its reaper would be a container of the fake engine, too.
    monkeypatch.setattr(testcontainers_config, "ryuk_disabled", True)
    monkeypatch.setattr(container_module, "prepare", lambda *_: ("cpu", "image"))
    return made


@pytest.fixture
def sglang(engine: FakeDocker) -> SGLangContainer:
    del engine
    limits = {"request": 7.0, "start": 11.0}
    return SGLangContainer(ServerSpec.make(model="owner/name", model_mount="bind", limits=limits))


def made_of(sglang: SGLangContainer) -> Made:
    """How the container was made, as the engine was told."""
    sglang.create()
    try:
        (container,) = sglang.get_docker_client().client.containers.there
        return container.how  # type: ignore[attr-defined,no-any-return]
    finally:
        sglang.end()


def a_network() -> Any:
    return SimpleNamespace(name="trainers")


def with_env_file(sglang: SGLangContainer, tmp_path: Path) -> SGLangContainer:
    file = tmp_path / "variables"
    file.write_text("FROM_A_FILE=1\n")
    return sglang.with_env_file(file)


def ports(made: Made) -> dict[str, Any]:
    return dict(made["ports"])


#: What each builder is given, and what has to be true of the container then.
BUILDERS: dict[
    str, tuple[Callable[[SGLangContainer, Path], object], Callable[[Made, SGLangContainer], bool]]
] = {
    "with_env": (
        lambda c, _: c.with_env("A", "1"),
        lambda made, c: made["environment"]["A"] == "1",
    ),
    "with_envs": (
        lambda c, _: c.with_envs(A="1", B="2"),
        lambda made, c: made["environment"]["B"] == "2",
    ),
    "with_env_file": (
        with_env_file,
        lambda made, c: made["environment"]["FROM_A_FILE"] == "1",
    ),
    "with_bind_ports": (
        lambda c, _: c.with_bind_ports("9000/udp", 9001).with_bind_ports(PORT, 8000),
        lambda made, c: (
            ports(made)["9000/udp"] == ("127.0.0.1", 9001)
            and ports(made)[f"{PORT}/tcp"] == ("127.0.0.1", 8000)
            and len(ports(made)) == 2
        ),
    ),
    "with_exposed_ports": (
        lambda c, _: c.with_exposed_ports(9000, "9001/udp", PORT),
        lambda made, c: (
            ports(made)
            == {
                "9000/tcp": ("127.0.0.1", None),
                "9001/udp": ("127.0.0.1", None),
                f"{PORT}/tcp": ("127.0.0.1", None),
            }
        ),
    ),
    "with_network": (
        lambda c, _: c.with_network(a_network()),
        lambda made, c: made["network"] == "trainers",
    ),
    "with_network_aliases": (
        lambda c, _: c.with_network(a_network()).with_network_aliases("sglang", "server"),
        lambda made, c: made["networking_config"]["trainers"]["Aliases"] == ["sglang", "server"],
    ),
    "with_kwargs": (
        lambda c, _: c.with_kwargs(hostname="sglang").with_kwargs(cpu_count=2),
        lambda made, c: (made["hostname"], made["cpu_count"]) == ("sglang", 2),
    ),
    "maybe_emulate_amd64": (
        lambda c, _: c.maybe_emulate_amd64(),
        lambda made, c: made.get("platform") in (None, "linux/amd64"),
    ),
    "with_name": (
        lambda c, _: c.with_name("mine"),
        lambda made, c: c._name == "mine",
    ),
    "with_volume_mapping": (
        lambda c, _: c.with_volume_mapping("/data", "/inside").with_volume_mapping(
            "/x", "/y", "rw"
        ),
        lambda made, c: (
            made["volumes"]
            == {"/data": {"bind": "/inside", "mode": "ro"}, "/x": {"bind": "/y", "mode": "rw"}}
        ),
    ),
    "with_tmpfs_mount": (
        lambda c, _: c.with_tmpfs_mount("/scratch", "256m").with_tmpfs_mount("/more"),
        lambda made, c: (made["tmpfs"]["/scratch"], made["tmpfs"]["/more"]) == ("size=256m", ""),
    ),
    "with_copy_into_container": (
        lambda c, _: c.with_copy_into_container(b"text", "/etc/a-file"),
        lambda made, c: not made["read_only"],
    ),
    "waiting_for": (
        lambda c, _: c.waiting_for(SimpleNamespace()),  # type: ignore[arg-type]
        lambda made, c: c._answers.then is not None and c._wait_strategy is c._answers,
    ),
}

#: Builders that are refused by name, with what the advice has to say.
REFUSED: dict[str, tuple[Callable[[SGLangContainer], object], str]] = {
    "with_command": (lambda c: c.with_command(["--tp-size", "2"]), "server_args"),
}


def test_every_builder_of_testcontainers_is_decided_here():
    """A new one in a later version of Testcontainers fails this until it is honoured or refused."""
    theirs = {
        name
        for name in dir(DockerContainer)
        if name.startswith(("with_", "waiting_", "maybe_"))
        and callable(getattr(DockerContainer, name))
    }
    assert theirs == BUILDERS.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builder_reaches_the_engine_and_takes_nothing_away(
    sglang: SGLangContainer, name: str, tmp_path: Path
):
    build, arrived = BUILDERS[name]
    build(sglang, tmp_path)
    made = made_of(sglang)
    assert arrived(made, sglang)
    # What the server needs whatever else is asked for.
    assert made["entrypoint"][0] == "python3"
    assert made["init"] is True
    assert made["ipc_mode"] == "shareable"
    assert made["pids_limit"] == 4096
    assert made["security_opt"] == ["no-new-privileges:true"]
    assert made["labels"]["org.sglang-harness.run"] == sglang.run_id
    assert f"{PORT}/tcp" in made["ports"]
    assert "/tmp" in made["tmpfs"]
    assert {"/exchange", "/sglang-harness-tmp"} <= {m["Target"] for m in made["mounts"]}
    assert made["environment"]["SGLANG_API_KEY"] == sglang.api_key
    assert "--model-path" in made["command"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_builder_that_would_take_the_server_apart_is_refused_by_name(
    sglang: SGLangContainer, name: str
):
    build, advice = REFUSED[name]
    with pytest.raises(SpecError, match=name) as refused:
        build(sglang)
    assert advice in refused.value.advice


def test_without_builders_the_root_is_read_only(sglang: SGLangContainer):
    made = made_of(sglang)
    assert made["read_only"] is True
    assert "network" not in made
    assert made["volumes"] == {}


def test_kwargs_are_added_to_lists_and_labels_and_replace_other_values(sglang: SGLangContainer):
    ours = dict(sglang._kwargs)
    sglang.with_kwargs(
        security_opt=["seccomp=unconfined"],
        labels={"theirs": "1", "org.sglang-harness.run": "another"},
        shm_size="2g",
        mounts=[{"Target": "/theirs"}],
    )
    made = made_of(sglang)
    assert made["security_opt"] == [*ours["security_opt"], "seccomp=unconfined"]
    assert made["labels"].items() >= {**ours["labels"], "theirs": "1"}.items()
    assert made["shm_size"] == "2g"
    assert "/theirs" in {m["Target"] for m in made["mounts"]}


@pytest.mark.parametrize("name", sorted(container_module.REFUSED_KWARGS))
def test_an_argument_that_the_server_depends_on_is_refused_by_name(
    sglang: SGLangContainer, name: str
):
    with pytest.raises(SpecError, match=rf"with_kwargs\({name}=") as refused:
        sglang.with_kwargs(**{name: "anything"})
    assert refused.value.advice


def test_aliases_without_a_network_are_refused_before_anything_is_made(
    sglang: SGLangContainer, engine: FakeDocker
):
    with pytest.raises(SpecError, match="without with_network"):
        sglang.with_network_aliases("sglang").start()
    assert engine.names() == []


def test_files_are_there_before_the_server_starts(
    sglang: SGLangContainer, engine: FakeDocker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        container_module.AnswersGeneration, "wait_until_ready", lambda self, container: None
    )
    sglang.with_copy_into_container(b"text", "/etc/a-file", 0o600).start()
    assert engine.calls.index("container.put_archive") < engine.calls.index("container.start")
    (container,) = engine.containers.there
    with tarfile.open(fileobj=BytesIO(container.archives["/"])) as tar:
        assert [(m.name, m.mode) for m in tar.getmembers()] == [("/etc/a-file", 0o600)]
    sglang.stop()
    assert engine.names() == []


def test_a_file_that_the_engine_does_not_take_leaves_nothing(
    sglang: SGLangContainer, engine: FakeDocker
):
    engine.refuses["container.put_archive"] = refusal(500, "no space left")
    with pytest.raises(EngineError, match="no space left"):
        sglang.with_copy_into_container(b"text", "/etc/a-file").start()
    assert engine.names() == []


def test_another_strategy_is_waited_for_once_a_token_was_generated(
    sglang: SGLangContainer, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    monkeypatch.setattr(
        container_module, "wait_until_ready", lambda *_, **__: order.append("generated")
    )
    monkeypatch.setattr(SGLangContainer, "address", "http://127.0.0.1:1")
    monkeypatch.setattr(SGLangContainer, "watch", None)
    theirs = SimpleNamespace(wait_until_ready=lambda _: order.append("theirs"))
    sglang.waiting_for(theirs)  # type: ignore[arg-type]
    sglang._answers.wait_until_ready(sglang)
    assert order == ["generated", "theirs"]


def test_its_client_has_the_limits_of_the_spec_and_is_closed(
    sglang: SGLangContainer, engine: FakeDocker, monkeypatch: pytest.MonkeyPatch
):
    given: dict[str, Any] = {}
    closed: list[bool] = []

    class Transport:
        def __init__(self, address: str, **how: Any) -> None:
            given.update(how, address=address)

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(container_module, "RequestsTransport", Transport)
    monkeypatch.setattr(SGLangContainer, "address", "http://127.0.0.1:1")
    monkeypatch.setattr(SGLangContainer, "watch", None)
    assert sglang.client is sglang.client
    assert given["read_timeout"] == 7.0
    assert (sglang.client._timeout, sglang.client._cleanup) == (7.0, 11.0)
    sglang._watch = None
    sglang.end()
    assert closed == [True]
    assert engine.closed == 1


def test_a_key_of_the_users_own_is_the_clients_too(
    sglang: SGLangContainer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        container_module.AnswersGeneration, "wait_until_ready", lambda self, container: None
    )
    sglang.with_env("SGLANG_API_KEY", "theirs").start()
    try:
        assert sglang.api_key == "theirs"
    finally:
        sglang.stop()
