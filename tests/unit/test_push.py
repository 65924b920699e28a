"""A push, from the call to the report, and what becomes of the server when it fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from scripted_server import Answer
from weight_server import WeightServer, refused

from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.errors import CheckpointMismatch, ReadOnly, SpecError
from sglang_harness.weights import PushFailed, PushReport
from sglang_harness.weights import bracket as sessions
from sglang_harness.weights.proof import checksums
from sglang_harness.weights.proof.checksums import ServedLayout, expected_checksums

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

#: Cuts the tiny model's 2 MB into several buckets.
SMALL = 300_000


def push(double: WeightServer, path: Path, **options: Any) -> PushReport:
    given = {"bucket_bytes": SMALL, "logprobs": False, **options}
    return double.server.weights.push(path, **given)


def failed(double: WeightServer, path: Path, **options: Any) -> PushReport:
    with pytest.raises(PushFailed) as raised:
        push(double, path, **options)
    return raised.value.report


def test_a_push_is_bracketed_and_its_content_is_proven(old: Path, new: Path):
    with WeightServer(old) as double:
        report = push(double, new, version="step-3")
        assert double.log[:3] == ["pause retract", "flush", "begin"]
        assert double.log[-3:] == ["end", "flush", "continue"]
        assert report.session
        assert len(report.buckets) > 2
        assert {b.outcome for b in report.buckets} == {"done"}
        assert report.checksums.says == "agrees"
        assert report.label.says == "agrees"
        assert double.version == "step-3"
        assert report.bytes == sum(t.nbytes for t in double.state.values())
        # One of two witnesses was not asked for, so nothing is proven.
        assert report.outcome == "unproven"
        assert "log-probabilities" in report.reason
        assert PushReport.model_validate_json(report.model_dump_json()) == report


def test_a_server_without_sessions_is_not_asked_for_one(old: Path, new: Path):
    with WeightServer(old, sessions=False) as double:
        report = push(double, new)
        assert not report.session
        assert report.checksums.says == "agrees"
        paths = {seen.path for seen in double.http.seen}
        assert not paths & {"/begin_weight_update", "/end_weight_update"}


def test_a_server_with_sessions_never_sees_a_push_outside_one(old: Path, new: Path):
    with WeightServer(old) as double:
        push(double, new)
        order = [seen.path for seen in double.http.seen]
        first = order.index("/update_weights_from_tensor")
        assert "/begin_weight_update" in order[:first]


def test_without_checksums_the_report_says_why(old: Path, new: Path):
    with WeightServer(old, checksums=False) as double:
        report = push(double, new)
        assert report.checksums.says == "not available"
        assert "CUDA" in report.checksums.how
        assert report.outcome == "unproven"


def test_a_tensor_that_never_arrives_is_named(old: Path, new: Path):
    lost = "model.layers.1.mlp.down_proj.weight"

    def drop(number: int, tensors: list[Any]) -> None:
        tensors[:] = [pair for pair in tensors if pair[0] != lost]

    with WeightServer(old) as double:
        double.spoil = drop
        report = failed(double, new)
        assert report.checksums.says == "differs"
        (wrong,) = report.checksums.wrong
        assert lost in wrong
        assert "its old value" in wrong
        assert report.old == [lost]
        assert lost not in report.new
        assert report.unknown == []
        assert report.reason.startswith("checksums: ")


def test_half_an_update_is_told_from_a_whole_one(old: Path, new: Path):
    name = "model.layers.0.self_attn.q_proj.weight"

    def drop(number: int, tensors: list[Any]) -> None:
        tensors[:] = [pair for pair in tensors if pair[0] != name]

    with WeightServer(old) as double:
        double.spoil = drop
        report = failed(double, new)
        (wrong,) = report.checksums.wrong
        assert "qkv_proj" in wrong
        assert "neither new nor old" in wrong
        # The parameter is mixed: of none of its parts is anything known.
        assert {n.split(".")[-2] for n in report.unknown} == {"q_proj", "k_proj", "v_proj"}


def test_altered_bytes_are_seen(old: Path, new: Path):
    def alter(number: int, tensors: list[Any]) -> None:
        for _, tensor in tensors:
            if tensor.dim() == 1:
                tensor[0] += 1e-3

    with WeightServer(old) as double:
        double.spoil = alter
        assert "neither new nor old" in failed(double, new).checksums.wrong[0]


def test_a_bucket_that_fails_in_the_middle(old: Path, new: Path):
    """Everything is closed, the report says what is what, and known weights are back."""
    with WeightServer(old) as double:
        double.spoil = lambda number, _: refused("no memory") if number == 2 else None
        report = failed(double, new)
        assert not double.paused
        assert not double.open
        assert double.log[double.log.index("bucket 2") + 1 :][:3] == ["end", "flush", "continue"]
        outcomes = [b.outcome for b in report.buckets]
        assert outcomes[:3] == ["done", "done", "refused"]
        assert set(outcomes[3:]) == {"not sent"}
        assert "bucket 2" in report.reason
        assert "no memory" in report.reason
        tensors = set(report.new) | set(report.old) | set(report.unknown)
        assert tensors == set(double.state)
        # Norms are ones in both checkpoints: new and old at once, so rightly called new.
        taken = report.buckets[0].tensors + report.buckets[1].tensors
        assert {n for n in report.new if "norm" not in n} <= set(taken)
        assert report.new
        assert report.old
        assert {n for n in report.buckets[-1].tensors if "norm" not in n} <= set(report.old)
        assert report.put_back is not None
        assert "verified by checksums" in report.put_back
        assert report.unfit is None
        assert double.version == "default"
        # And the server is as good as before.
        double.spoil = lambda number, _: None
        assert push(double, new).checksums.says == "agrees"


def test_without_checksums_buckets_tell_what_is_new(old: Path, new: Path):
    with WeightServer(old, checksums=False) as double:
        double.spoil = lambda number, _: refused("no") if number == 1 else None
        report = failed(double, new)
        assert report.new == report.buckets[0].tensors
        assert report.unknown == report.buckets[1].tensors
        assert report.old == [n for b in report.buckets[2:] for n in b.tensors]
        assert "unverified" in (report.put_back or "")


def test_a_server_that_cannot_be_restored_is_unfit(old: Path, new: Path):
    with WeightServer(old) as double:
        double.spoil = lambda number, _: refused("no") if number == 1 else None
        double.disk_works = False
        report = failed(double, new)
        assert report.put_back is None
        assert "could not be restored" in (report.unfit or "")
        with pytest.raises(SpecError, match="Do not use this server"):
            push(double, new)


def test_a_refused_session_changes_nothing(old: Path, new: Path):
    with WeightServer(old) as double:
        double.open = True  # a trainer left it open
        report = failed(double, new)
        assert "already open" in report.reason
        assert report.old == list(double.state)
        assert "nothing was sent" in (report.put_back or "")
        assert not double.paused
        assert double.open, "it is not ours to close"
        assert report.unfit is None


def test_a_server_that_dies_is_unfit(old: Path, new: Path):
    with WeightServer(old) as double:
        dying = Answer(ending="silence", before=double.mortal.die)
        double.spoil = lambda number, _: dying if number == 1 else None
        report = failed(double, new)
        assert report.unfit == "the server died"
        assert report.buckets[1].outcome == "unknown"
        assert [s.outcome for s in report.steps if s.name == "end"] == ["left out"]


def test_a_server_that_goes_silent_is_unfit(old: Path, new: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sessions, "CLOSES_WITHIN", 0.3)
    with WeightServer(old) as double:
        double.spoil = lambda number, _: Answer(delay=60.0)
        for path in ("/end_weight_update", "/continue_generation"):
            double.http.script[f"POST {path}"] = Answer(delay=60.0)
        report = failed(double, new, timeout=0.5)
        assert "no answer within" in report.reason
        assert report.unfit is not None
        assert "paused" in report.unfit
        assert report.buckets[0].outcome == "unknown"


def test_strict_wipes_first_so_that_nothing_old_can_hide(old: Path):
    """The very weights that are served already: without wiping, a lost tensor is not seen."""
    lost = "model.norm.weight"

    def drop(number: int, tensors: list[Any]) -> None:
        tensors[:] = [pair for pair in tensors if pair[0] != lost]

    with WeightServer(old) as double:
        double.spoil = drop
        assert push(double, old).checksums.says == "agrees"
        report = failed(double, old, strict=True)
        assert double.log[double.log.index("wipe") + 1].startswith("bucket")
        assert lost in report.checksums.wrong[0]
        assert "initial weights were restored" in (report.put_back or "")


def test_strict_is_refused_where_something_would_stay_wiped(old: Path, tmp_path: Path):
    from safetensors.torch import load_file

    weights = load_file(old / "model.safetensors")
    del weights["model.norm.weight"]
    torch.save(weights, tmp_path / "part.pt")
    with WeightServer(old) as double:
        with pytest.raises(SpecError, match=r"model\.norm\.weight"):
            push(double, tmp_path / "part.pt", strict=True, allow=("model.norm.*",))
        assert double.log == []
        assert (
            push(double, tmp_path / "part.pt", allow=("model.norm.*",)).checksums.says == "agrees"
        )


def test_disk_takes_safetensors_and_torch_files(old: Path, new: Path, tmp_path: Path):
    from safetensors.torch import load_file

    folder = tmp_path / "bin"
    folder.mkdir()
    torch.save(load_file(new / "model.safetensors"), folder / "pytorch_model.bin")
    nested = tmp_path / "trainer.pt"
    torch.save({"model": load_file(new / "model.safetensors")}, nested)
    with WeightServer(old) as double:
        for path, read in ((new, new), (folder, folder), (nested, None)):
            report = push(double, path, route="disk")
            assert report.checksums.says == "agrees"
            assert not report.session
            assert read is None or double.path == str(read)
        assert not Path(double.path).exists(), "what was written for the push is gone"


def test_arguments_reach_the_server(old: Path, new: Path):
    with WeightServer(old) as double:
        push(double, new, pause="in_place", flush=False, abort_all_requests=True)
        assert double.log[0] == "pause in_place"
        assert "flush" not in double.log
        bodies = [s.json() for s in double.http.asked("POST /update_weights_from_tensor")]
        assert all(body["abort_all_requests"] for body in bodies)
        labels = {body["weight_version"] for body in bodies}
        assert len(labels) == 1, "one label for all buckets of a push"
        push(double, old, pause=None)
        assert "pause retract" not in double.log


def test_a_torch_file_with_another_dtype_is_brought_to_the_model(
    old: Path, new: Path, tmp_path: Path
):
    from safetensors.torch import load_file

    weights = load_file(new / "model.safetensors")
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": {f"module.{n}": t.double() for n, t in weights.items()}}, file)
    with WeightServer(old) as double:
        report = push(double, file)
        assert report.checksums.says == "agrees"
        assert report.tensors == len(weights)


def test_a_checkpoint_of_another_model_is_never_sent(old: Path, tmp_path: Path):
    file = tmp_path / "other.pt"
    torch.save({"model": {"model.norm.weight": torch.zeros(3)}}, file)
    with WeightServer(old) as double:
        with pytest.raises(CheckpointMismatch):
            push(double, file)
        assert double.log == []


def test_there_and_back_computes_each_checkpoint_once(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
):
    computed: list[Path] = []

    def compute(source: Any, served: Any) -> Any:
        computed.append(source.path)
        return expected_checksums(source, served)

    monkeypatch.setattr(checksums, "expected_checksums", compute)
    with WeightServer(old) as double:
        for path in (new, old, new, old):
            assert push(double, path).checksums.says == "agrees"
        assert computed == [new, old]
        stated = [seen.path for seen in double.http.seen].count("/weights_checker")
        assert stated == 8, "what the server holds is asked of it before and after each push"


def test_a_checkpoint_that_was_written_to_is_computed_anew(old: Path, new: Path, tmp_path: Path):
    written = tmp_path / "written"
    shutil.copytree(new, written)
    with WeightServer(old) as double:
        assert push(double, written).checksums.says == "agrees"
        before = double.state["model.norm.weight"].clone()
        weights = load_file(written / "model.safetensors")
        weights["model.norm.weight"] += 1
        save_file(weights, written / "model.safetensors")
        assert push(double, written).checksums.says == "agrees"
        assert torch.equal(double.state["model.norm.weight"], before + 1)
        # And nothing that was kept excuses a server that did not take it.
        double.spoil = lambda number, tensors: tensors.clear()
        assert failed(double, old).checksums.says == "differs"


def test_few_checkpoints_are_kept(old: Path, new: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checksums.Computed, "KEPT", 1)
    served = ServedLayout.of(old, {"dtype": "float32"}, "cpu")
    kept = checksums.Computed()
    first = kept.expected(open_checkpoint(old), served)
    assert kept.expected(open_checkpoint(old), served) is first
    halves = ServedLayout.of(old, {"dtype": "float16"}, "cpu")
    other = kept.expected(open_checkpoint(old), halves)
    assert other.ranks != first.ranks, "the same files, held otherwise"
    assert kept.expected(open_checkpoint(old), served) is not first


def test_what_does_not_lead_there_is_said_before_anything_is_sent(old: Path, new: Path):
    with WeightServer(old) as double:
        with pytest.raises(SpecError, match="Choose one of cuda-ipc, disk"):
            push(double, new, route="pigeon")
        with pytest.raises(SpecError, match="runs on a CPU"):
            push(double, new, route="cuda-ipc")
        with pytest.raises(SpecError, match="init_weights_update_group"):
            push(double, new, route="distributed")
        double.server.may_change = False
        with pytest.raises(ReadOnly):
            push(double, new)
        assert double.log == []


def test_first_weights_are_known_by_their_checksums_whatever_they_are_called(old: Path, new: Path):
    """Somebody updated from disk and gave a label; then a tensor push by somebody else."""
    with WeightServer(old) as double:
        double.version = "somebody's"
        assert push(double, new).checksums.says == "agrees"
        assert double.server.weights._served.first_checksums is not None
    with WeightServer(old) as double:
        double.version = "somebody's"
        double.state["model.norm.weight"] = double.state["model.norm.weight"] + 1
        push(double, new)
        assert double.server.weights._served.first_checksums is None
        double.spoil = lambda number, _: refused("no")
        assert "unverified" in (failed(double, new).put_back or "")


def test_what_was_made_goes_at_the_end_and_the_control_of_the_next_push_stays(old: Path, new: Path):
    with WeightServer(old) as double:
        push(double, new)
        pusher = double.server.weights
        made = pusher._room() / "pushed-before"
        made.mkdir()
        served = pusher._served
        served.folder, served._pushed = made, (made, "its oracle")  # type: ignore[assignment]
        assert pusher.close() == []
        assert not made.exists()
        assert served.oracle() == "its oracle"
        served.folder = None
        assert served.oracle() is None
