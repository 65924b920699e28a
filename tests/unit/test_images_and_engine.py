"""Images by name, an engine that answers or does not, and whose things are whose."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest
from fake_docker import refusal
from scripted_server import BOUND, Answer, ScriptedServer

from sglang_harness._base import assets, bounded
from sglang_harness._base.signals import interruptions
from sglang_harness.errors import EngineError, ImageError, Interrupted, SpecError
from sglang_harness.runtime import engine, images
from sglang_harness.runtime.device import choose, engine_gives_gpus, gpus
from sglang_harness.runtime.engine import Owner, seconds_since
from sglang_harness.spec import ServerSpec

# --- owners -------------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """Another process, alive until its input is closed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def owner_of(process: subprocess.Popen[bytes]) -> Owner:
    started = int(psutil.Process(process.pid).create_time())
    return Owner(socket.gethostname(), process.pid, started)


@pytest.mark.parametrize(
    "owner",
    [
        Owner.this_process(),
        Owner("a-host.with-dots", 1, 0),
        Owner("fe80::1:2", 4194304, 1795445366),
        Owner("", 7, 8),
    ],
)
def test_an_owner_survives_its_way_through_a_label(owner: Owner):
    assert Owner.parse(str(owner)) == owner


@pytest.mark.parametrize("text", ["", "host", "host:1", "host:a:1", "host:1:b", "host:1:", "::"])
def test_a_label_that_is_no_owner_is_nobody(text: str):
    assert Owner.parse(text) is None


def test_whoever_asks_is_not_gone():
    assert not Owner.this_process().is_gone()


def test_a_process_that_lives_is_not_gone_and_one_that_ended_is(child: subprocess.Popen[bytes]):
    owner = owner_of(child)
    assert not owner.is_gone()
    child.kill()
    child.wait(BOUND)
    assert owner.is_gone()


def test_a_process_number_that_somebody_else_has_now_is_told_by_its_start(
    child: subprocess.Popen[bytes],
):
    now = owner_of(child)
    earlier = Owner(now.host, now.pid, now.started - 3600)
    assert earlier.is_gone()
    # Clocks are read to the second: that much apart is the same process.
    assert not Owner(now.host, now.pid, now.started - 1).is_gone()


def test_nobody_can_tell_here_whether_a_process_of_another_host_lives(
    child: subprocess.Popen[bytes],
):
    there = Owner("another-host", child.pid, 1)
    child.kill()
    child.wait(BOUND)
    assert not there.is_gone()


def test_a_killed_run_that_nobody_has_buried_is_gone_too(child: subprocess.Popen[bytes]):
    owner = owner_of(child)
    child.kill()
    end = time.monotonic() + BOUND
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert owner.is_gone()


def test_a_label_with_an_impossible_process_does_not_stop_a_sweep():
    owner = Owner.parse(f"{socket.gethostname()}:-1:0")
    assert owner is None or owner.is_gone()


def test_what_is_made_here_is_marked_as_this_processes():
    marks = engine.labels("run-1")
    assert marks[engine.LABEL_RUN] == "run-1"
    assert Owner.parse(marks[engine.LABEL_OWNER]) == Owner.this_process()
    # Labels are strings to the engine.
    assert all(isinstance(value, str) for value in marks.values())


# --- the engine's clock -------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", ["", ".5", ".123456", ".123456789"])
def test_the_engines_times_are_read_to_their_nanoseconds(fraction: str):
    then = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(seconds=100)
    text = then.strftime("%Y-%m-%dT%H:%M:%S") + fraction + "Z"
    passed = seconds_since(text)
    assert passed is not None
    now = datetime.now(timezone.utc).timestamp()
    assert passed == pytest.approx(now - then.timestamp() - float(f"0{fraction}"), abs=0.2)


@pytest.mark.parametrize("text", ["", "0001-01-01T00:00:00Z"])
def test_a_time_that_never_was_is_none(text: str):
    # As the engine writes 'FinishedAt' of a container that runs.
    assert seconds_since(text) is None


def test_a_time_with_an_offset_is_the_same_moment():
    then = datetime.now(timezone(timedelta(hours=2))) - timedelta(seconds=100)
    text = then.strftime("%Y-%m-%dT%H:%M:%S.%f") + "+02:00"
    assert seconds_since(text) == pytest.approx(100, abs=1)


# --- an engine that answers, or does not --------------------------------------------------------


def refused_at(monkeypatch: pytest.MonkeyPatch, where: str) -> EngineError:
    monkeypatch.setenv("DOCKER_HOST", where)
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        engine.connect(timeout=5)
    assert time.monotonic() - began < 5
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.advice
    return caught.value


def test_an_engine_that_is_not_there_is_told_with_the_place_that_was_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with ScriptedServer({}, listening=False) as dead:
        refused_at(monkeypatch, f"tcp://127.0.0.1:{dead.port}")
    refused_at(monkeypatch, f"unix://{tmp_path}/none.sock")
    (tmp_path / "file.sock").touch()
    refused_at(monkeypatch, f"unix://{tmp_path}/file.sock")
    refused_at(monkeypatch, "gopher://somewhere")


def test_something_else_that_answers_there_is_no_engine(monkeypatch: pytest.MonkeyPatch):
    with ScriptedServer({}) as web:
        refused_at(monkeypatch, f"tcp://127.0.0.1:{web.port}")


@pytest.mark.parametrize(
    ("where", "remote"),
    [
        (None, False),
        ("unix:///var/run/docker.sock", False),
        ("tcp://10.0.0.5:2376", True),
        ("ssh://me@gpu-box", True),
    ],
)
def test_an_engine_elsewhere_is_known_by_its_address(
    monkeypatch: pytest.MonkeyPatch, where: str | None, remote: bool
):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    if where is not None:
        monkeypatch.setenv("DOCKER_HOST", where)
    assert engine.is_remote() is remote


# --- names of images ----------------------------------------------------------------------------

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Without a tag the engine would pull every tag that there is.
        ("sglang", ("sglang", "latest")),
        ("lmsysorg/sglang", ("lmsysorg/sglang", "latest")),
        ("lmsysorg/sglang:v0.5.23", ("lmsysorg/sglang", "v0.5.23")),
        ("registry:5000/sglang", ("registry:5000/sglang", "latest")),
        ("registry:5000/team/sglang:v1", ("registry:5000/team/sglang", "v1")),
        (f"sglang@{DIGEST}", (f"sglang@{DIGEST}", None)),
        (f"registry:5000/sglang:v1@{DIGEST}", (f"registry:5000/sglang:v1@{DIGEST}", None)),
    ],
)
def test_a_name_is_taken_apart_as_the_engine_wants_it(name: str, expected: tuple[str, str | None]):
    assert images._repository_and_tag(name) == expected


# --- images, over the engine's real protocol ----------------------------------------------------


class Registry:
    """An engine that holds ``present`` and can pull ``pullable``, and nothing else."""

    def __init__(
        self,
        present: set[str],
        pullable: set[str],
        *,
        hold: threading.Event | None = None,
        fails: str = "",
    ) -> None:
        self._hold, self._fails = hold, fails
        self.pulled: list[str] = []
        self._present = set(present)
        self._pullable = pullable
        self.server = ScriptedServer({})
        self.server.script = _Routes(self._answer)
        self.client = docker.DockerClient(
            base_url=f"tcp://127.0.0.1:{self.server.port}", version="1.41", timeout=5
        )

    def _answer(self, seen: Any) -> Answer:
        path = seen.path.removeprefix("/v1.41")
        if path == "/images/create":
            asked = dict(part.split("=") for part in seen.query.split("&"))
            name = asked["fromImage"].replace("%2F", "/").replace("%3A", ":").replace("%40", "@")
            if "@" not in name:
                name += ":" + asked["tag"]
            self.pulled.append(name)
            if name not in self._pullable:
                words = f"manifest for {name} not found: manifest unknown"
                return Answer(404, {"message": words})
            self._present.add(name)
            return Answer(body={"status": "Pull complete"}, hold=self._hold)
        if self._fails:
            return Answer(500, {"message": self._fails})
        name = path.removeprefix("/images/").removesuffix("/json")
        if name in self._present:
            return Answer(body={"Id": DIGEST, "RepoTags": [name], "RepoDigests": []})
        return Answer(404, {"message": f"No such image: {name}"})

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()


class _Routes(dict[str, Any]):
    """A script that gives every route to one function."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self._answer = answer

    def get(self, key: str, default: Any = None) -> Any:
        return self._answer


NAME = "lmsysorg/sglang:v0.5.23"


def image_for(registry: Registry, **fields: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    name = images.for_spec(ServerSpec.make(**fields), "gpu", registry.client, said.append)
    return name, said


@pytest.mark.parametrize(
    ("pull", "present", "pulls"),
    [("missing", True, 0), ("never", True, 0), ("always", True, 1), ("missing", False, 1)],
)
def test_an_image_is_pulled_when_and_only_when_it_has_to_be(pull: str, present: bool, pulls: int):
    with Registry({NAME} if present else set(), {NAME}) as registry:
        name, said = image_for(registry, image=NAME, pull=pull)
        assert name == NAME
        assert registry.pulled == [NAME] * pulls
        assert said == [f"pulling {NAME}"] * pulls


def test_an_image_that_may_not_be_pulled_is_refused_without_trying():
    with Registry(set(), {NAME}) as registry:
        with pytest.raises(ImageError, match="pull is 'never'") as caught:
            image_for(registry, image=NAME, pull="never")
        assert registry.pulled == []
    assert f"docker pull {NAME}" in caught.value.advice


def test_an_image_that_is_nowhere_is_told_with_the_registrys_own_words():
    with Registry(set(), set()) as registry, pytest.raises(ImageError) as caught:
        image_for(registry, image="lmsysorg/sglang:v9.9.9")
    text = str(caught.value)
    assert "lmsysorg/sglang:v9.9.9" in text
    assert "manifest unknown" in text
    assert "\n" not in text


def test_a_gpu_without_a_wish_gets_the_pinned_image_or_that_of_a_version():
    pinned = assets.pins()["GPU_IMAGE"]
    other = "lmsysorg/sglang:v0.5.20"
    with Registry({pinned, other}, set()) as registry:
        assert image_for(registry)[0] == pinned
        assert image_for(registry, sglang_version="0.5.20")[0] == other


def test_a_pull_that_never_ends_is_told_within_the_runs_limit():
    never = threading.Event()
    with Registry(set(), {NAME}, hold=never) as registry:
        with pytest.raises(ImageError, match=r"was not pulled within 0\.5 s \(limits\.run\)"):
            image_for(registry, image=NAME, limits={"run": 0.5})
        never.set()


def test_an_engine_that_fails_is_not_an_engine_without_the_image():
    # It was taken for one, and the image was pulled.
    with Registry(set(), {NAME}, fails="driver failed") as registry:
        with pytest.raises(EngineError, match="driver failed"):
            image_for(registry, image=NAME)
        assert registry.pulled == []


# --- the engine's disk --------------------------------------------------------------------------


class Disks:
    """An engine that makes one container, or refuses, and shows a file in it, or does not."""

    def __init__(self, create: BaseException | None, show: BaseException | None) -> None:
        self.containers = self
        self.removed = 0
        self._create, self._show = create, show

    def create(self, *_: Any, **__: Any) -> Disks:
        if self._create is not None:
            raise self._create
        return self

    def get_archive(self, path: str) -> None:
        if self._show is not None:
            raise self._show

    def remove(self, **_: Any) -> None:
        self.removed += 1


NOT_THERE = 'invalid mount config for type "bind": bind source path does not exist: /x'


@pytest.mark.parametrize(
    ("create", "show", "sees"),
    [
        (None, None, True),
        (refusal(400, NOT_THERE), None, False),
        (refusal(500, "statfs /x: no such file or directory"), None, False),
        (refusal(500, "Mounts denied: the path /x is not shared from the host"), None, False),
        (None, refusal(404, "Could not find the file /probe/.probe-1 in container"), False),
    ],
)
def test_an_engine_sees_this_disk_or_says_why_not(
    tmp_path: Path, create: BaseException | None, show: BaseException | None, sees: bool
):
    client: Any = Disks(create, show)
    assert engine.sees_this_disk(client, "image", tmp_path) is sees
    assert client.removed == (create is None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("create", "show"),
    [
        (refusal(404, "No such image: image"), None),
        (refusal(500, "the disk is full"), None),
        (OSError("connection refused"), None),
        (None, refusal(500, "driver failed")),
        (None, refusal(404, "No such container: 1")),
    ],
)
def test_an_engine_that_fails_is_not_one_with_another_disk(
    tmp_path: Path, create: BaseException | None, show: BaseException | None
):
    # The model was then copied into a volume, without a word.
    client: Any = Disks(create, show)
    with pytest.raises(EngineError, match="could not be asked whether it sees the disk"):
        engine.sees_this_disk(client, "image", tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- building -----------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``build.sh`` lies; a test writes its own."""
    (tmp_path / "docker").mkdir()
    monkeypatch.setattr(assets, "root", lambda: tmp_path)
    return tmp_path / "docker" / "build.sh"


def test_a_built_image_is_named_by_the_last_line_of_its_script(script: Path):
    script.write_text('echo "base: making it"\necho noise\necho "tag-of-$1-by-$PYTHON"\n')
    said: list[str] = []
    tag = images.build_cpu_image("0.5.20", said.append)
    # The interpreter is this one: the script must not find another's pip.
    assert tag == f"tag-of-0.5.20-by-{sys.executable}"
    assert said == ["base: making it"]


def test_a_script_without_a_version_builds_the_pinned_one(script: Path):
    script.write_text('echo "$#"\n')
    assert images.build_cpu_image(None, lambda _: None) == "0"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("echo first\necho 'pip: no matching distribution' >&2\nexit 3\n", "no matching"),
        ("exit 1\n", "it wrote nothing"),
        ("exit 0\n", "it wrote nothing"),
    ],
)
def test_a_build_that_fails_is_told_with_its_last_words(script: Path, text: str, told: str):
    script.write_text(text)
    with pytest.raises(ImageError, match=told) as caught:
        images.build_cpu_image(None, lambda _: None)
    assert "build.log" in caught.value.advice
    assert "\n" not in str(caught.value)


def test_an_interrupted_build_takes_its_whole_family_with_it(script: Path):
    # pip and docker are children of the script; left alone they would go on for minutes.
    script.write_text("sleep 60 &\necho child: $!\nwait\n")
    children: list[int] = []

    def interrupt(line: str) -> None:
        children.append(int(line.split(": ")[1]))
        raise Stop

    with pytest.raises(Stop):
        images.build_cpu_image(None, interrupt)
    (child,) = children
    end = time.monotonic() + BOUND
    while lives(child):
        assert time.monotonic() < end, "the script's child goes on"
        time.sleep(0.02)


class Stop(BaseException):
    """An interruption."""


def test_an_interrupted_build_ends_what_has_a_process_group_of_its_own(script: Path):
    # 'timeout' makes one, so a signal to the script's group never reached the pull inside, and
    # the shell waits for its foreground child before it heeds SIGTERM.
    script.write_text("""timeout 60 sh -c 'echo "child: $$"; exec sleep 60' \n""")
    children: list[int] = []

    def interrupt(line: str) -> None:
        children.append(int(line.split(": ")[1]))
        raise Stop

    began = time.monotonic()
    with pytest.raises(Stop):
        images.build_cpu_image(None, interrupt)
    assert not lives(children[0])
    assert time.monotonic() - began < 30, "it did not wait for what the script waits for"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_build_within_seconds(
    script: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bounded, "ENDS_WITHIN", 0.5)
    # It ignores SIGTERM itself, and what it waits for is in a process group of its own.
    script.write_text("trap '' TERM\necho 'build: begun'\ntimeout 60 sleep 60\n")
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught, interruptions():
        images.build_cpu_image(None, lambda _: os.kill(os.getpid(), number))
    assert caught.value.signal_number == number
    assert time.monotonic() - began < 30


def test_an_interruption_after_the_script_has_ended_stays_the_interruption(script: Path):
    # Its process group is gone by then: ending it raised ProcessLookupError in place of Ctrl-C.
    script.write_text('echo "it: done"\n')

    def interrupt(line: str) -> None:
        time.sleep(0.2)
        raise Stop

    with pytest.raises(Stop):
        images.build_cpu_image(None, interrupt)


def test_a_build_that_hangs_is_ended_and_told(script: Path):
    script.write_text('echo "base: pulling it"\nsleep 60\n')
    with pytest.raises(ImageError, match=r"not built within 0\.5 s .*: base: pulling it") as caught:
        images.build_cpu_image(None, lambda _: None, within=0.5)
    assert "limits.run" in caught.value.advice


def test_what_a_build_leaves_running_does_not_hold_it_up(script: Path):
    script.write_text("sleep 30 &\necho tag\n")
    began = time.monotonic()
    assert images.build_cpu_image(None, lambda _: None) == "tag"
    assert time.monotonic() - began < 15


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- devices ------------------------------------------------------------------------------------

WITH_TOOLKIT = {"Runtimes": {"runc": {}, "nvidia": {}}}
WITH_CDI = {"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]}
WITHOUT = {"Runtimes": {"runc": {}}}


@pytest.mark.parametrize(
    ("info", "gives"),
    [
        (WITH_TOOLKIT, True),
        (WITH_CDI, True),
        (WITHOUT, False),
        ({}, False),
        ({"Runtimes": None}, 0),
    ],
)
def test_an_engine_says_itself_whether_it_hands_out_gpus(info: dict[str, Any], gives: bool):
    assert engine_gives_gpus(info) is bool(gives)


def test_without_a_gpu_auto_is_the_cpu_and_a_wish_for_one_is_refused():
    found, why_none = gpus()
    if found:
        pytest.skip(f"this machine has {len(found)} GPUs")
    assert choose(ServerSpec.make(), WITH_TOOLKIT) == "cpu"
    assert choose(ServerSpec.make(device="cpu"), WITH_TOOLKIT) == "cpu"
    # Never quietly on the CPU what was asked of a GPU.
    with pytest.raises(SpecError) as caught:
        choose(ServerSpec.make(device="gpu"), WITH_TOOLKIT)
    assert why_none in str(caught.value)
    assert "--device cpu" in caught.value.advice
