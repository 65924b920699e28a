"""Warm servers beside cold ones: the same server, its own death, and nothing left of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND_LIMIT, names_on_engine

from sglang_harness._base import paths
from sglang_harness._base.living import lives_as
from sglang_harness.checkpoint.made import tiny
from sglang_harness.errors import RequestFailed, ServerDied, ServerLost
from sglang_harness.runtime.death import Death
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.runtime.process import ProcessRuntime
from sglang_harness.runtime.warm import kept_parents
from sglang_harness.runtime.warm.server import WarmServer
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.checks.lora import lora_arguments

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.engine

#: SGLang looks after its children every second, and then waits: five seconds for a GPU to settle,
#: and where a scheduler is still there another sixty for its core dump (0.5.23, on a CPU too).
DIES_WITHIN = 90.0

GREEDY = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}


@pytest.fixture
def warm(warm_runtime: DockerRuntime) -> Callable[..., Server]:
    def start(**fields: Any) -> Server:
        spec = ServerSpec(**{"model": "tiny", **fields})
        server = Server.start(spec, runtime=warm_runtime)
        assert server.running.started.how == "warm"
        return server

    return start


def process_named(server: Server, part: str) -> int:
    """One of a server's processes, by the title that SGLang gives it."""
    found = []
    for pid in server.running.host_pids():
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        found.append((pid, title))
        if part in title:
            return pid
    raise AssertionError(f"no process is called {part}: {found}")


def death(server: Server) -> Death:
    died = server.running.watch.wait(DIES_WITHIN)
    assert died is not None, f"it had not ended after {DIES_WITHIN:g} s"
    return died


def parent_of(server: Server) -> Any:
    assert isinstance(server.running, WarmServer)
    return server.running._parent


def in_container(server: Server, code: str) -> str:
    done = (
        parent_of(server)
        ._engine.containers.get(server.about()["container"])
        .exec_run(["python3", "-c", code])
    )
    return str(done.output.decode())


def left(server: Server) -> tuple[set[str], set[str]]:
    """What lies in the parent's /dev/shm and in its folder for temporary files."""
    told = in_container(
        server,
        "import os, json; print(json.dumps([os.listdir('/dev/shm'), "
        "os.listdir('/sglang-harness-tmp')]))",
    )
    shm, temporary = json.loads(told)
    return set(shm), set(temporary)


# --- ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "killed",
    [
        "main",
        "sglang::scheduler",
        pytest.param("sglang::detokenizer", marks=pytest.mark.nightly),  # it takes over a minute
    ],
)
def test_a_killed_process_is_told_takes_its_server_along_and_nobody_else(
    warm: Callable[..., Server], killed: str
) -> None:
    with warm() as neighbour:
        before = left(neighbour)
        server = warm(model="tiny:3")
        try:
            pids = server.running.host_pids()
            assert len(pids) == 3, "the server, its scheduler and its detokenizer"
            assert left(neighbour)[1] - before[1], "it has files, or this proves nothing"
            victim = pids[0] if killed == "main" else process_named(server, killed)
            began = time.time()
            os.kill(victim, signal.SIGKILL)
            died = death(server)
            assert died.exit_code == 137
            assert not died.out_of_memory
            assert died.noticed_after is not None
            assert died.noticed_after < 1.0
            if killed == "main":
                assert time.time() - began < 1.0
            else:
                name = killed.removeprefix("sglang::")
                log = server.logs()
                assert re.search(rf"Subprocess {name}\S* .*crashed with exit code -9", log), log
            with pytest.raises(ServerDied):
                server.client.generate("Hello")
            assert "127.0.0.1" in neighbour.address
            answer = neighbour.client.generate("Hello", sampling=GREEDY)
            assert answer.completion_tokens == 16, "its neighbour goes on"
        finally:
            stopped = server.stop()
        assert stopped.left_behind == []
        assert stopped.exit_code == 137
        assert not any(lives_as(pid) for pid in pids)
        assert left(neighbour) == before, "no segment and no file of it"
        assert neighbour.running.watch.death is None


def test_a_killed_parent_is_told_as_that_and_everything_is_gone() -> None:
    runtime = DockerRuntime()
    with runtime.keeping_parents():
        spec = ServerSpec(model="tiny")
        one, two = (Server.start(spec, runtime=runtime) for _ in range(2))
        pids = [*one.running.host_pids(), *two.running.host_pids()]
        parent = parent_of(one)
        (main,) = parent.host_pids([parent.preloaded.about["pid"]])
        os.kill(main, signal.SIGKILL)
        began = time.monotonic()
        for server in (one, two):
            # Not a death of the server: the parent is the harness's own.
            with pytest.raises(ServerLost, match="preloaded parent ended"):
                death(server)
            assert time.monotonic() - began < DIES_WITHIN
            with pytest.raises(ServerLost):
                server.client.generate("Hello")
            assert server.stop().left_behind == []
        assert not any(lives_as(pid) for pid in pids)
        # The next one has another parent.
        with Server.start(spec, runtime=runtime) as third:
            assert third.running.started.how == "warm"
            assert third.about()["container"] != parent.name
    assert parent.name not in names_on_engine()
    assert not parent.folders.root.exists()


def test_asked_to_end_it_ends_well_and_a_start_that_fails_harms_nobody(
    warm: Callable[..., Server],
) -> None:
    with warm() as neighbour:
        before = left(neighbour)
        server = warm()
        stopped = server.stop()
        assert (stopped.exit_code, stopped.left_behind) == (0, [])
        with pytest.raises(ServerDied) as died:
            warm(server_args={"no-such-flag": "1"})
        assert "does not know a flag" in died.value.death.cause
        assert died.value.death.exit_code == 2
        assert left(neighbour) == before
        assert neighbour.client.generate("Hello", sampling=GREEDY).completion_tokens == 16


def test_each_has_its_own_log_memory_weights_and_peer(warm: Callable[..., Server]) -> None:
    with warm() as one, warm(model="tiny:7") as two:
        one.client.generate("only of one", sampling={"max_new_tokens": 1}, timeout=60)
        assert one.running.api_key != two.running.api_key
        assert str(one.running.api_key) in one.running.logs(), "SGLang prints its key"
        assert str(one.running.api_key) not in two.running.logs()
        assert one.model is not None
        assert two.client.model_info()["model_path"] != one.client.model_info()["model_path"]
        for server in (one, two):
            (reading,) = server.memory.mark("here")
            assert reading.source == "proportional share"
            assert 100 << 20 < reading.used_bytes < 2 << 30
        first = two.client.checksums()
        report = one.weights.push(tiny.folder(7), route="shared-memory")
        assert report.outcome == "good", str(report)
        assert one.client.checksums().engine == first.engine, "now they serve the same"
        one.weights.push(tiny.folder(9), route="distributed")
        assert two.client.checksums() == first, "a push reaches one of them"
        assert one.stop().left_behind == []


# --- the same as cold ---------------------------------------------------------------------------

#: What may differ between two starts of one server, cold or warm: addresses and times.
DIFFERS = re.compile(
    r"port|time|url|api_key|launch_command|instance_id|uptime|last_|random_seed|pid"
)


def plain(told: Any, ports: set[str]) -> Any:
    """A server's own account of itself without what differs between any two starts: addresses,
    times, and the order of what SGLang keeps in sets."""
    if isinstance(told, dict):
        return {
            name: plain(value, ports)
            for name, value in told.items()
            if not DIFFERS.search(name) and name not in ("internal_states", "memory_usage")
        }
    if isinstance(told, list):
        return sorted((plain(value, ports) for value in told), key=repr)
    if isinstance(told, str):
        for port in ports:
            told = told.replace(port, "PORT")
    return told


def ports_in(info: dict[str, Any]) -> set[str]:
    return {
        str(v) for name, v in info.items() if "port" in name and isinstance(v, int) and v > 1024
    }


@contextmanager
def one_of(how: str, runtime: Any, spec: ServerSpec) -> Iterator[Server]:
    fields = spec.model_dump(exclude_unset=True)
    with Server.start(ServerSpec(**{**fields, "start": how}), runtime=runtime) as server:
        assert server.running.started.how == how
        yield server


def told_by(server: Server) -> dict[str, Any]:
    client = server.client
    answers = [
        client.generate(prompt, sampling=GREEDY, logprobs=True)
        for prompt in ([1, 2, 3], [5, 6, 7, 8, 9, 10], "Hello")
    ]
    try:
        checksums: Any = client.checksums().ranks
    except RequestFailed as error:
        checksums = error.message
    info = client.server_info()
    return {
        "info": plain(info, ports_in(info)),
        "model": {n: v for n, v in client.model_info().items() if n != "model_path"},
        "ids": [answer.output_ids for answer in answers],
        "logprobs": [answer.logprobs for answer in answers],
        "checksums": checksums,
    }


def why_it_dies(server: Server) -> tuple[Any, ...]:
    """An id beyond the vocabulary ends the scheduler, and with it the server (0.5.20 to 0.5.23);
    where there are several, it is ended from outside."""
    several = any(name.endswith("-size") for name in server.running.arguments)
    if several:
        # Of a scheduler behind it the controller takes no notice (0.5.23).
        data = "dp-size" in server.running.arguments
        title = "sglang::data_parallel_controller" if data else "sglang::scheduler"
        os.kill(process_named(server, title), signal.SIGKILL)
    else:
        with pytest.raises(ServerDied):
            server.client.generate([1, 2, 10_000_000], sampling={"max_new_tokens": 2}, timeout=60)
    died = death(server)
    # How the rank that is left words the end of its connection is not the same twice.
    exception = died.exception.partition(":")[0] if several else died.exception
    return died.exit_code, died.out_of_memory, died.cause, exception


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor-2": {"model": "tiny-qwen3-moe", "server_args": {"tp-size": 2}},
    "pipeline-2": {"server_args": {"pp-size": 2}},
    "data-2": {"server_args": {"dp-size": 2}},
    "lora": {"server_args": lora_arguments("cpu")},
    "experts": {"model": "tiny-qwen3-moe"},
}


@pytest.mark.parametrize(
    ("mode", "version"),
    [
        ("plain", "0.5.23"),
        *(
            pytest.param(mode, version, marks=pytest.mark.nightly)
            for version in ("0.5.23", "0.5.20")
            for mode in MODES
            if (mode, version) != ("plain", "0.5.23")
        ),
    ],
)
def test_warm_and_cold_are_the_same_server(
    warm_runtime: DockerRuntime, mode: str, version: str
) -> None:
    spec = ServerSpec(**{"model": "tiny", "sglang_version": version, **MODES[mode]})
    told, ends = {}, {}
    for how in ("cold", "warm"):
        with one_of(how, warm_runtime, spec) as server:
            told[how] = told_by(server)
            assert told[how]["info"]["version"] == version
            ends[how] = why_it_dies(server)
            assert server.stop().left_behind == []
    assert told["warm"]["info"] == told["cold"]["info"]
    assert told["warm"]["model"] == told["cold"]["model"]
    assert told["warm"]["ids"] == told["cold"]["ids"]
    assert told["warm"]["checksums"] == told["cold"]["checksums"]
    for a, b in zip(told["warm"]["logprobs"], told["cold"]["logprobs"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert ends["warm"] == ends["cold"]


@pytest.mark.nightly
def test_a_process_forks_as_a_container_does() -> None:
    runtime = ProcessRuntime()
    with runtime.keeping_parents():
        for killed in ("main", "parent"):
            with Server.start(ServerSpec(model="tiny"), runtime=runtime) as server:
                assert server.running.started.how == "warm"
                assert server.client.generate("Hello", sampling=GREEDY).completion_tokens == 16
                pids = server.running.host_pids()
                victim = parent_of(server).preloaded.about["pid"] if killed == "parent" else pids[0]
                os.kill(victim, signal.SIGKILL)
                if killed == "parent":
                    with pytest.raises(ServerLost, match="preloaded parent ended"):
                        death(server)
                else:
                    assert death(server).exit_code == 128 + signal.SIGKILL
                assert server.stop().left_behind == []
            assert not any(lives_as(pid) for pid in pids)


# --- kept for a person --------------------------------------------------------------------------


@pytest.fixture
def kept(command: Run) -> Iterator[kept_parents.KeptParent]:
    """A parent that ``sglang-harness warm`` keeps, as a person has it."""
    done = command("warm", "--runtime", "docker")
    assert done.returncode == 0, done.stderr
    (found,) = kept_parents.on_record()
    try:
        assert found.name in done.stdout
        yield found
    finally:
        ended = command("down")
        assert f"stopped {found.name}" in ended.stdout
        assert found.name not in names_on_engine()
        assert not Path(found.folder).exists()


def pytest_on(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", name],
        capture_output=True, text=True, timeout=COMMAND_LIMIT, cwd=folder,
        env={**os.environ, "SGLANG_HARNESS_CACHE": str(paths.cache())},
    )  # fmt: skip


def wait_until(what: Callable[[], object], why: str) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until, f"waited 20 s for {why}"
        time.sleep(0.05)


TESTS = """
def test_it_answers(generate, sglang_server):
    assert generate("Hello", max_new_tokens=4).completion_tokens == 4
    print("container", sglang_server.about()["container"])
"""

KILLED = """
import os, signal

def test_the_run_is_killed(sglang_server):
    print("container", sglang_server.about()["container"])
    print("folder", sglang_server.running._parent.folders.root)
    print("pids", *sglang_server.running.host_pids(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_runs_find_a_kept_parent_share_it_and_a_killed_one_leaves_it_clean(
    kept: kept_parents.KeptParent, command: Run, tmp_path: Path
) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS)
    (tmp_path / "test_killed.py").write_text(KILLED)

    again = command("warm", "--runtime", "docker")
    assert "is running already" in again.stdout
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(pytest_on, [tmp_path] * 2, ["test_mine.py"] * 2))
    for done in both:
        assert done.returncode == 0, done.stdout
        assert f"container {kept.name}" in done.stdout, "its server is in the kept parent's"
        assert "1 of them warm" in done.stdout
    killed = pytest_on(tmp_path, "test_killed.py")
    assert killed.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in re.findall(r"pids (.+)", killed.stdout)[0].split()]
    wait_until(
        lambda: not any(lives_as(pid) for pid in pids),
        "the server of the run that was killed to end",
    )
    assert kept.name in command("doctor").stdout
    assert kept.name not in command("sweep").stdout, "it is kept, and lives"
    assert pytest_on(tmp_path, "test_mine.py").returncode == 0
    assert kept.answers()


def test_a_killed_run_takes_its_own_parent_along(command: Run, tmp_path: Path) -> None:
    """Nobody ends it: its standard input does. Its folder is left for ``sweep``."""
    (tmp_path / "test_killed.py").write_text(KILLED)
    killed = pytest_on(tmp_path, "test_killed.py")
    assert killed.returncode == -signal.SIGKILL
    (name,) = re.findall(r"container (sglang-harness-parent-\S+)", killed.stdout)
    pids = [int(pid) for pid in re.findall(r"pids (.+)", killed.stdout)[0].split()]
    wait_until(lambda: name not in names_on_engine(), "the parent's container to be gone")
    assert not any(lives_as(pid) for pid in pids)
    folder = Path(re.findall(r"folder (\S+)", killed.stdout)[0])
    assert folder.exists()
    assert f"removed {folder}" in command("sweep").stdout
    assert not folder.exists()


def test_a_kept_parent_that_is_gone_is_no_hindrance(command: Run, tmp_path: Path) -> None:
    assert command("warm", "--runtime", "docker").returncode == 0
    (gone,) = kept_parents.on_record()
    subprocess.run(["docker", "kill", gone.name], capture_output=True, check=True)
    wait_until(lambda: gone.name not in names_on_engine(), "the engine to remove it")
    assert gone.name in command("doctor").stdout
    done = command("qualify", "--model", "tiny", "-k", "hostile/out-of-vocabulary")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"parent {gone.name}" in command("sweep").stdout
    assert kept_parents.on_record() == []
    assert not Path(gone.folder).exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--sglang-version", "9.9.9"), "9.9.9"),
        (("--runtime", "compose"), "has no parents"),
        (("--runtime", "docker", "--python", "/bin/sh"), "belongs to the runtime"),
        (("--python", "/no/such/python"), "cannot be run"),
    ],
)
def test_what_cannot_be_kept_is_one_line(command: Run, words: tuple[str, ...], told: str) -> None:
    done = command("warm", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert kept_parents.on_record() == []
