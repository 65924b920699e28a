"""Right pushes that were judged wrong, and what an error left behind."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
from fake_docker import FakeDocker, refusal
from model_server import ModelServer
from scripted_server import Answer, ScriptedServer, Seen, event
from test_adapter_pushes import LoraServer
from weight_server import WeightServer, refused

from sglang_harness import oracle as oracles
from sglang_harness import suite
from sglang_harness._base import headroom
from sglang_harness._base.temporary import RECORD
from sglang_harness.checkpoint import footprint
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import write_torch
from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import CheckpointMismatch, EngineError, ModelError, PeerFailed
from sglang_harness.oracle import Oracle
from sglang_harness.peer.sender import Sender
from sglang_harness.runtime.path_map import EXCHANGE, SameMachine, VolumeReach
from sglang_harness.suite import run_check
from sglang_harness.suite.checks.weights.disk import pushed
from sglang_harness.suite.lib.prompts import greedy
from sglang_harness.traffic import Traffic
from sglang_harness.traffic.background import BackgroundStream
from sglang_harness.traffic.base import together
from sglang_harness.verdict import Outcome
from sglang_harness.weights import pusher
from sglang_harness.weights.adapters import finite_tensors
from sglang_harness.weights.served_weights import ServedWeights
from sglang_harness.weights.source.fitted import open_for
from sglang_harness.weights.source.model_folder import model_folder
from sglang_harness.weights.source.staging import stage

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

PROMPT = [45, 74, 81, 81]


# --- a reference model whose folder is gone ----------------------------------------------------


@pytest.fixture
def none_kept() -> Iterator[None]:
    oracles.forget()
    yield
    oracles.forget()


def little_memory(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Enough for one reference model, and not for holding it beside anything else."""
    size = footprint.Size.of_folder(folder)
    enough = footprint.reference_model(size, streamed=False).memory
    monkeypatch.setattr(headroom, "memory", lambda: headroom.Memory(enough, "a limit"))


@pytest.mark.usefixtures("none_kept")
@pytest.mark.parametrize("streamed", [True, False])
def test_weights_that_are_pushed_again_have_a_reference_model_again(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
):
    """The folder of a push is removed when the next one is scored, and its reference model is
    kept: it reads its weights again."""
    if streamed:
        little_memory(monkeypatch, old)

    def pushed(checkpoint: Path, folder: str) -> Oracle:
        return oracles.for_folder(
            model_folder(open_for(old, checkpoint, ()), old, tmp_path / folder)
        )

    first = pushed(new, "first")
    expected = first.score(PROMPT, [1, 2])
    pushed(old, "second")
    shutil.rmtree(tmp_path / "first")
    first.release()
    again = pushed(new, "third")
    assert again.score(PROMPT, [1, 2]) == expected


@pytest.mark.usefixtures("none_kept")
def test_a_reference_model_that_another_push_made_outlives_the_folder_of_that_push(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    little_memory(monkeypatch, old)
    with WeightServer(old) as double:
        served, source = ServedWeights(double.server), open_for(old, new, ())
        theirs = model_folder(source, old, tmp_path / "theirs")
        ours = model_folder(source, old, tmp_path / "ours")
        made = oracles.for_folder(theirs)
        expected = made.score(PROMPT, [1, 2])
        served.scored(ours, made, scratch=tmp_path)
        shutil.rmtree(theirs)
        found = served.oracle()
        assert found is made
        assert found.score(PROMPT, [1, 2]) == expected


# --- what is read ------------------------------------------------------------------------------


class Here:
    reach = SameMachine()
    shared_folder = None


@pytest.mark.parametrize("indexed", [False, True])
def test_a_peer_reads_the_files_that_are_checked_and_no_others(
    old: Path, new: Path, tmp_path: Path, indexed: bool
):
    """Beside the weights lie others of the same names, as averages that a trainer keeps."""
    folder = tmp_path / "step"
    shutil.copytree(new, folder)
    shutil.copyfile(old / "model.safetensors", folder / "model_average.safetensors")
    if indexed:
        names = open_checkpoint(new).tensors
        index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for reader in ("peer", "server"):
        staged = stage(open_for(old, folder, ()), Here(), reader=reader)  # type: ignore[arg-type]
        sender = Sender()
        sender.open(str(staged.inside))
        read = {Path(place[0]).resolve() for place in sender.places.values()}
        assert read == {folder / "model.safetensors"}
        staged.remove()
    assert (folder / "model.safetensors").is_file()


def test_a_server_in_another_dtype_than_its_model_gets_the_values_that_are_expected(
    old: Path, new: Path, tmp_path: Path
):
    """The model is in bfloat16, the server computes in float32, the trainer saves float32: by
    every route the server gets what is in the checkpoint, rounded to the model's dtype."""
    model = tmp_path / "model"
    shutil.copytree(old, model)
    weights = safetensors.load_file(old / "model.safetensors")
    safetensors.save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    torch.save(safetensors.load_file(new / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "bin").mkdir()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "bin" / "pytorch_model.bin")
    with WeightServer(model) as double:
        for route in ("tensor", "disk"):
            for checkpoint in (new, tmp_path / "bin"):
                report = double.server.weights.push(checkpoint, route=route, logprobs=False)
                assert report.checksums.says == "agrees"


def test_a_reference_model_of_a_part_of_the_weights_is_none(old: Path, new: Path, tmp_path: Path):
    """transformers fills the rest with noise, which no server can agree with."""
    whole = open_checkpoint(new)
    names = [name for name in whole.tensors if ".layers.0." in name]
    part = write_torch(tmp_path / "part.pt", dict(whole.read(names)))
    folder = model_folder(open_for(old, part, ("*",)), old, tmp_path / "folder")
    with pytest.raises(ModelError, match="it lacks"):
        Oracle(folder)


def test_a_copy_of_a_tied_weight_in_another_dtype_is_compared_as_it_is_served(
    old: Path, tmp_path: Path
):
    """A trainer may keep the output layer in float32."""
    model = tmp_path / "tied"
    shutil.copytree(old, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = safetensors.load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    safetensors.save_file(half, model / "model.safetensors")
    embedding = half["model.embed_tokens.weight"]
    for factor, fits in ((1.0, True), (1.5, False)):
        head = embedding.float() * factor
        path = write_torch(tmp_path / "step.pt", {**half, "lm_head.weight": head})
        fitted = open_for(model, path, ())
        if fits:
            fitted.raise_if_unusable()
        else:
            with pytest.raises(CheckpointMismatch, match="although the model ties them"):
                fitted.raise_if_unusable()


def test_a_file_in_a_hubs_cache_is_what_its_link_says(old: Path, tmp_path: Path):
    """The cache holds files by their hashes, without a suffix, and links to them by their names."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shutil.copyfile(old / "model.safetensors", blobs / "0a1b2c")
    safetensors.save_file({"lora_A": torch.ones(2, 3)}, blobs / "3d4e5f")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blobs / "0a1b2c")
    (snapshot / "adapter_model.safetensors").symlink_to(blobs / "3d4e5f")
    (snapshot / "adapter_config.json").write_text("{}")
    (tmp_path / "newest").symlink_to(old / "model.safetensors")
    for path in (snapshot, snapshot / "model.safetensors", tmp_path / "newest"):
        assert open_checkpoint(path).layout == "safetensors"
    assert [info.name for info in finite_tensors(snapshot)] == ["lora_A"]


@pytest.mark.parametrize("beside", ["consolidated", "model.fp16"])
def test_the_index_that_servers_read_comes_before_others(old: Path, tmp_path: Path, beside: str):
    """Mistral's models have the same weights under other names beside those of transformers."""
    folder = tmp_path / "model"
    shutil.copytree(old, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    safetensors.save_file({"layers.0.wq": torch.ones(2)}, folder / f"{beside}.safetensors")
    names = open_checkpoint(old).tensors
    for stem, weights, file in (
        ("model", names, "model-00001-of-00001.safetensors"),
        (beside, ["layers.0.wq"], f"{beside}.safetensors"),
    ):
        index = {"weight_map": dict.fromkeys(weights, file)}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).tensors.keys() == names.keys()


# --- what is known afterwards ------------------------------------------------------------------


def test_weights_that_were_not_scored_are_not_taken_for_those_before(old: Path, new: Path):
    with WeightServer(old) as double:
        weights = double.server.weights
        assert weights.push(new, logprobs=False).checksums.says == "agrees"
        assert weights.served_checkpoint() is None
        weights.push(old, logprobs=False)
        assert weights.served_checkpoint() == old


def test_weights_that_were_scored_are_known(old: Path, new: Path, monkeypatch: pytest.MonkeyPatch):
    with WeightServer(old) as double:
        monkeypatch.setattr(pusher, "ask_tokens", lambda *_: [])
        weights = double.server.weights
        weights.push(new, logprobs=True)
        folder = weights.served_checkpoint()
        assert folder is not None
        assert (folder / "model.safetensors").resolve() == new / "model.safetensors"


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ModelError("no memory for it"), RuntimeError("no memory")])
def test_a_reference_model_that_fails_does_not_blame_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """As where it was released meanwhile, and there is no memory to load it again."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2}))
    safetensors.save_file({"lora_A": torch.ones(2, 3)}, adapter / "adapter_model.safetensors")

    class Released:
        def encode(self, _: str) -> list[int]:
            raise error

    monkeypatch.setattr(oracles, "Oracle", lambda *_, **__: Released())
    monkeypatch.setattr(oracles, "for_folder", lambda _: Released())
    server = LoraServer()
    try:
        pusher_ = server.adapters
        monkeypatch.setattr(pusher_._weights, "served_checkpoint", lambda: tmp_path)
        report = pusher_.push(adapter, name="policy")
        assert report.outcome == "unproven"
        assert "no memory" in report.reason
        assert list(server.loaded) == ["policy"]
    finally:
        server.client.close()
        server.http.close()


# --- what is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "check_id", ["memory/release-without-saver", "memory/colocated-order", "memory/cycles"]
)
def test_a_release_whose_answer_is_lost_is_taken_back(
    old: Path, tmp_path: Path, check_id: str
) -> None:
    with ModelServer(old) as double:
        client = double.server.client

        def late(right: Any) -> Any:
            time.sleep(1.5)
            return right

        bounded = client._bounded

        def hurried(call: Any) -> Any:
            if call.path == "/release_memory_occupation":
                client._deadline = time.monotonic() + 0.5
            return bounded(call)

        double.lies["freed"] = late
        client._bounded = hurried  # type: ignore[method-assign]
        with client.within(1000):
            result = run_check(suite.registered()[check_id], double.context(tmp_path))[0]
        assert result.outcome is Outcome.ERROR
        assert double.asked("POST /resume_memory_occupation") == 1
        assert double.released == []


def endless() -> ScriptedServer:
    """Streams events until it is closed, and refuses what is not streamed."""

    def pieces() -> Iterator[bytes | float]:
        while True:
            yield event({"text": "x", "output_ids": [1], "meta_info": {}})
            yield 0.05

    def generate(seen: Seen) -> Answer:
        if not seen.json().get("stream"):
            return refused("busy")
        return Answer(pieces=pieces())  # type: ignore[arg-type]

    return ScriptedServer(
        {
            "POST /generate": generate,
            "POST /abort_request": Answer(body=""),
        }
    )


def test_requests_do_not_run_on_where_not_all_of_them_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the machine has no more threads, or somebody interrupts."""
    start, started = threading.Thread.start, []

    def two_of_them(thread: threading.Thread) -> None:
        if thread.name.startswith(("traffic-", "stream-")):
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    http = endless()
    client = Client(RequestsTransport(http.url), timeout=5.0)
    monkeypatch.setattr(threading.Thread, "start", two_of_them)
    try:
        with pytest.raises(RuntimeError), Traffic(client, [[1]], sampling=greedy(4), workers=4):
            pass
        assert not any(thread.is_alive() for thread in started)
        started.clear()
        streams = (BackgroundStream(client, "x", sampling=greedy(4)) for _ in range(4))
        with pytest.raises(RuntimeError), together(streams):
            pass
        assert not any(thread.is_alive() for thread in started)
    finally:
        client.close()
        http.close()


@pytest.mark.parametrize("error", [refusal(500, "no space"), KeyboardInterrupt()])
def test_a_part_of_a_copy_does_not_stay_in_a_volume(old: Path, error: BaseException) -> None:
    docker = FakeDocker()
    volume = VolumeReach(docker, "image", {})  # type: ignore[arg-type]
    docker.refuses["container.put_archive"] = error
    with pytest.raises(type(error)):
        volume.share(old)
    ((removed,),) = [ran["command"] for ran in docker.containers.ran]
    assert PurePosixPath(removed).parent == EXCHANGE


# --- who is blamed -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [EngineError("no container"), PeerFailed("/dev/shm is full")])
def test_a_peer_that_cannot_be_started_is_no_failure_of_the_server(
    old: Path, new: Path, error: Exception
) -> None:
    def fails(_: str) -> Any:
        raise error

    with WeightServer(old) as double:
        double.server.running.start_sidecar = fails  # type: ignore[method-assign]
        with pytest.raises(type(error)):
            pushed(double.server, new, route="shared-memory")
        assert double.server.weights.unfit is None
        double.spoil = lambda number, tensors: refused("no")
        assert pushed(double.server, new).outcome == "failed"


# --- what is refused ---------------------------------------------------------------------------


def test_what_the_kernel_keeps_of_names_is_given_back_as_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a large tree was read a container's group counts gigabytes of them."""
    there = SimpleNamespace(available=64 << 30)
    monkeypatch.setattr(headroom.psutil, "virtual_memory", lambda: there)
    told = {
        "memory.max": f"{8 << 30}",
        "memory.current": f"{7 << 30}",
        "memory.stat": f"inactive_file {1 << 30}\nactive_file 0\nslab_reclaimable {4 << 30}",
    }
    for name, text in told.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text("0::/\n")
    assert headroom.memory(groups=tmp_path / "groups", mount=tmp_path).available == 6 << 30


def test_a_disk_without_room_for_a_folder_does_not_blame_the_server(
    old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk may still make a folder, and takes no file in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written = Path.write_text

    def full(path: Path, *text: Any, **how: Any) -> int:
        if path.name == RECORD:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, *text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with WeightServer(old) as double:
        report = double.server.weights.push(new, logprobs=True)
        assert report.outcome == "unproven"
        assert "No space left" in report.logprobs.how
        assert double.server.weights.unfit is None
    assert list(tmp_path.iterdir()) == []
