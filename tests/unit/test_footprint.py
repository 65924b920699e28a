"""What models of 0.5B, 8B and 70B need, and what happens where it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_harness._base import headroom
from sglang_harness.checkpoint.footprint import (
    EXAMPLES,
    RoomNeeded,
    Size,
    least,
    push,
    reference_model,
    require,
    table,
    training,
    variant,
)
from sglang_harness.checkpoint.reading import TensorInfo
from sglang_harness.errors import ModelError, NotEnoughRoom
from sglang_harness.weights.pusher import BUCKET

DOCS = Path(__file__).parents[2] / "docs"


def llama(vocabulary: int, width: int, inner: int, layers: int, keys: int) -> list[TensorInfo]:
    """The tensors of a Llama in bfloat16, by its configuration. Args: keys: width of a key."""
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
    }
    for number in range(layers):
        front = f"model.layers.{number}."
        shapes |= {
            f"{front}self_attn.q_proj.weight": (width, width),
            f"{front}self_attn.k_proj.weight": (keys, width),
            f"{front}self_attn.v_proj.weight": (keys, width),
            f"{front}self_attn.o_proj.weight": (width, width),
            f"{front}mlp.gate_proj.weight": (inner, width),
            f"{front}mlp.up_proj.weight": (inner, width),
            f"{front}mlp.down_proj.weight": (width, inner),
        }
    return [TensorInfo(name, "bfloat16", shape) for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("8B", llama(128_256, 4096, 14_336, 32, 1024)),
        ("70B", llama(128_256, 8192, 28_672, 80, 1024)),
    ],
)
def test_the_size_that_tensors_have_is_that_of_the_model_that_they_make(
    name: str, tensors: list[TensorInfo]
):
    size, known = Size.of(tensors), EXAMPLES[name]
    assert size.parameters == pytest.approx(known.parameters, rel=1e-3)  # the norms are not there
    assert size.part == pytest.approx(known.part, rel=1e-3)
    assert size.largest == known.largest
    assert size.bytes_per_weight == 2


@pytest.mark.parametrize(
    ("name", "held", "streamed", "saved", "trained"),
    [
        ("0.5B", 2.2, 0.9, 1.0, 8.2),
        ("8B", 32.4, 3.2, 16.1, 128.8),
        ("70B", 282.5, 7.9, 141.1, 1129.1),
    ],
)
def test_what_models_need_in_gigabytes(
    name: str, held: float, streamed: float, saved: float, trained: float
):
    """An 8B model was loaded in float32 twice, and its second checkpoint written two times."""
    size = EXAMPLES[name]
    assert reference_model(size, streamed=False).memory / 1e9 == pytest.approx(held, abs=0.06)
    assert reference_model(size, streamed=True).memory / 1e9 == pytest.approx(streamed, abs=0.06)
    assert variant(size).disk / 1e9 == pytest.approx(saved, abs=0.06)
    assert push(size, bucket=BUCKET, staged=True).disk == variant(size).disk
    assert push(size, bucket=BUCKET, staged=False).disk == 0
    assert training(size).memory / 1e9 == pytest.approx(trained, abs=0.06)


def test_the_least_that_checks_take_is_the_larger_of_writing_and_scoring():
    size = EXAMPLES["8B"]
    assert least(size) == variant(size)
    many = Size(parameters=100 << 20, bytes_per_weight=2, largest=1 << 20, part=50 << 20)
    assert least(many).memory == reference_model(many, streamed=True).memory
    assert least(many).disk == variant(many).disk


def test_a_bucket_is_no_smaller_than_the_largest_tensor():
    small, large = EXAMPLES["0.5B"], EXAMPLES["70B"]
    assert push(small, bucket=1 << 30, staged=False).memory == 5 << 30
    assert push(large, bucket=1 << 20, staged=False).memory == 5 * 2 * large.largest


def there(monkeypatch: pytest.MonkeyPatch, memory: float, disk: float, tmpfs: bool = False) -> None:
    """What the machine has, in GB."""
    monkeypatch.setattr(
        headroom, "memory", lambda: headroom.Memory(int(memory * 1e9), "this machine")
    )
    monkeypatch.setattr(
        headroom, "disk", lambda folder: headroom.DiskRoom(folder, int(disk * 1e9), tmpfs)
    )


NEEDS = RoomNeeded(memory=2_000_000_000, disk=16_000_000_000)


def test_what_is_there_is_not_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    there(monkeypatch, 3, 17)
    require("It", NEEDS, tmp_path)
    there(monkeypatch, 19, 17, tmpfs=True)
    require("It", NEEDS, tmp_path)


@pytest.mark.parametrize(
    ("memory", "disk", "tmpfs", "said"),
    [
        (
            3,
            15,
            False,
            "It needs 16.0 GB of disk, and 15.0 GB are free in {folder}. Set TMPDIR to a folder "
            "with more space, or take a smaller model.",
        ),
        (
            1,
            17,
            False,
            "It needs 2.0 GB of memory, and 1.0 GB are available; the bound is this machine. "
            "Give it more memory, or take a smaller model.",
        ),
        (
            17,
            17,
            True,
            "It needs 18.0 GB of memory (16.0 GB of it for files: {folder} is a tmpfs), and "
            "17.0 GB are available; the bound is this machine. Set TMPDIR to a folder on a disk, "
            "or take a smaller model.",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    memory: float,
    disk: float,
    tmpfs: bool,
    said: str,
):
    there(monkeypatch, memory, disk, tmpfs)
    with pytest.raises(NotEnoughRoom) as refused:
        require("It", NEEDS, tmp_path)
    assert str(refused.value) == said.format(folder=tmp_path)
    assert isinstance(refused.value, ModelError)


def test_the_table_in_the_docs_is_the_functions():
    assert table(BUCKET) in (DOCS / "run-on-a-gpu-host.md").read_text(encoding="utf-8")
