"""Every layout that a trainer leaves is read alike, tensor by tensor, and nothing in it runs."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from every_tensor import assert_holds, contiguous, raw, state
from safetensors.torch import save_file

from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import (
    write_distributed,
    write_torch,
)
from sglang_harness.errors import BrokenCheckpoint, ModelError, ShardedCheckpoint

HERE = Path(__file__).parent


def optimizer_state() -> dict[str, Any]:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


# --- every layout -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "pytorch_model.bin", "checkpoint"])
def test_a_state_dict_of_torch_is_read(tmp_path: Path, name: str):
    file = write_torch(tmp_path / name, state())
    opened = open_checkpoint(file)
    assert_holds(opened, state())
    assert opened.layout == "torch zip"
    assert opened.path == file
    assert opened.notes == ()


def test_a_file_of_torch_before_1_6_is_refused_with_what_to_do(tmp_path: Path):
    file = tmp_path / "a.pt"
    torch.save(state(), file, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"torch before 1\.6") as refused:
        open_checkpoint(file)
    assert refused.value.advice == (
        "Write it again: torch.save(torch.load(path, weights_only=True), path)."
    )


def test_safetensors_are_read_from_a_file_and_from_a_folder(tmp_path: Path):
    save_file(contiguous(), tmp_path / "model.safetensors")
    assert_holds(open_checkpoint(tmp_path / "model.safetensors"), contiguous())
    assert_holds(open_checkpoint(tmp_path), contiguous())
    assert open_checkpoint(str(tmp_path)).layout == "safetensors"


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one(tmp_path: Path, kind: str, indexed: bool):
    whole, names = contiguous(), {}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for number in range(3):
        part = dict(list(whole.items())[number::3])
        file = f"{stem}-{number + 1:05}-of-00003.{kind}"
        (save_file if kind == "safetensors" else torch.save)(part, tmp_path / file)
        names |= dict.fromkeys(part, file)
    if indexed:
        index = {"metadata": {}, "weight_map": names}
        (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    opened = open_checkpoint(tmp_path)
    assert_holds(opened, whole)
    assert opened.layout.endswith(", sharded")
    (tmp_path / f"{stem}-00002-of-00003.{kind}").unlink()
    with pytest.raises(ModelError, match="lacks") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.advice == "Finish the download."


def test_a_distributed_checkpoint_is_read_without_its_optimizer(tmp_path: Path):
    content = {"model": contiguous(), "optim": optimizer_state(), "step": 3}
    opened = open_checkpoint(write_distributed(tmp_path / "dcp", content))
    assert_holds(opened, contiguous())
    assert opened.layout == "distributed checkpoint"
    assert opened.notes == ("weights under model", "not read: 'optim'")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a real trainer of two ranks leaves (FSDP 2 over gloo)."""
    folder = tmp_path_factory.mktemp("two ranks")
    command = [sys.executable, "-W", "ignore", str(HERE / "two_ranks.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        told = [rank.communicate(timeout=300)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], told
    return folder


def test_fsdp_shards_and_column_shards_are_put_together(two_ranks: Path):
    reference = torch.load(two_ranks / "reference.pt", weights_only=True)
    opened = open_checkpoint(two_ranks / "fsdp")
    assert_holds(opened, reference)
    # They really were in parts, in two files.
    assert {len(places) for places in opened._places.values()} == {2}
    assert_holds(open_checkpoint(two_ranks / "sharded"), {"weight": torch.ones(4, 4)})


def test_the_full_state_of_fsdp_is_read(two_ranks: Path):
    reference = torch.load(two_ranks / "reference.pt", weights_only=True)
    del reference["columns"]
    assert_holds(open_checkpoint(two_ranks / "full.pt"), reference)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model_world_size_2_rank_0.pt", "DTensor"), ("sharded_1.pt", "ShardedTensor"), (".", "rank")],
)
def test_files_of_single_ranks_are_refused_with_the_conversion(
    two_ranks: Path, name: str, kind: str
):
    with pytest.raises(ShardedCheckpoint, match=kind) as caught:
        open_checkpoint(two_ranks / name)
    assert "dcp.save(" in caught.value.advice
    assert "verl.model_merger" in caught.value.advice


def test_a_distributed_checkpoint_of_which_a_node_is_missing_is_refused(
    two_ranks: Path, tmp_path: Path
):
    copy = shutil.copytree(two_ranks / "fsdp", tmp_path / "copy")
    (copy / "__1_0.distcp").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"lacks __1_0\.distcp"):
        open_checkpoint(copy)


# --- where the weights are, and their names -----------------------------------------------------


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"module": s, "optimizer": optimizer_state()},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": optimizer_state(), "loss": 0.5},
        lambda s: {"app": {"model": s, "optim": optimizer_state()}},
        lambda s: {"state_dict": {"model": s}},
        lambda s: {"weights": s, "step": 3},
        lambda s: {"model": s, "step": torch.tensor(3), "rng": torch.get_rng_state()},
        lambda s: {"model": s, "args": argparse.Namespace(lr=1), "np": numpy.random.get_state()},
        lambda s: {**s, "step": 3, "note": "text", "none": None},
    ],
)
def test_weights_are_found_beside_whatever_a_trainer_keeps(tmp_path: Path, nest):
    assert_holds(open_checkpoint(write_torch(tmp_path / "a.pt", nest(state()))), state())


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}",
        "module.module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_fsdp_wrapped_module.{}",
        "_fsdp_wrapped_module._checkpoint_wrapped_module.{}",
    ],
)
def test_the_marks_of_wrappers_are_taken_off(tmp_path: Path, wrap: str):
    wrapped = {wrap.format(name): tensor for name, tensor in state().items()}
    opened = open_checkpoint(write_torch(tmp_path / "a.pt", {"model": wrapped}))
    assert_holds(opened, state())
    assert opened.saved_as["model.half.weight"] == wrap.format("model.half.weight")
    assert any("wrappers" in note for note in opened.notes)


def test_marks_inside_names_are_taken_off_too(tmp_path: Path):
    file = write_torch(
        tmp_path / "a.pt", {"model.layers.0._fsdp_wrapped_module.mlp._orig_mod.w": torch.ones(2)}
    )
    assert list(open_checkpoint(file).tensors) == ["model.layers.0.mlp.w"]


def test_two_names_that_become_one_are_refused(tmp_path: Path):
    file = write_torch(tmp_path / "a.pt", {"a.w": torch.ones(2), "_orig_mod.a.w": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"are both a\.w"):
        open_checkpoint(file)


def test_a_module_that_only_some_names_have_stays(tmp_path: Path):
    content = {"module.a": torch.ones(2), "b.c": torch.ones(2)}
    assert set(open_checkpoint(write_torch(tmp_path / "a.pt", content)).tensors) == set(content)


def test_of_two_models_neither_is_guessed(tmp_path: Path):
    file = write_torch(tmp_path / "a.pt", {"generator": state(), "critic": state()})
    with pytest.raises(ModelError, match="generator, critic") as caught:
        open_checkpoint(file)
    assert "'model'" in caught.value.advice


@pytest.mark.parametrize("content", [{}, {"a": 1}, [torch.ones(2)], torch.ones(2), None, {1: 2}])
def test_what_holds_no_named_tensors_is_refused(tmp_path: Path, content: Any):
    with pytest.raises(ModelError, match="does not hold named tensors"):
        open_checkpoint(write_torch(tmp_path / "a.pt", content))


def test_a_folder_of_the_hugging_face_trainer_is_read_past_what_lies_beside(tmp_path: Path):
    write_torch(tmp_path / "pytorch_model.bin", state())
    for beside in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / beside).write_bytes(b"not to be touched")
    assert_holds(open_checkpoint(tmp_path), state())


def test_of_several_files_none_is_guessed(tmp_path: Path):
    write_torch(tmp_path / "step1.pt", state())
    write_torch(tmp_path / "step2.pt", state())
    with pytest.raises(ModelError, match=r"step1\.pt, step2\.pt"):
        open_checkpoint(tmp_path)


def test_a_folder_above_the_right_one_is_told_so(tmp_path: Path):
    (tmp_path / "global_step_10").mkdir()
    with pytest.raises(ModelError, match="does not hold a checkpoint") as caught:
        open_checkpoint(tmp_path)
    assert "global_step_10" in caught.value.advice
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


# --- reading ------------------------------------------------------------------------------------


def test_some_tensors_are_read_in_the_order_asked_for(tmp_path: Path):
    opened = open_checkpoint(write_torch(tmp_path / "a.pt", state()))
    names = ["model.ids", "model.half.weight"]
    assert [name for name, _ in opened.read(names)] == names
    assert list(opened.read([])) == []
    with pytest.raises(KeyError, match=r"no\.such"):
        opened.read(["no.such"])


def test_tensors_are_brought_to_a_dtype_as_torch_would(tmp_path: Path):
    opened = open_checkpoint(write_torch(tmp_path / "a.pt", state()))
    floats = {n: "bfloat16" for n, i in opened.tensors.items() if "float" in i.dtype}
    for name, tensor in opened.read(dtypes=floats):
        expected = state()[name]
        if name in floats:
            expected = expected.to(torch.bfloat16)
        assert tensor.dtype == expected.dtype
        assert raw(tensor) == raw(expected), name


def test_a_large_tensor_is_brought_to_a_dtype_in_pieces_without_a_seam(tmp_path: Path):
    large = torch.randn(4_500_001).to(torch.bfloat16)
    opened = open_checkpoint(write_torch(tmp_path / "a.pt", {"a.b": large}))
    ((_, got),) = opened.read(dtypes={"a.b": "float32"})
    assert torch.equal(got, large.float())
    ((_, got),) = opened.read()
    assert torch.equal(got, large)
    # It is its receiver's: nothing else sees what is done to it.
    got.zero_()
    assert torch.equal(dict(opened.read())["a.b"], large)


def test_a_file_that_is_written_anew_meanwhile_is_noticed(tmp_path: Path):
    file = write_torch(tmp_path / "a.pt", state())
    opened = open_checkpoint(file)
    write_torch(file, state())
    with pytest.raises(BrokenCheckpoint, match="written to after"):
        list(opened.read())
    with pytest.raises(BrokenCheckpoint, match="written to after"):
        opened.read_into([("model.ids", torch.zeros(7, dtype=torch.int64))])
    file.unlink()
    with pytest.raises(BrokenCheckpoint, match="cannot be read any more"):
        list(opened.read())


def test_a_room_of_another_shape_is_refused_and_one_of_another_dtype_is_filled(tmp_path: Path):
    opened = open_checkpoint(write_torch(tmp_path / "a.pt", state()))
    with pytest.raises(ValueError, match="its room"):
        opened.read_into([("model.half.weight", torch.zeros(8, 16))])
    with pytest.raises(KeyError, match="does not hold other"):
        opened.read_into([("other", torch.zeros(1))])
    room = torch.zeros(16, 8)
    opened.read_into([("model.half.weight", room)])
    assert torch.equal(room, state()["model.half.weight"].float())


def test_content_is_equal_until_a_file_is_written_to(tmp_path: Path):
    file = write_torch(tmp_path / "a.pt", state())
    before = open_checkpoint(file).content
    assert open_checkpoint(file).content == before
    assert hash(before) == hash(open_checkpoint(file).content)
    write_torch(file, state())
    assert open_checkpoint(file).content != before
    assert open_checkpoint(write_torch(tmp_path / "b.pt", state())).content != before


MEMORY = """
import sys
import tempfile
from pathlib import Path
import numpy, torch
from sglang_harness.checkpoint.reading import open_checkpoint

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10

# What the first tensor costs once: threads, kernels.
torch.ones(1 << 20).to(torch.bfloat16).sum()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
opened = open_checkpoint(sys.argv[1])
dtypes = dict.fromkeys(opened.tensors, sys.argv[2])
total = 0
for _, tensor in opened.read(dtypes=dtypes):
    total += tensor.nbytes
print(status("VmHWM") - before, total)
"""


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("safetensors", "bfloat16"),
        ("zip", "bfloat16"),
        ("dcp", "bfloat16"),
        ("safetensors", "float32"),
    ],
)
def test_memory_stays_near_the_largest_tensor(tmp_path: Path, layout: str, dtype: str):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory can only be measured on Linux")
    largest = 8 << 20
    whole = {f"l.{n}": torch.ones(largest // 2, dtype=torch.bfloat16) for n in range(24)}
    if layout == "safetensors":
        save_file(whole, path := tmp_path / "a.safetensors")
    elif layout == "dcp":
        path = write_distributed(tmp_path / "a", whole)
    else:
        path = write_torch(tmp_path / "a.pt", whole)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), dtype], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak, total = map(int, done.stdout.split())
    wide = 2 if dtype == "float32" else 1
    assert total == 24 * largest * wide
    # The one that is handed out and the one that is read, the piece that is converted (8 MiB)
    # and what Python itself takes. Mapped pages of the file would count here too, and 192 MiB
    # of them would not fit.
    assert peak < 2 * largest * wide + (8 << 20) + (12 << 20)
