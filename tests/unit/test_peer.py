"""The sender beside a server: a real process, without an engine and without SGLang."""

from __future__ import annotations

import base64
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from sglang_harness.checkpoint.reading import TensorInfo
from sglang_harness.errors import EngineError, PeerFailed
from sglang_harness.peer import Peer
from sglang_harness.runtime.attached import AttachedProcess, Lines
from sglang_harness.runtime.shared_memory import remove_torchs
from sglang_harness.weights.routes.buckets import plan
from sglang_harness.weights.routes.peer import largest, slots

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

SHARED = Path("/dev/shm")


class Here:
    """Puts a process of this Python beside this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[AttachedProcess] = []

    def start_sidecar(self, script: str) -> AttachedProcess:
        self.made.append(
            AttachedProcess(
                "The peer",
                [sys.executable, "-c", script],
                name="peer",
                environment={**os.environ, "TMPDIR": str(self.folder)},
                folder=self.folder,
                before=lambda: None,
            )
        )
        return self.made[-1]


@pytest.fixture
def here() -> Iterator[Here]:
    # A socket's path has to be short: pytest's own folders are not.
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        place = Here(Path(folder))
        yield place
        for beside in place.made:
            beside.end()


@pytest.fixture
def peer(here: Here) -> Iterator[Peer]:
    peer = Peer(here)  # type: ignore[arg-type]
    yield peer
    peer.end()


WEIGHTS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5).bfloat16(),
    "c": torch.tensor([1.5, 2.5], dtype=torch.float64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    safetensors.save_file({k: WEIGHTS[k] for k in "ab"}, path / "1.safetensors")
    safetensors.save_file({"c": WEIGHTS["c"]}, path / "2.safetensors")
    return path


def described(name: str, tensor: Any) -> TensorInfo:
    return TensorInfo(name, str(tensor.dtype)[6:], tuple(tensor.shape))


def test_a_bucket_arrives_by_a_handle_and_nothing_stays(peer: Peer, here: Here, folder: Path):
    (bucket,) = plan([described(n, t) for n, t in WEIGHTS.items()], 1 << 20)
    assert peer.ask("open", folder=str(folder), timeout=60)["tensors"] == 3
    packed = peer.ask(
        "pack",
        slots=slots(bucket),
        extent=bucket.extent,
        room=largest([bucket]),
        ranks=2,
        flattened=False,
        timeout=60,
    )
    assert len(packed["payloads"]) == 2
    segment = SHARED / packed["segments"][0]
    assert segment.exists()
    for payload in packed["payloads"]:
        handle = base64.b64decode(payload)
        assert len(handle) < 4000
        got = dict(pickle.loads(handle))
        for name, tensor in WEIGHTS.items():
            assert torch.equal(got[name], tensor)
    del got
    family = set(here.made[0]._family.pids())
    assert peer.end() == []
    assert not segment.exists()
    assert not any(psutil.pid_exists(pid) for pid in family)
    assert list(SHARED.glob(f"torch_{peer.about['pid']}_*")) == []
    assert peer.end() == []


def test_one_buffer_serves_every_bucket(peer: Peer, folder: Path):
    buckets = plan([described(n, t) for n, t in WEIGHTS.items()], 50)
    assert len(buckets) == 2
    peer.ask("open", folder=str(folder), timeout=60)
    seen = []
    for bucket in buckets:
        packed = peer.ask(
            "pack", slots=slots(bucket), extent=bucket.extent, room=largest(buckets), ranks=1,
            flattened=False, timeout=60,
        )  # fmt: skip
        seen += packed["segments"]
        got = dict(pickle.loads(base64.b64decode(packed["payloads"][0])))
        assert all(torch.equal(got[name], WEIGHTS[name]) for name in bucket.names)
        del got
    assert len(set(seen)) == 1


def test_what_fails_over_there_is_said_here_and_the_next_order_works(peer: Peer, folder: Path):
    with pytest.raises(PeerFailed, match="no safetensors in /nowhere"):
        peer.ask("open", folder="/nowhere", timeout=60)
    peer.ask("open", folder=str(folder), timeout=60)
    (bucket,) = plan([described("a", torch.zeros(3, 3))], 1 << 20)
    with pytest.raises(PeerFailed, match="a has 48 bytes, planned were 36"):
        peer.ask(
            "pack", slots=slots(bucket), extent=36, room=36, ranks=1, flattened=False, timeout=60
        )
    with pytest.raises(PeerFailed, match="no group was joined"):
        peer.ask("broadcast", slots=[], room=16, timeout=60)
    assert peer.ask("port", timeout=10)["port"] > 1023


def test_a_peer_holds_one_bucket_and_little_more(peer: Peer, tmp_path: Path):
    sixteen = 16 << 20
    tensors = {name: torch.ones(sixteen // 4) for name in "abcd"}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    buckets = plan([described(n, t) for n, t in tensors.items()], 2 * sixteen)
    assert len(buckets) == 2
    peer.ask("open", folder=str(tmp_path), timeout=60)
    assert peer.peak_bytes() < sixteen // 2
    for bucket in buckets:
        peer.ask(
            "pack", slots=slots(bucket), extent=bucket.extent, room=largest(buckets), ranks=1,
            flattened=False, timeout=60,
        )  # fmt: skip
    assert 2 * sixteen <= peer.peak_bytes() < 3 * sixteen


def test_a_bucket_that_does_not_fit_into_shared_memory_is_refused_in_words(
    peer: Peer, folder: Path
):
    peer.ask("open", folder=str(folder), timeout=60)
    with pytest.raises(PeerFailed, match="shm_size"):
        peer.ask("ready", room=1 << 50, shared=True, timeout=60)


def test_a_peer_without_a_gpu_is_told_before_the_server_waits_for_it(peer: Peer, folder: Path):
    """CUDA was opened, and SGLang imported, when the first bucket was due and the server paused."""
    peer.ask("open", folder=str(folder), timeout=60)
    with pytest.raises(PeerFailed, match="no GPU is visible to the peer"):
        peer.ask("ready", room=1 << 20, shared=False, devices=[0], timeout=60)


def test_the_port_of_a_rendezvous_is_kept_free_until_it_is_there(peer: Peer):
    """Between being told and being used it could be given to another process."""
    port = peer.ask("port", timeout=10.0)["port"]
    with socket.socket() as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", port))
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, True, timedelta(seconds=20))
    store.set("key", "value")
    assert store.get("key") == b"value"
    del store
    peer.ask("leave", timeout=10.0)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_an_order_too_many_is_no_answer_to_another(peer: Peer):
    peer.tell("port")
    with pytest.raises(PeerFailed, match="'port' has no answer yet"):
        peer.tell("port")
    peer.answer(10)


def test_a_peer_that_dies_is_noticed_with_its_words(peer: Peer):
    os.kill(peer.about["pid"], 9)
    with pytest.raises((PeerFailed, EngineError), match=r"ended|takes no input"):
        peer.ask("port", timeout=10)
    assert not any("container" in left for left in peer.end())


def test_the_last_errors_of_one_that_ended_are_there_when_its_end_is(here: Here):
    """Its output ended first, and what it had printed of its error was not read yet."""
    for _ in range(5):
        made = AttachedProcess(
            "It",
            ["/bin/sh", "-c", "exec 1>&-; sleep 0.1; echo the reason >&2"],
            name="it",
            environment={},
            folder=here.folder,
        )
        here.made.append(made)
        assert made.read(20.0) is None
        assert made.words() == "the reason"


def test_a_peer_that_takes_too_long_is_bounded(peer: Peer):
    os.kill(peer.about["pid"], 19)
    with pytest.raises(PeerFailed, match=r"took longer than 0\.2 s"):
        peer.ask("port", timeout=0.2)


class Answers:
    """What stands beside a server, and says one line whatever it is told."""

    name = "peer"

    def __init__(self, line: bytes) -> None:
        self.lines = [b'{"pid": 1}', line]
        self.left = ["process 7"]

    def start_sidecar(self, script: str) -> Answers:
        return self

    def write(self, line: bytes) -> None: ...

    def read(self, timeout: float) -> bytes | None:
        return self.lines.pop(0)

    def words(self) -> str:
        return "Traceback\nits last line"

    def end(self) -> list[str]:
        return self.left


@pytest.mark.parametrize(
    "line", [b"[1, 2]", b'"text"', b"7", b"null", b"not JSON", b"\xff\xfe", b""]
)
def test_an_answer_that_is_not_an_object_is_a_failure_of_the_peer(line: bytes):
    """A list was a TypeError, and what is not JSON a JSONDecodeError."""
    peer = Peer(Answers(line))  # type: ignore[arg-type]
    with pytest.raises(PeerFailed, match=r"'pack' was answered with .*its last line"):
        peer.ask("pack", timeout=1.0)


@pytest.mark.parametrize("line", [b'{"peak_bytes": null}', b"{}", b'{"peak_bytes": "many"}'])
def test_a_peer_that_does_not_say_what_it_held_has_failed(line: bytes):
    peer = Peer(Answers(line))  # type: ignore[arg-type]
    with pytest.raises(PeerFailed, match="peak_bytes"):
        peer.peak_bytes()


@pytest.mark.parametrize(
    "line", [b"[1]", b"{}", b'{"left": null}', b'{"error": "OSError: disk full"}']
)
def test_a_peer_that_does_not_close_is_ended_all_the_same_and_told(line: bytes):
    left = Peer(Answers(line)).end()  # type: ignore[arg-type]
    assert left[0].startswith("closing the peer")
    assert left[-1] == "process 7"


def test_it_ends_when_nobody_speaks_to_it_any_more(peer: Peer, here: Here):
    process = psutil.Process(peer.about["pid"])
    stdin = here.made[0]._process.stdin
    assert stdin is not None
    stdin.close()
    assert process.wait(timeout=10) == 0


def test_a_peer_that_cannot_start_says_why(here: Here, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sglang_harness.peer.script", lambda: "raise SystemExit('no torch here')")
    with pytest.raises(PeerFailed, match="ended after"):
        Peer(here)  # type: ignore[arg-type]


def test_the_sender_names_sglangs_class_without_importing_sglang(monkeypatch, tmp_path: Path):
    from sglang_harness.peer import sender

    package = tmp_path / "sglang"
    inner = package / "srt" / "weight_sync"
    inner.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "tensor_bucket.py").write_text(
        "class FlattenedTensorMetadata:\n"
        "    def __init__(self, **told):\n"
        "        vars(self).update(told)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        kind = sender.bucket_module().FlattenedTensorMetadata
        with sender.parents_of(sender.BUCKETS):
            data = pickle.dumps(kind(name="w"))
        assert b"sglang.srt.weight_sync.tensor_bucket" in data
        assert "sglang" not in sys.modules
    finally:
        sys.modules.pop(sender.BUCKETS, None)


def test_other_peoples_segments_are_left_alone(tmp_path: Path):
    for name in ("torch_12_a_0", "torch_123_a_0", "sem.x"):
        (tmp_path / name).touch()
    remove_torchs([12], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sem.x", "torch_123_a_0"]


def test_a_line_of_its_errors_that_comes_in_two_pieces_is_one_line():
    """The last line is what a person is told of a program that ended."""
    said = Lines()
    for piece in (b"Traceback:\nAssertion", "Error: 3 \u20ac".encode()[:-1], b"\xac"):
        said.errors(piece)
    assert said.words().splitlines() == ["Traceback:", "AssertionError: 3 \u20ac"]
    said.errors(b" less\n")
    assert said.words().splitlines()[-1] == "AssertionError: 3 \u20ac less"
