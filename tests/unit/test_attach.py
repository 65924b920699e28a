"""A URL of somebody else's server: what is refused before anything is asked of it, and that a
server which is only looked at is never changed."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from scripted_server import Answer, ScriptedServer

from sglang_harness.client import Client, RequestsTransport, calls
from sglang_harness.errors import AttachError, ReadOnly, SpecError
from sglang_harness.runtime.attach import AttachedServer, Attachment, SharedFolder
from sglang_harness.server.identify import introduce
from sglang_harness.upkeep import kept_servers

MODEL = Answer(body={"model_path": "/models/it", "weight_version": "default"})
SERVER = Answer(body={"version": "0.5.23", "device": "cuda"})


@pytest.fixture
def closed_port():
    """A port that nobody else gets, and where connections are refused."""
    with ScriptedServer({}, listening=False) as nobody:
        yield nobody.port


def test_a_server_introduces_itself():
    with ScriptedServer({"GET /model_info": MODEL, "GET /server_info": SERVER}) as server:
        about = introduce(server.url, None)
    assert (about.version, about.model_path, about.device) == ("0.5.23", "/models/it", "gpu")


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"GET /model_info": Answer(404, "<h1>\nnothing</h1>")}, "is not SGLang"),
        ({"GET /model_info": Answer(body="hello")}, "is not SGLang"),
        ({"GET /model_info": Answer(body={})}, "states no model_path"),
        ({"GET /model_info": MODEL, "GET /server_info": Answer(body={})}, "states no version"),
        ({"GET /model_info": Answer(401, {"error": "Unauthorized"})}, "SGLANG_API_KEY"),
    ],
)
def test_what_is_no_sglang_or_lets_nobody_in_is_told_in_one_line(answers, words):
    script = {"GET /server_info": SERVER, **answers}
    with ScriptedServer(script) as server, pytest.raises(AttachError) as told:
        introduce(server.url, None)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_nothing_that_answers_is_told_with_its_address(closed_port):
    with pytest.raises(AttachError, match=f"127.0.0.1:{closed_port}.*connection refused"):
        introduce(f"http://127.0.0.1:{closed_port}", None)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:30000", "ftp://host", "http://", "http://user:secret@host", "http://h:x",
     "http://host?key=secret"],
)  # fmt: skip
def test_what_is_no_address_is_refused_and_no_secret_is_repeated(url):
    with pytest.raises(SpecError) as told:
        Attachment(url)
    assert "secret@" not in str(told.value)


@pytest.mark.parametrize(
    "call",
    [
        calls.update_weights_from_disk("/x"),
        calls.flush_cache(),
        calls.pause("in_place"),
        calls.resume(),
        calls.release_memory(),
        calls.resume_memory(),
        calls.abort_all(),
    ],
    ids=str,
)
def test_a_call_that_changes_a_server_never_reaches_one_that_is_only_looked_at(call):
    with ScriptedServer({}) as server:
        client = Client(RequestsTransport(server.url), read_only=True)
        with pytest.raises(ReadOnly, match="--allow-changes"):
            client.send(call)
        client.close()
        assert server.seen == []


def test_what_only_reads_still_goes_through():
    with ScriptedServer({"GET /model_info": MODEL}) as server:
        client = Client(RequestsTransport(server.url), read_only=True)
        assert client.model_info()["model_path"] == "/models/it"
        client.close()


def test_a_server_that_nobody_listens_for_any_more_is_found_dead(closed_port):
    attached = AttachedServer(
        Attachment(f"http://127.0.0.1:{closed_port}"),
        run_id="x", device="cpu", model_path="/m", model=None,
    )  # fmt: skip
    death = attached.watch.wait(10)
    assert death is not None
    assert "nothing listens" in death.cause


def test_looking_away_is_no_death():
    with ScriptedServer({}) as server:
        attached = AttachedServer(
            Attachment(server.url), run_id="x", device="cpu", model_path="/m", model=None
        )
        assert attached.end() is None
        assert attached.watch.wait(2.5) is None
        assert attached.left_behind() == []


def test_a_shared_folder_takes_copies_and_gives_up_only_these(tmp_path: Path):
    local, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
    (local / "theirs").mkdir(parents=True)
    (local / "sglang-harness-of-somebody").mkdir()
    elsewhere.mkdir()
    (elsewhere / "weights.safetensors").write_bytes(b"1")
    shared = SharedFolder.parse(f"{local}:/mnt/shared")
    assert shared.share(local / "theirs") == PurePosixPath("/mnt/shared/theirs")
    inside = shared.share(elsewhere)
    assert inside.is_relative_to("/mnt/shared")
    copy = local / inside.relative_to("/mnt/shared")
    assert (copy / "weights.safetensors").read_bytes() == b"1"
    assert copy.stat().st_mode & 0o005 == 0o005
    shared.clear()
    assert sorted(p.name for p in local.iterdir()) == ["sglang-harness-of-somebody", "theirs"]


def test_one_path_is_the_same_on_both_sides(tmp_path: Path):
    shared = SharedFolder.parse(str(tmp_path))
    assert shared.share(tmp_path / "x") == PurePosixPath(tmp_path / "x")


@pytest.mark.parametrize("text", ["/nowhere/at/all:/x", ":/x", "/tmp:relative"])
def test_a_shared_folder_that_cannot_be_is_refused(text):
    with pytest.raises(SpecError, match="--share"):
        SharedFolder.parse(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": None, "allow_changes": True}, "--url is missing"),
        ({"url": None, "share": "/tmp"}, "--url is missing"),
        ({"url": None, "contradicting": {"--runtime": "attach"}}, "--url"),
        ({"url": "http://h:1", "contradicting": {"--image": "x"}}, "--image"),
        ({"url": "http://h:1", "contradicting": {"--port": 1, "--gpus": None}}, "--port"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(SpecError, match=words):
        kept_servers.attachment(**options)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    assert kept_servers.attachment("http://h:1").api_key is None
    monkeypatch.setenv("SGLANG_API_KEY", "from-the-environment")
    assert kept_servers.attachment("http://h:1").api_key == "from-the-environment"


def test_what_this_user_holds_is_known_by_its_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    record = kept_servers.Held(
        name="it", run_id="r", address="http://127.0.0.1:5", api_key="kept-on-record",
        folder=str(tmp_path), model=str(tmp_path),
    )  # fmt: skip
    record.file.parent.mkdir(parents=True)
    record.file.write_text(record.model_dump_json())
    known = kept_servers.attachment("http://127.0.0.1:5/")
    assert known.api_key == "kept-on-record"
    assert known.model == tmp_path
    assert known.shared.share(tmp_path / "w") == PurePosixPath("/exchange/w")
