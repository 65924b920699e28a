"""What a push refuses before anything is sent, and what it leaves when it breaks."""

from __future__ import annotations

import base64
import errno
import io
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scripted_server import Answer, Mortal, ScriptedServer, Seen
from test_weights_packing import AsSGLang, Metadata
from weight_server import WeightServer, refused

from sglang_harness._base.temporary import RECORD
from sglang_harness.checkpoint.formats.spans import SIZES
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import (
    CheckpointMismatch,
    EngineError,
    ModelError,
    SpecError,
    TimeIsOver,
)
from sglang_harness.runtime.attached import AttachedProcess
from sglang_harness.runtime.path_map import FolderReach, SameMachine
from sglang_harness.weights import NotPrepared, PushFailed, PushReport, WeightPusher
from sglang_harness.weights.routes import Job, Sent, packing
from sglang_harness.weights.routes.buckets import Bucket
from sglang_harness.weights.routes.in_body import Tensor

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

#: Cuts the tiny model's 2 MB into several buckets.
SMALL = 300_000
NORM = "model.norm.weight"


@pytest.fixture
def altered(new: Path, tmp_path: Path) -> Any:
    """Makes a checkpoint with one tensor altered."""

    def alter(name: str, tensor: Any, *, nested: bool = False) -> Path:
        weights = {**load_file(new / "model.safetensors"), name: tensor}
        if nested:
            torch.save({"model": weights}, tmp_path / "altered.pt")
            return tmp_path / "altered.pt"
        folder = tmp_path / "altered"
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        return folder

    return alter


def push(double: WeightServer, path: Path, **options: Any) -> PushReport:
    given = {"bucket_bytes": SMALL, "logprobs": False, **options}
    return double.server.weights.push(path, **given)


def failed(double: WeightServer, path: Path, **options: Any) -> PushReport:
    with pytest.raises(PushFailed) as raised:
        push(double, path, **options)
    return raised.value.report


def untouched(double: WeightServer) -> bool:
    """Whether nothing was sent that changes the server, and it may be used."""
    return double.log == [] and double.server.weights.unfit is None


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["tensor", "disk"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused_before_anything_is_sent(
    old: Path, altered: Any, value: float, route: str
):
    bad = torch.ones(128)
    bad[3] = value
    with WeightServer(old) as double:
        with pytest.raises(CheckpointMismatch, match="not finite") as raised:
            push(double, altered(NORM, bad), route=route)
        assert raised.value.names == (NORM,)
        assert untouched(double)


def test_values_that_are_not_finite_can_be_pushed_on_purpose(old: Path, altered: Any):
    bad = torch.full((128,), float("nan"))
    with WeightServer(old) as double:
        report = push(double, altered(NORM, bad), check_values=False)
        assert report.checksums.says == "agrees"
        assert double.state[NORM].isnan().all()


def test_copies_of_tied_weights_that_differ_are_refused(old: Path, tmp_path: Path):
    """The server would use one of them for both, without an error."""
    import json

    model = tmp_path / "tied"
    tiny.write(model, 0)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(model / "model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for name, copy in (("untied", head), ("tied", embedding.clone())):
        torch.save({**weights, "lm_head.weight": copy}, tmp_path / f"{name}.pt")
    with WeightServer(model) as double:
        with pytest.raises(CheckpointMismatch, match=r"lm_head\.weight is not"):
            push(double, tmp_path / "untied.pt")
        assert untouched(double)
        assert push(double, tmp_path / "tied.pt").checksums.says == "agrees"
        assert push(double, tmp_path / "untied.pt", check_values=False).outcome != "failed"


# --- copies ------------------------------------------------------------------------------------


class Volume:
    """Copies what is shared, as a volume does. The double reads the copies by their paths here.

    Attributes:
        broken: nothing can be removed.
    """

    def __init__(self) -> None:
        self._at = Path(tempfile.mkdtemp(prefix="volume-"))
        self._real = FolderReach(None, folder=self._at, inside=PurePosixPath(self._at))
        self.broken = False

    def share(self, path: Path) -> PurePosixPath:
        return self._real.share(path)

    def unshare(self, inside: PurePosixPath) -> None:
        if self.broken:
            raise EngineError(f"The copy {inside} could not be removed.")
        self._real.unshare(inside)

    def copies(self) -> list[str]:
        return [file.name for file in self._at.iterdir()]

    def close(self) -> list[str]:
        return self._real.close()


@pytest.fixture
def volume() -> Iterator[Volume]:
    reach = Volume()
    yield reach
    reach.close()


def on(double: WeightServer, reach: Any) -> WeightServer:
    double.server.running.reach = reach  # type: ignore[misc]
    return double


def test_three_pushes_leave_no_copy(old: Path, new: Path, volume: Volume):
    with WeightServer(old) as double:
        on(double, volume)
        for path in (new, old, new):
            assert push(double, path, route="disk").checksums.says == "agrees"
            assert volume.copies() == []


@pytest.mark.parametrize("nested", [False, True])
def test_a_push_that_fails_leaves_no_copy(
    old: Path, new: Path, altered: Any, volume: Volume, nested: bool
):
    path = altered(NORM, torch.ones(128), nested=nested)
    with WeightServer(old) as double:
        on(double, volume)
        real, there = double.update_weights_from_disk, []

        def refuse_the_copy(seen: Seen) -> Answer:
            if seen.json()["model_path"] == str(old):
                return real(seen)
            there.extend(volume.copies())
            return refused("no")

        double.http.script["POST /update_weights_from_disk"] = refuse_the_copy
        report = failed(double, path, route="disk")
        assert len(there) == 1, "it was there while it was needed"
        assert volume.copies() == []
        assert "verified by checksums" in (report.put_back or "")


def test_a_push_that_is_interrupted_leaves_no_copy(old: Path, new: Path, volume: Volume):
    with WeightServer(old) as double:
        on(double, volume)
        send = double.server.client.send

        def interrupt(call: Any) -> Any:
            if call.path == "/update_weights_from_disk":
                raise KeyboardInterrupt
            return send(call)

        double.server.client.send = interrupt  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            push(double, new, route="disk")
        assert volume.copies() == []
        assert "interrupted" in (double.server.weights.unfit or "")
        assert not double.paused


def test_a_copy_that_cannot_be_removed_is_told_in_the_report(old: Path, new: Path, volume: Volume):
    volume.broken = True
    with WeightServer(old) as double:
        on(double, volume)
        report = push(double, new, route="disk")
        assert report.checksums.says == "agrees"
        assert any("could not be removed" in note for note in report.notes)
        assert "could not be removed" in str(report)


# --- what cannot be prepared -------------------------------------------------------------------


@pytest.mark.parametrize("route", ["tensor", "tensor-bucket", "disk"])
def test_an_empty_tensor_is_a_typed_error_and_marks_nothing(old: Path, altered: Any, route: str):
    with WeightServer(old) as double:
        double.server.model = None
        with pytest.raises(ModelError, match="no elements"):
            push(double, altered("empty", torch.zeros(0, 3)), route=route)
        assert untouched(double)


def test_a_dtype_that_cannot_be_staged_marks_nothing(old: Path, altered: Any):
    """It was raised while sending, and the server was called unfit although nothing was sent."""
    path = altered("strange", torch.ones(3, dtype=torch.complex128), nested=True)
    with WeightServer(old) as double:
        double.server.model = None
        with pytest.raises(ModelError, match="complex128"):
            push(double, path, route="disk")
        assert untouched(double)


def test_a_full_disk_marks_nothing(old: Path, new: Path, monkeypatch: pytest.MonkeyPatch):
    with WeightServer(old) as double:

        def full(_: Path) -> PurePosixPath:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(double.server.reach, "share", full, raising=False)
        with pytest.raises(NotPrepared, match="No space left"):
            push(double, new, route="disk")
        assert untouched(double)
        monkeypatch.undo()
        assert push(double, new, route="disk").checksums.says == "agrees"


def test_no_memory_for_a_bucket_is_a_typed_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(NotPrepared, match="bucket"):
        packing.buffer(1 << 60)


def test_an_impossible_size_of_buckets_is_refused(old: Path, new: Path):
    with WeightServer(old) as double:
        with pytest.raises(SpecError, match="bucket_bytes"):
            push(double, new, bucket_bytes=0)
        assert untouched(double)


class Careless(Tensor):
    """A caller's own route that raises what no route should."""

    def __init__(self, *, preparing: bool) -> None:
        self._preparing = preparing

    def prepare(self, job: Job) -> None:
        if self._preparing:
            raise KeyError("no such thing")
        super().prepare(job)

    def send(self, bucket: Bucket) -> Sent:
        if bucket.number == 1:
            raise ValueError("a shape that nobody expected")
        return super().send(bucket)


def test_any_error_of_a_callers_route_is_a_failed_push_and_the_weights_are_restored(
    old: Path, new: Path
):
    with WeightServer(old) as double:
        with pytest.raises(NotPrepared, match="no such thing"):
            push(double, new, route=Careless(preparing=True))
        assert untouched(double)
        report = failed(double, new, route=Careless(preparing=False))
        assert "ValueError: a shape that nobody expected" in report.reason
        assert "verified by checksums" in (report.put_back or "")
        assert report.unfit is None
        assert not double.paused


def test_a_checkpoint_that_changes_in_the_middle_was_not_sent_any_further(
    old: Path, new: Path, altered: Any
):
    path = altered(NORM, torch.ones(128))
    with WeightServer(old) as double:

        def write_to_it(number: int, _: list[Any]) -> None:
            if number == 0:
                time.sleep(0.01)  # a later time stamp
                file = path / "model.safetensors"
                os.utime(file, ns=(1, 1))

        double.spoil = write_to_it
        report = failed(double, path)
        assert [b.outcome for b in report.buckets[:3]] == ["done", "not sent", "not sent"]
        assert "verified by checksums" in (report.put_back or "")


def test_a_reference_model_that_fails_proves_nothing_and_blames_no_server(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_memory(_: Path) -> Any:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr("sglang_harness.oracle.for_folder", no_memory)
    with WeightServer(old) as double:
        report = push(double, new, logprobs=True)
        assert report.outcome == "unproven"
        assert "RuntimeError: not enough memory" in report.logprobs.how
        left = [p.name for p in double.server.weights._room().iterdir()]
        assert left == [RECORD], "its folder is gone"
        assert double.server.weights.unfit is None


def test_a_model_folder_that_vanishes_in_the_middle_is_a_failed_push(
    old: Path, new: Path, tmp_path: Path
):
    model = tmp_path / "model"
    shutil.copytree(old, model)

    def vanish(_: int, tensors: list[Any]) -> None:
        shutil.rmtree(model, ignore_errors=True)
        tensors[:] = [pair for pair in tensors if pair[0] != "lm_head.weight"]

    with WeightServer(model) as double:
        double.spoil, double.disk_works = vanish, False
        report = failed(double, new)
        assert "lm_head.weight" in report.reason
        assert "could not be restored" in (report.unfit or "")


# --- the caller's bound ------------------------------------------------------------------------


def test_a_bound_of_the_caller_never_forbids_the_way_back(old: Path, new: Path):
    """Its time over in the middle of a push, a server stayed paused with half of the weights."""
    with WeightServer(old) as double:
        client = double.server.client

        def over(number: int, _: list[Any]) -> None:
            if number == 1:
                client._deadline = time.monotonic()

        double.spoil = over
        before = client.checksums()
        double.log.clear()
        with client.within(600):
            with pytest.raises(PushFailed) as raised:
                push(double, new)
            with pytest.raises(TimeIsOver):
                client.checksums()
        report = raised.value.report
        assert isinstance(raised.value.__cause__, TimeIsOver)
        assert not double.paused
        assert not double.open
        assert double.log[-4:] == ["flush", "disk", "flush", "continue"]
        assert "verified by checksums" in (report.put_back or ""), report
        assert report.unfit is None
        assert client.checksums() == before


# --- every shape and dtype, by every route ------------------------------------------------------


class Handles(pickle.Unpickler):
    """Loads what a peer packs, which names memory of the peer's."""

    def find_class(self, module: str, name: str) -> Any:
        return Metadata if name == "FlattenedTensorMetadata" else super().find_class(module, name)


class Sink:
    """A server that takes every update and keeps what arrived, and a peer next to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        bucket = folder / "sglang" / "srt" / "weight_sync" / "tensor_bucket.py"
        bucket.parent.mkdir(parents=True)
        (folder / "sglang" / "__init__.py").touch()
        bucket.write_text(
            "class FlattenedTensorMetadata:\n"
            "    def __init__(self, **told):\n"
            "        vars(self).update(told)\n"
        )
        self.got: dict[str, Any] = {}
        self.updates = 0
        self.mortal = Mortal()
        paths = [
            "/update_weights_from_tensor",
            "/update_weights_from_disk",
            "/flush_cache",
            "/pause_generation",
            "/continue_generation",
        ]
        ok = Answer(body={"success": True, "message": ""})
        generated = {"text": "", "output_ids": [1], "meta_info": {
            "id": "1", "finish_reason": {"type": "length"},
            "prompt_tokens": 1, "completion_tokens": 1,
        }}  # fmt: skip
        self.http = ScriptedServer(
            {
                **{f"POST {path}": ok for path in paths},
                "GET /openapi.json": Answer(body={"paths": {p: {"post": {}} for p in paths}}),
                "GET /server_info": Answer(body={"tp_size": 1, "dp_size": 1}),
                "GET /model_info": Answer(body={"model_path": "m", "weight_version": "default"}),
                "POST /generate": Answer(body=generated),
                "POST /update_weights_from_tensor": self.tensors,
                "POST /update_weights_from_disk": self.disk,
            }
        )
        self.client = Client(RequestsTransport(self.http.url), timeout=30.0)
        self.model = None
        self.device = "cpu"
        self.may_change = True
        self.reach = SameMachine()
        self.shared_folder = None
        self.spec = SimpleNamespace(limits=SimpleNamespace(check=30.0))
        self.running = self
        self.watch = self.mortal.watch
        self.runtime = "double"
        self.beside_it: list[AttachedProcess] = []

    def model_path(self) -> str:
        return "m"

    def why_no_files(self) -> str | None:
        return None

    def why_no_sidecar(self) -> str | None:
        return None

    def start_sidecar(self, script: str) -> AttachedProcess:
        self.beside_it.append(
            AttachedProcess(
                "The peer",
                [sys.executable, "-c", script],
                name="peer",
                environment={
                    **os.environ,
                    "TMPDIR": str(self._folder),
                    "PYTHONPATH": str(self._folder),
                },
                folder=self._folder,
                before=lambda: None,
            )
        )
        return self.beside_it[-1]

    def tensors(self, seen: Seen) -> Answer:
        self.updates += 1
        body = seen.json()
        data = base64.b64decode(body["serialized_named_tensors"][0])
        if body["load_format"] is None:
            self.got.update(AsSGLang(io.BytesIO(data)).load())
            return Answer(body={"success": True, "message": ""})
        bytes_too = b"_load_from_bytes" in data
        flat = (AsSGLang if bytes_too else Handles)(io.BytesIO(data)).load()
        whole = flat["flattened_tensor"]
        for m in flat["metadata"]:
            tensor = whole[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)
            self.got[m.name] = tensor.clone()
        return Answer(body={"success": True, "message": ""})

    def disk(self, seen: Seen) -> Answer:
        self.updates += 1
        self.got.update(open_checkpoint(seen.json()["model_path"]).read())
        return Answer(body={"success": True, "message": ""})


@pytest.fixture(scope="module")
def sink() -> Iterator[tuple[Sink, WeightPusher]]:
    # A socket's path has to be short: pytest's own folders are not.
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        made = Sink(Path(folder))
        pusher = WeightPusher(made)  # type: ignore[arg-type]
        yield made, pusher
        pusher.close()
        for each in made.beside_it:
            each.end()
        made.client.close()
        made.http.close()


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    dtype, shape = draw(st.sampled_from(sorted(SIZES))), draw(shapes)
    count = SIZES[dtype]
    for length in shape:
        count *= length
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype == "bool":
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0).byte()
    tensor = flat.view(getattr(torch, dtype)).reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


@pytest.mark.parametrize("route", ["disk", "tensor", "tensor-bucket", "shared-memory"])
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    weights=st.dictionaries(st.sampled_from("abcé"), tensors(), min_size=1, max_size=3),
    limit=st.sampled_from([1, 64, 1 << 20]),
)
def test_whatever_a_checkpoint_holds_arrives_or_is_refused_before_anything_is_sent(
    route: str, weights: dict[str, Any], limit: int, sink: tuple[Sink, WeightPusher], tmp_path: Path
):
    server, pusher = sink
    server.got, server.updates = {}, 0
    file = tmp_path / "checkpoint.pt"
    torch.save(weights, file)
    report: PushReport | None = None
    with suppress(ModelError):  # of typed errors the only one that is right here
        report = pusher.push(
            file, route=route, bucket_bytes=limit, logprobs=False, check_values=False, timeout=30.0
        )
    if report is None:
        assert server.updates == 0
        empty = any(not t.numel() for t in weights.values())
        strange = {"complex128", "float8_e4m3fnuz", "float8_e5m2fnuz"}
        assert empty or any(str(t.dtype)[6:] in strange for t in weights.values())
    else:
        assert report.outcome == "unproven"
        assert report.tensors == len(weights)
        assert server.got.keys() == weights.keys()
        for name, got in server.got.items():
            sent = weights[name]
            assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
            as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got, sent)]
            assert torch.equal(*as_bytes)
    assert pusher.unfit is None


@pytest.mark.parametrize("dtype", sorted(SIZES))
def test_values_of_every_dtype_can_be_checked(dtype: str, tmp_path: Path):
    from sglang_harness.weights.source.fitted import open_for

    raw = torch.zeros(3 * SIZES[dtype], dtype=torch.uint8)
    torch.save({"a": raw.view(getattr(torch, dtype)).reshape(3, 1)}, tmp_path / "a.pt")
    open_for(None, tmp_path / "a.pt", ()).raise_if_unusable()
