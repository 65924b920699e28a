"""Where a server starts warm, from which parent, and what becomes of the parents."""

from __future__ import annotations

import pickle
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import imitated_sglang
import pytest

from sglang_harness.errors import EngineError, Interrupted, ServerLost, SpecError
from sglang_harness.runtime import Started
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.runtime.path_map import FolderReach
from sglang_harness.runtime.ports import Port
from sglang_harness.runtime.process import ProcessRuntime
from sglang_harness.runtime.warm import kept_parents, parent_process
from sglang_harness.runtime.warm.parents import MOST, Folders, Parent, Parents, place
from sglang_harness.runtime.warm.protocol import Ended, Forked, Recipe
from sglang_harness.runtime.warm.server import WarmServer, why_cold
from sglang_harness.spec import ServerSpec


def quiet(_: str) -> None:
    return None


class Silent:
    """A connection to a parent that only lives or not."""

    def __init__(self) -> None:
        self.gone = False

    def close(self) -> list[str]:
        self.gone = True
        return []


class Nowhere(Parent):
    """A parent without a place."""

    def __init__(self, recipe: Recipe, folder: Path, *, kept: bool = False) -> None:
        root = Path(tempfile.mkdtemp(dir=folder))
        silent: Any = Silent()
        super().__init__(root.name, silent, Folders.same(root), recipe, kept=kept)

    def end_place(self) -> list[str]:
        return []

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no server is started here")

    address_words = address = temporary = cores = share_model = reach = _unused
    host_pids = start_sidecar = peers_left = about = _unused


class Made:
    """Makes parents, and remembers them; or fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Nowhere] = []
        self.kept: dict[Recipe, Nowhere] = {}
        self.fails = ""
        self.parents = Parents(self.kept.get, self.make, lambda: bool(self.kept))

    def make(self, recipe: Recipe, run_id: str, say: Any) -> Nowhere:
        del run_id, say
        if self.fails:
            raise EngineError(self.fails)
        self.made.append(Nowhere(recipe, self.folder))
        return self.made[-1]

    def take(self, runs: str, *, make: bool = False, **environment: str) -> Parent | None:
        recipe = Recipe(runs, tuple(sorted(environment.items())))
        return self.parents.take(recipe, make=make, run_id="run", say=quiet)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


# --- the parents of a run -----------------------------------------------------------------------


def test_one_server_alone_makes_no_parent_unless_asked(made: Made) -> None:
    assert made.take("a") is None
    assert made.made == []
    parent = made.take("a", make=True)
    assert parent is made.made[0]
    assert made.parents.give(parent) == []
    assert not parent.alive, "nobody else is to come"
    assert not parent.folders.root.exists()


def test_where_more_are_to_come_a_parent_stays_and_is_shared(made: Made) -> None:
    with made.parents.keeping():
        first, second = made.take("a"), made.take("a")
        assert first is second is made.made[0]
        made.parents.give(first)
        made.parents.give(second)
        assert first.alive
        assert made.take("a") is first
        made.parents.give(first)
    assert not first.alive
    assert not first.folders.root.exists()


def test_one_that_a_server_still_uses_ends_with_that_server(made: Made) -> None:
    with made.parents.keeping():
        parent = made.take("a")
    assert parent is not None
    assert parent.alive
    made.parents.give(parent)
    assert not parent.alive


def test_another_image_or_environment_has_a_parent_of_its_own(made: Made) -> None:
    with made.parents.keeping():
        assert made.take("a") is not made.take("a", NAME="value")
        assert len(made.made) == 2


def test_there_are_only_so_many_and_an_idle_one_makes_room(made: Made) -> None:
    with made.parents.keeping():
        used = [made.take(str(n)) for n in range(MOST)]
        with pytest.raises(EngineError, match=f"{MOST} preloaded parents .* are in use"):
            made.take("another")
        idle = used[0]
        assert idle is not None
        made.parents.give(idle)
        assert made.take("another") is made.made[-1]
        assert not idle.alive
        assert all(p is not None and p.alive for p in used[1:])


def test_one_that_died_is_replaced_and_its_folder_goes(made: Made) -> None:
    with made.parents.keeping():
        dead = made.take("a")
        assert dead is not None
        made.parents.give(dead)
        dead.preloaded.close()
        assert made.take("a") is made.made[1]
        assert not dead.folders.root.exists()


def test_one_that_died_under_its_server_is_not_used_for_another(made: Made) -> None:
    with made.parents.keeping():
        dead = made.take("a")
        assert dead is not None
        dead.preloaded.close()
        assert made.take("a") is not dead
        made.parents.give(dead)
        assert not dead.folders.root.exists()


def test_what_failed_once_is_not_waited_for_again(made: Made) -> None:
    made.fails = "it hangs"
    with made.parents.keeping():
        for _ in range(2):
            with pytest.raises(EngineError, match="it hangs"):
                made.take("a")
            made.fails = ""
    assert made.made == []


def test_one_that_cannot_be_ended_is_told_and_the_others_are_ended(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with made.parents.keeping():
        for name in ("a", "b"):
            parent = made.take(name)
            assert parent is not None
            made.parents.give(parent)

        def broken() -> list[str]:
            raise ConnectionError("the engine is gone")

        monkeypatch.setattr(made.made[0], "end", broken)
    assert not made.made[1].alive
    assert "ConnectionError: the engine is gone" in caplog.text


def test_a_parent_whose_connection_fails_is_ended_with_its_folder(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = Nowhere(Recipe("a", ()), made.folder)

    def fails() -> list[str]:
        raise OSError("broken pipe")

    monkeypatch.setattr(parent.preloaded, "close", fails)
    monkeypatch.setattr(parent, "end_place", fails)
    left = parent.end()
    assert left == [
        f"connection to {parent.name}: OSError: broken pipe",
        f"{parent.name}: OSError: broken pipe",
    ]
    assert not parent.folders.root.exists()


def test_an_interruption_ends_the_other_parents_first(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made.parents.keeping():
        for runs in ("a", "b"):
            parent = made.take(runs)
            assert parent is not None
            made.parents.give(parent)
        first, second = made.made

        def interrupted() -> list[str]:
            raise Interrupted(2)

        monkeypatch.setattr(first, "end_place", interrupted)
        with pytest.raises(Interrupted):
            made.parents.close()
    assert not first.folders.root.exists()
    assert not second.folders.root.exists()


def test_a_kept_parent_is_used_and_left(made: Made, tmp_path: Path) -> None:
    recipe = Recipe("a", ())
    kept = made.kept[recipe] = Nowhere(recipe, tmp_path, kept=True)
    assert made.take("a") is kept, "it is there: nothing has to be made"
    made.parents.give(kept)
    assert not kept.alive, "the connection is closed"
    assert kept.folders.root.exists(), "the parent is somebody's"
    assert made.made == []


@pytest.mark.parametrize("runtime", [DockerRuntime(), ProcessRuntime(Path("/a/python"))])
def test_a_runtime_that_goes_to_another_process_has_its_own_parents(runtime: Any) -> None:
    with runtime.keeping_parents():
        other = pickle.loads(pickle.dumps(runtime))
    assert type(other) is type(runtime)
    assert other._parents is not runtime._parents
    assert getattr(other, "_python", None) == getattr(runtime, "_python", None)


# --- cold or warm -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options", "why"),
    [
        ({}, {}, None),
        ({"server_args": {"tp-size": 2}}, {}, None),
        ({}, {"held": True}, "outlive"),
        ({}, {"device": "gpu"}, "CUDA does not survive a fork"),
        ({}, {"model": None}, "hub"),
        ({"port": 30000}, {}, "port"),
        ({"publish_on": "0.0.0.0"}, {}, "publish_on"),
        ({"shm_size": "2g"}, {}, "shm_size"),
        ({"memory": "8g"}, {}, "memory"),
        ({"hub_cache": Path("/hub")}, {}, "hub_cache"),
        ({"model_mount": "volume"}, {}, "model_mount"),
        ({"memory": None, "port": None}, {}, None),
    ],
)
def test_what_cannot_be_forked_starts_cold_for_a_reason(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], why: str | None
) -> None:
    told = why_cold(
        ServerSpec(**fields), **{"model": tmp_path, "device": "cpu", "held": False, **options}
    )
    assert (told is None) if why is None else (told is not None and why in told)


def test_a_large_model_on_another_disk_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_harness.runtime.warm.server._copied", lambda _: 16 << 30)
    told = why_cold(ServerSpec(), model=tmp_path, device="cpu", held=False)
    assert told is not None
    assert "16 GiB" in told


def _for(made: Made, start: str, why: str | None = None) -> Parent | Started:
    return made.parents.for_server(
        ServerSpec(start=start), lambda: why, lambda: Recipe("a", ()), run_id="run", say=quiet
    )


def test_cold_for_a_reason_is_told_and_warm_by_name_is_refused(made: Made) -> None:
    with made.parents.keeping():
        assert _for(made, "auto", "its image is not ours") == Started(
            "cold", "its image is not ours"
        )
        with pytest.raises(SpecError, match="is not possible: its image is not ours") as refused:
            _for(made, "warm", "its image is not ours")
        assert "--start cold" in str(refused.value)
        parent = _for(made, "auto")
        assert isinstance(parent, Parent)
        made.parents.give(parent)
    assert _for(made, "auto", "it is held") == Started("cold", ""), "nobody expects one to be warm"
    assert isinstance(_for(made, "warm"), Parent)
    with made.parents.keeping():
        assert _for(made, "cold") == Started("cold", "")


def test_one_server_alone_is_warm_where_a_parent_is_kept(made: Made, tmp_path: Path) -> None:
    recipe = Recipe("a", ())
    made.kept[recipe] = Nowhere(recipe, tmp_path, kept=True)
    assert _for(made, "auto") is made.kept[recipe]
    assert _for(made, "auto", "it is held") == Started("cold", "it is held")


def test_a_parent_that_cannot_be_had_is_a_cold_start_with_its_words(made: Made) -> None:
    made.fails = "The preloaded parent ended while it imported SGLang: no such module."
    with made.parents.keeping():
        started = _for(made, "auto")
        assert started == Started("cold", made.fails.rstrip("."))
    made.fails = "It was killed."
    fresh = Made(made.folder)
    fresh.fails = made.fails
    with pytest.raises(SpecError, match="It was killed"):
        _for(fresh, "warm")


# --- a server of its parent -----------------------------------------------------------------------


class Forks(Silent):
    """A parent that forks what never was."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[tuple[str, float]] = []
        self.asked: dict[str, Any] = {}

    def start(self, name: str, **asked: Any) -> Forked:
        self.asked = asked
        return Forked(42, 20500)

    def end(self, name: str, *, within: float) -> tuple[Ended, list[str]]:
        self.ended.append((name, within))
        return Ended(0, False, 0.0), ["/dev/shm/left"]

    def wait_for_end(self, name: str) -> Ended:
        threading.Event().wait()
        raise AssertionError("nobody waits for ever")


class Place(Nowhere):
    """Where such a parent is."""

    published = True

    def __init__(self, folder: Path) -> None:
        super().__init__(Recipe("a", ()), folder)
        self.folders.make()
        self.preloaded: Any = Forks()

    def address_words(self) -> tuple[list[str], Port | None]:
        return ["--host", "0.0.0.0", "--port", "{port}"], None

    def address(self, port: int) -> str:
        if not self.published:
            raise EngineError("not published")
        return f"http://127.0.0.1:{port}"

    def temporary(self, name: str) -> PurePosixPath:
        return PurePosixPath("/tmp") / name

    def cores(self) -> list[int]:
        return [3, 5]

    def share_model(self, model: Path) -> PurePosixPath:
        return self.folders.models / place(model, self.folders.root / "models")

    def reach(self, name: str, model: Path, inside: PurePosixPath) -> FolderReach:
        folder = self.folders.root / "exchange" / name
        folder.mkdir()
        return FolderReach(model, folder=folder, inside=folder, model_inside=inside)

    def peers_left(self, name: str) -> list[str]:
        return []


@pytest.fixture
def warm(model: Path, tmp_path: Path) -> tuple[WarmServer, Place, list[Parent]]:
    at, given = Place(tmp_path), []

    def give(parent: Parent) -> list[str]:
        given.append(parent)
        return []

    server = WarmServer(
        ServerSpec(model="x", server_args={"tp-size": 2}, limits={"stop": 7}),
        at, runtime="docker", model=model, device="cpu", run_id="run", give_back=give,
    )  # fmt: skip
    return server, at, given


def test_it_is_forked_with_its_own_key_log_folder_and_cores(
    warm: tuple[WarmServer, Place, list[Parent]],
) -> None:
    server, at, _ = warm
    server.start()
    asked = at.preloaded.asked
    assert asked["argv"][:6] == [
        "--model-path",
        server.model_path(),
        "--host",
        "0.0.0.0",
        "--port",
        "{port}",
    ]
    assert "--tp-size" in asked["argv"]
    assert server.api_key not in asked["argv"]
    assert asked["environment"] == {
        "SGLANG_CPU_OMP_THREADS_BIND": "3|5",
        "SGLANG_API_KEY": server.api_key,
    }
    assert asked["folder"] == f"/tmp/{server.name}"
    assert server.address == "http://127.0.0.1:20500"
    Path(asked["log"]).write_text("one\ntwo\n")
    assert server.logs(tail=1) == "two"


@pytest.mark.parametrize(("at_once", "within"), [(False, 7.0), (True, 0.0)])
def test_its_end_is_asked_for_once_tells_what_is_left_and_gives_the_parent_back(
    warm: tuple[WarmServer, Place, list[Parent]], at_once: bool, within: float
) -> None:
    server, at, given = warm
    server.start()
    Path(at.preloaded.asked["log"]).write_text("its last words")
    for _ in range(2):
        assert server.end(at_once=at_once) == 0
    assert at.preloaded.ended == [(server.name, within)]
    assert given == [at]
    assert server.left_behind() == ["/dev/shm/left"]
    assert server.logs() == "its last words"
    assert not Path(at.preloaded.asked["log"]).exists()
    assert list((at.folders.root / "exchange").iterdir()) == []


def test_an_end_whose_steps_all_fail_still_gives_the_parent_back_and_tells_of_each(
    warm: tuple[WarmServer, Place, list[Parent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, at, given = warm
    server.start()

    class Sidecar:
        name = "peer"

        def end(self) -> list[str]:
            raise OSError("engine gone")

    def fails(*_: Any, **__: Any) -> Any:
        raise EngineError("no answer")

    server._beside.append(Sidecar())  # type: ignore[arg-type]
    monkeypatch.setattr(at.preloaded, "end", fails)
    monkeypatch.setattr(server, "logs", fails)
    assert server.end() is None
    assert given == [at]
    monkeypatch.undo()
    assert [line.split(":")[0] for line in server._left] == [
        "sidecar peer",
        f"server {server.name}",
        "log",
    ]


def test_an_interrupted_end_gives_the_parent_back_before_it_is_over(
    warm: tuple[WarmServer, Place, list[Parent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, at, given = warm
    server.start()

    def interrupted(*_: Any, **__: Any) -> Any:
        raise Interrupted(15)

    monkeypatch.setattr(at.preloaded, "end", interrupted)
    with pytest.raises(Interrupted):
        server.end()
    assert given == [at]
    assert list((at.folders.root / "exchange").iterdir()) == []


def test_a_server_whose_parent_has_ended_is_lost_and_not_dead(
    warm: tuple[WarmServer, Place, list[Parent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a death of the server, and so a failure of SGLang."""
    server, at, _ = warm
    ended = Ended(None, False, 0.0, parent_gone=True)
    monkeypatch.setattr(at.preloaded, "wait_for_end", lambda name: ended)
    server.start()
    with pytest.raises(ServerLost, match="its preloaded parent ended"):
        server.watch.wait(20.0)


def test_one_that_was_never_forked_gives_its_parent_back(
    warm: tuple[WarmServer, Place, list[Parent]],
) -> None:
    server, at, given = warm
    assert server.end() is None
    assert at.preloaded.ended == []
    assert given == [at]
    assert server.left_behind() == []


def test_one_whose_address_cannot_be_told_is_ended_all_the_same(
    warm: tuple[WarmServer, Place, list[Parent]],
) -> None:
    server, at, given = warm
    at.published = False
    with pytest.raises(EngineError, match="not published"):
        server.start()
    server.end()
    assert [name for name, _ in at.preloaded.ended] == [server.name]
    assert given == [at]


def test_a_server_that_cannot_be_set_up_gives_its_parent_back(tmp_path: Path) -> None:
    at, given = Place(tmp_path), []
    with pytest.raises(OSError, match="missing"):
        WarmServer.of(
            ServerSpec(), at, runtime="docker", model=tmp_path / "missing", device="cpu",
            run_id="run", give_back=lambda parent: given.append(parent) or [],
        )  # fmt: skip
    assert given == [at]


# --- models --------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "here" / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "weights").write_bytes(b"w" * 1000)
    (folder / "config.json").chmod(0o644)
    (folder / "inner" / "weights").chmod(0o600)
    return folder


def test_a_model_is_placed_once_readable_and_without_a_copy(model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    assert place(model, models) == "model"
    placed = models / "model"
    assert (placed / "config.json").stat().st_ino == (model / "config.json").stat().st_ino
    weights = placed / "inner" / "weights"
    assert weights.stat().st_mode & 0o777 == 0o644, "a copy: the original keeps its mode"
    assert (model / "inner" / "weights").stat().st_mode & 0o777 == 0o600
    assert placed.stat().st_mode & 0o777 == 0o755
    assert place(model, models) == "model"
    assert [p.name for p in models.iterdir()] == ["model"]


def test_links_of_a_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (model / "config.json").rename(tmp_path / "blob")
    (model / "config.json").symlink_to(tmp_path / "blob")
    place(model, models)
    assert not (models / "model" / "config.json").is_symlink()
    assert (models / "model" / "config.json").read_text() == "{}"


def test_another_model_of_that_name_has_a_name_of_its_own(model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    other = tmp_path / "there" / "model"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"other": 1}')
    assert place(model, models) == "model"
    assert place(other, models) == "model-1"
    (other / "config.json").unlink()
    (other / "config.json").write_text('{"a third": 1}')
    assert place(other, models) == "model-2", "it was written anew since"
    assert place(model, models) == "model"


# --- kept for a person --------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path / "state"
    for kept in kept_parents.on_record():
        assert kept_parents.end(kept) == []


def test_a_kept_parent_is_found_by_its_recipe_kept_once_and_ended(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = imitated_sglang.recipe(imitated_sglang.made(tmp_path))
    kept = kept_parents.keep("process", recipe, "", quiet)
    assert kept.file.stat().st_mode & 0o077 == 0
    assert kept.version == "9.9.9"
    assert kept_parents.keep("process", recipe, "", quiet) == kept, "asked for twice"
    found = kept_parents.find("process", recipe)
    assert found is not None
    assert found.kept
    found.end()
    other = Recipe(recipe.runs, (*recipe.environment, ("ANOTHER", "value")), "9.9.9")
    assert kept_parents.find("process", other) is None
    assert kept_parents.find("docker", recipe) is None

    # What the parent is made of has changed since: it is not used, and the next one replaces it.
    monkeypatch.setattr("sglang_harness.runtime.warm.protocol.script", lambda: "# another\n")
    assert kept_parents.find("process", recipe) is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    said: list[str] = []
    replaced = kept_parents.keep("process", other, "", said.append)
    assert replaced.name != kept.name
    assert any(f"{kept.name} has ended, or its image" in line for line in said)
    assert not Path(kept.folder).exists()
    assert [k.name for k in kept_parents.on_record()] == [replaced.name]
    assert kept_parents.end(replaced) == []
    assert kept_parents.on_record() == []
    assert not Path(replaced.folder).exists()


def test_what_is_left_of_a_kept_parent_that_has_ended_is_swept(state: Path, tmp_path: Path) -> None:
    recipe = imitated_sglang.recipe(imitated_sglang.made(tmp_path))
    kept = kept_parents.keep("process", recipe, "", quiet)
    found = kept_parents.find("process", recipe)
    assert found is not None
    assert kept_parents.sweep() == ([], []), "it lives"
    found.preloaded.ask("quit")
    found.end()
    assert kept_parents.find("process", recipe) is None
    assert kept_parents.sweep() == ([kept.name], [])
    assert not Path(kept.folder).exists()
    assert not kept.file.exists()


def test_a_record_that_cannot_be_read_is_passed_over(state: Path) -> None:
    folder = state / "sglang-harness" / "parents"
    folder.mkdir(parents=True)
    (folder / "broken.json").write_text("{")
    (folder / "older.json").write_text('{"name": "x"}')
    assert kept_parents.on_record() == []


def test_a_warm_server_of_a_kept_parent_is_left_with_it(state: Path, tmp_path: Path) -> None:
    """The whole way of the runtime: found, forked, ended; the parent stays."""
    site = imitated_sglang.made(tmp_path)
    recipe = imitated_sglang.recipe(site)
    kept_parents.keep("process", recipe, "", quiet)
    parents = Parents(
        lambda wanted: kept_parents.find("process", wanted),
        lambda wanted, _, say: parent_process.make(wanted, say=say),
        lambda: bool(kept_parents.on_record()),
    )
    parent = parents.take(recipe, make=False, run_id="run", say=quiet)
    assert parent is not None
    assert parent.kept
    assert parents.give(parent) == []
    again = kept_parents.find("process", recipe)
    assert again is not None
    again.end()
