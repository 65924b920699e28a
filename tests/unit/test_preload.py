"""The preloaded parent as a program: what it forks, how that ends, and what it leaves."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imitated_sglang
import psutil
import pytest

from sglang_harness._base.temporary import remove
from sglang_harness.errors import EngineError
from sglang_harness.runtime.warm import parent_process
from sglang_harness.runtime.warm.parent_process import ProcessParent
from sglang_harness.runtime.warm.protocol import Ended

#: Seconds for anything that takes a fraction of one.
SOON = 20.0


def wait_until(what: Callable[[], object], why: str) -> None:
    until = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < until, f"waited {SOON:g} s for {why}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Ended, whether somebody has asked how or not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imitated_sglang.made(tmp_path_factory.mktemp("imitated"))


@pytest.fixture(scope="module")
def parent(site: Path) -> Iterator[ProcessParent]:
    made = parent_process.make(imitated_sglang.recipe(site), say=lambda _: None)
    yield made
    assert made.end() == []
    assert not made.folders.root.exists()


class Forks:
    """Starts servers of a parent, and ends those that a test leaves."""

    def __init__(self, parent: ProcessParent) -> None:
        self.parent = parent
        self.names: list[str] = []

    def __call__(self, name: str, *words: str, environment: dict[str, str] | None = None) -> int:
        self.names.append(name)
        forked = self.parent.preloaded.start(
            name,
            argv=list(words),
            environment=environment or {},
            log=str(self.log(name)),
            folder=str(self.folder(name)),
        )
        return forked.pid

    def serving(self, name: str, *words: str, environment: dict[str, str] | None = None) -> int:
        pid = self(name, *words, environment=environment)
        # Two processes write these, in either order.
        lines = r"(?m)^(?:serving|segment) .*\n"
        wait_until(lambda: len(re.findall(lines, self.said(name))) == 2, f"{name} to serve")
        return pid

    def log(self, name: str) -> Path:
        return self.parent.folders.root / "logs" / f"{name}.log"

    def folder(self, name: str) -> Path:
        return Path(self.parent.temporary(name))

    def said(self, name: str) -> str:
        return self.log(name).read_text()

    def segment(self, name: str) -> Path:
        (line,) = [li for li in self.said(name).splitlines() if li.startswith("segment ")]
        return Path(line.split()[1])

    def child(self, name: str) -> int:
        (line,) = [li for li in self.said(name).splitlines() if li.startswith("serving ")]
        return int(line.split()[1])

    def end(self, name: str, within: float = 0.0) -> tuple[Ended | None, list[str]]:
        self.names.remove(name)
        try:
            return self.parent.preloaded.end(name, within=within)
        finally:
            self.log(name).unlink(missing_ok=True)


@pytest.fixture
def fork(parent: ProcessParent) -> Iterator[Forks]:
    forks = Forks(parent)
    yield forks
    for name in list(forks.names):
        forks.end(name)


def test_it_says_what_it_has_imported_and_what_this_version_lacks(
    parent: ProcessParent, tmp_path: Path
) -> None:
    assert parent.preloaded.about["sglang"] == "9.9.9"
    assert parent.preloaded.about["missing"] == []
    older = imitated_sglang.made(tmp_path, missing="sglang/srt/models/registry.py")
    made = parent_process.make(imitated_sglang.recipe(older), say=lambda _: None)
    try:
        (missing,) = made.preloaded.about["missing"]
        assert "sglang.srt.models.registry" in missing
    finally:
        assert made.end() == []


@pytest.mark.parametrize(
    ("words", "code", "logged"),
    [
        (("exit", "0"), 0, ""),
        (("exit", "3"), 3, ""),
        (("raise",), 1, "RuntimeError: broken on purpose"),
        (("signal", str(int(signal.SIGSEGV))), 128 + signal.SIGSEGV, ""),
        (("signal", str(int(signal.SIGQUIT))), 128 + signal.SIGQUIT, ""),
    ],
    ids=["well", "with-a-code", "by-an-exception", "by-a-crash", "by-sigquit"],
)
def test_each_end_is_told_as_it_was(
    fork: Forks, words: tuple[str, ...], code: int, logged: str
) -> None:
    fork("a", *words)
    ended = fork.parent.preloaded.wait_for_end("a")
    assert (ended.exit_code, ended.out_of_memory, ended.parent_gone) == (code, False, False)
    assert 0 <= time.time() - ended.at < SOON
    assert logged in fork.said("a")
    assert fork.parent.alive


def test_a_server_has_its_own_arguments_environment_folder_and_log(fork: Forks) -> None:
    fork.serving("a", "one", environment={"GIVEN": "first", "SGLANG_API_KEY": "-a-key-with-a-dash"})
    fork.serving("b", "two")
    assert "argv ['one', '--api-key=-a-key-with-a-dash']" in fork.said("a")
    assert f"TMPDIR {fork.folder('a')} first" in fork.said("a")
    assert "argv ['two']" in fork.said("b"), "nothing of its neighbour's"
    assert f"TMPDIR {fork.folder('b')} None" in fork.said("b")
    pids = fork.parent.preloaded.ask("processes", name="a")["pids"]
    assert all("a-key" not in " ".join(psutil.Process(pid).cmdline()) for pid in pids)


def test_asked_to_end_it_ends_well_and_nothing_of_it_is_left(fork: Forks) -> None:
    pid = fork.serving("a")
    child, segment = fork.child("a"), fork.segment("a")
    assert fork.parent.preloaded.ask("processes", name="a")["pids"] == [pid, child]
    assert segment.exists()
    ended, left = fork.end("a", within=SOON)
    assert ended is not None
    assert (ended.exit_code, left) == (0, [])
    assert gone(pid)
    assert gone(child)
    assert not segment.exists()
    assert not fork.folder("a").exists()


def test_one_that_does_not_listen_is_killed_when_its_time_is_over(fork: Forks) -> None:
    fork.serving("a", "stubborn")
    began = time.monotonic()
    ended, left = fork.end("a", within=0.5)
    assert ended is not None
    assert (ended.exit_code, left) == (128 + signal.SIGKILL, [])
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("which", ["main", "child"])
def test_what_is_killed_harms_neither_the_parent_nor_a_neighbour(fork: Forks, which: str) -> None:
    pid, other = fork.serving("a"), fork.serving("b")
    child, mine, its = fork.child("a"), fork.segment("a"), fork.segment("b")
    os.kill(pid if which == "main" else child, signal.SIGKILL)
    if which == "main":
        ended = fork.parent.preloaded.wait_for_end("a")
        assert ended.exit_code == 128 + signal.SIGKILL
        assert time.time() - ended.at < 1.0
    assert fork.end("a")[1] == []
    assert gone(child)
    assert not mine.exists()
    assert psutil.pid_exists(other)
    assert its.exists(), "its neighbour still has it open"
    fork.serving("c")


def test_memory_is_that_of_its_own_processes(fork: Forks) -> None:
    fork.serving("a")
    alone = fork.parent.preloaded.ask("memory", name="a")
    assert alone["processes"] == 2
    assert alone["Pss_Anon"] > 0
    fork.serving("b")
    shared = fork.parent.preloaded.ask("memory", name="a")
    assert shared["Pss_Anon"] < alone["Pss_Anon"], "what both share is counted by halves"


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"do": "end", "name": "nobody", "within": 0}, "KeyError"),
        ({"do": "dance"}, "do_dance"),
        ({"do": "start", "name": "x", "argv": [], "log": "/nowhere/x", "folder": "/x"}, "/nowhere"),
    ],
)
def test_what_it_cannot_do_is_answered_and_it_goes_on(
    parent: ProcessParent, request_: dict[str, object], told: str
) -> None:
    with pytest.raises(EngineError, match=told):
        parent.preloaded.ask(**request_)  # type: ignore[arg-type]
    assert parent.preloaded.ask("ports") == {"id": parent.preloaded._number, "free": 0}


def test_a_name_is_taken_once(fork: Forks) -> None:
    fork.serving("a")
    with pytest.raises(EngineError, match="there already"):
        fork.parent.preloaded.start("a", argv=[], environment={}, log="/x", folder="/x")
    fork.names.clear()
    # The client has forgotten the one that was refused, and with it the one that is there.
    fork.parent.preloaded.ask("end", name="a", within=0)


# --- the parent's own end ------------------------------------------------------------------------


def test_its_end_takes_every_server_along_and_is_told_as_that(site: Path) -> None:
    parent = parent_process.make(imitated_sglang.recipe(site), say=lambda _: None)
    fork = Forks(parent)
    pid, child = fork.serving("a"), fork.child("a")
    segment = fork.segment("a")
    os.kill(int(parent.preloaded.about["pid"]), signal.SIGKILL)
    ended = parent.preloaded.wait_for_end("a")
    assert ended.parent_gone
    assert ended.exit_code is None
    wait_until(lambda: gone(pid), "the server to end with its parent")
    assert fork.end("a") == (ended, [])
    assert parent.end() == []
    assert gone(child), "nobody is left to end it but the harness"
    assert not segment.exists()


def test_it_ends_when_its_owner_does_with_all_it_has(site: Path) -> None:
    parent = parent_process.make(imitated_sglang.recipe(site), say=lambda _: None)
    fork = Forks(parent)
    pid, segment, folder = fork.serving("a"), fork.segment("a"), fork.folder("a")
    # As when the process that holds the other end is killed: nobody closes anything.
    program: Any = parent.program
    stdin = program._process.stdin
    assert stdin is not None
    stdin.close()
    wait_until(lambda: parent.preloaded.gone, "the parent to end")
    assert gone(pid)
    assert not segment.exists()
    assert not folder.exists()
    parent.end()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ImportError('no such thing')", "ended while it imported SGLang: .*no such thing"),
        ("import os; os.kill(os.getpid(), 9)", "ended while it imported SGLang"),
        ("import time; time.sleep(600)", "was not done within 1 s"),
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), "
            "daemon=True).start()",
            "has 2 Python threads",
        ),
    ],
    ids=["fails", "is-killed", "hangs", "starts-a-thread"],
)
def test_one_that_cannot_be_forked_from_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str
) -> None:
    if "sleep(600)" in code and "thread" not in code:
        monkeypatch.setattr(parent_process.Preloaded.wait_until_ready, "__defaults__", (1.0,))
    monkeypatch.setattr(parent_process, "new_root", lambda: _root(tmp_path))
    site = imitated_sglang.made(tmp_path, http_server=code)
    with pytest.raises(EngineError, match=told) as raised:
        parent_process.make(imitated_sglang.recipe(site), say=lambda _: None)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "root").exists()


def _root(folder: Path) -> Path:
    root = folder / "root"
    root.mkdir()
    return root


# --- kept ones ----------------------------------------------------------------------------------


@pytest.fixture
def kept(site: Path) -> Iterator[tuple[str, Path]]:
    name, folders = parent_process.make_kept(imitated_sglang.recipe(site), idle=600.0)
    yield name, folders.root
    finder = parent_process.find(name, folders.root, imitated_sglang.recipe(site))
    pid = int(finder.preloaded.about["pid"])
    finder.preloaded.ask("quit")
    wait_until(lambda: finder.preloaded.gone, "the kept parent to end")
    finder.end()
    wait_until(lambda: gone(pid), "the kept parent to be gone")
    # Whoever has it on record removes its folder.
    assert remove(folders.root) == []


def test_two_runs_share_a_kept_parent_and_each_ends_its_own(
    kept: tuple[str, Path], site: Path
) -> None:
    recipe = imitated_sglang.recipe(site)
    one, two = (parent_process.find(*kept, recipe) for _ in range(2))
    first, second = Forks(one), Forks(two)
    mine, theirs = first.serving("a"), second.serving("b")
    segment = first.segment("a")
    one.end()  # as when the run is killed: the connection is gone
    wait_until(lambda: gone(mine), "the server of the run that went")
    wait_until(lambda: not segment.exists(), "its segment to be cleared away")
    assert psutil.pid_exists(theirs)
    assert two.alive
    assert second.end("b")[1] == []
    two.end()


def test_a_kept_parent_that_nobody_uses_ends_by_itself(site: Path) -> None:
    recipe = imitated_sglang.recipe(site)
    name, folders = parent_process.make_kept(recipe, idle=1.5)
    user = parent_process.find(name, folders.root, recipe)
    pid = int(user.preloaded.about["pid"])
    time.sleep(2.5)  # longer than it waits: it is in use
    assert user.alive
    user.end()
    wait_until(lambda: gone(pid), "the kept parent to end for want of use")
    with pytest.raises(EngineError, match="No preloaded parent listens"):
        parent_process.find(name, folders.root, recipe)
    assert remove(folders.root) == []
