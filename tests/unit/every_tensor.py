"""A state dict with tensors of every kind, and what it takes for a checkpoint to hold it."""

from __future__ import annotations

import torch

from sglang_harness.checkpoint.reading import Checkpoint


def state() -> dict[str, torch.Tensor]:
    """Names, dtypes and shapes of every kind; views as their owners save them."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(10, 12, generator=draw)
    return {
        "model.embed_tokens.weight": torch.randn(32, 8, generator=draw),
        "model.half.weight": torch.randn(16, 8, generator=draw).to(torch.bfloat16),
        "model.fp16.weight": torch.randn(16, 8, generator=draw).to(torch.float16),
        "model.double": torch.randn(3, generator=draw).double(),
        "model.fp8": torch.randn(4, 4, generator=draw).to(torch.float8_e4m3fn),
        "model.parameter": torch.nn.Parameter(torch.randn(5, generator=draw)),
        "model.scalar": torch.tensor(2.5),
        "model.empty": torch.empty(0, 3),
        "model.ids": torch.arange(7),
        "model.mask": torch.tensor([True, False, True]),
        "model.u16": torch.tensor([1, 65535], dtype=torch.uint16),
        "model.transposed": matrix.t(),
        "model.columns": matrix[:, 3:7],
        "model.rows": matrix[2:5],
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    got = list(checkpoint.read())
    assert [name for name, _ in got] == list(checkpoint.tensors)
    for name, tensor in got:
        info, wanted = checkpoint.tensors[name], expected[name]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
        assert (f"torch.{info.dtype}", info.shape) == (str(wanted.dtype), tuple(wanted.shape))
        assert tensor.is_contiguous(), name
        assert not tensor.requires_grad
        assert raw(tensor) == raw(wanted), name
        assert info.nbytes == len(raw(wanted))
    assert checkpoint.nbytes == sum(len(raw(t)) for t in expected.values())
    # Into memory that is there already, and full of something else.
    rooms = {name: torch.ones(wanted.shape).to(wanted.dtype) for name, wanted in expected.items()}
    checkpoint.read_into(rooms.items())
    for name, wanted in expected.items():
        assert raw(rooms[name]) == raw(wanted), name


def contiguous() -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in state().items()}
