"""What a model needs of the machine that the harness runs on: memory and disk, for each thing
that is done with it. Pure functions of its size, and one look at what is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sglang_harness._base import headroom
from sglang_harness.checkpoint.reading import TensorInfo, open_checkpoint
from sglang_harness.errors import NotEnoughRoom

#: Bytes of a weight in float32, in which everything is computed here.
FLOAT32 = 4

#: Bytes for what is computed beside the weights: hidden states, keys and values, and the logits
#: of some hundred tokens, 0.5 MB each in float32 with a vocabulary of 128 000.
BESIDE = 256 << 20

#: Copies of a bucket that are in memory at a time when it is sent in the body of a request: the
#: tensors, their pickle, that in base64 and the request (4/3 each).
COPIES_OF_A_BUCKET = 5


@dataclass(frozen=True)
class Size:
    """How large a model is. Counts are of weights (elements), not of bytes.

    Attributes:
        parameters: all weights.
        bytes_per_weight: as they are saved, on average.
        largest: those of the largest tensor.
        part: those that are in memory at a time when the weights are read layer by layer: the
            largest layer beside the largest of what is outside of the layers.
    """

    parameters: int
    bytes_per_weight: float
    largest: int
    part: int

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo]) -> Size:
        """By the tensors of a checkpoint. A layer is what has the same first number in its name:
        ``model.layers.7.``."""
        parameters = nbytes = largest = 0
        units: dict[str, Counter[tuple[int, ...]]] = {}
        for info in tensors:
            count = _elements(info.shape)
            parameters += count
            nbytes += info.nbytes
            largest = max(largest, count)
            layer = _LAYER.match(info.name)
            units.setdefault(layer[0] if layer else info.name, Counter())[info.shape] += 1
        together: Counter[tuple[int, ...]] = Counter()
        for shapes in units.values():
            together |= shapes  # a room serves every tensor of its shape, one unit after another
        part = sum(_elements(shape) * times for shape, times in together.items())
        return cls(parameters, nbytes / max(1, parameters), largest, part)

    @classmethod
    def of_folder(cls, folder: Path) -> Size:
        """By the headers of the checkpoint in ``folder``. Raises as :func:`open_checkpoint`."""
        return cls.of(open_checkpoint(folder).tensors.values())

    @property
    def saved_bytes(self) -> int:
        """Of the weights on disk."""
        return round(self.parameters * self.bytes_per_weight)


_LAYER = re.compile(r".*?\.\d+\.")


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for one in shape:
        count *= one
    return count


@dataclass(frozen=True)
class RoomNeeded:
    """Bytes that are taken at a time.

    Attributes:
        memory: that cannot be given up: caches of files are not in it.
        disk: in the folder for temporary files.
    """

    memory: int
    disk: int = 0


def reference_model(size: Size, *, streamed: bool) -> RoomNeeded:
    """Log-probabilities of transformers in float32.

    Args:
        streamed: the weights are read anew, layer by layer, for every answer that is scored:
            slower by the reading, with the same results. Otherwise they are held.
    """
    return RoomNeeded(FLOAT32 * (size.part if streamed else size.parameters) + BESIDE)


def variant(size: Size) -> RoomNeeded:
    """A second checkpoint, written tensor by tensor: the old one, noise and sum in float32, and
    the new one."""
    memory = size.largest * (2 * size.bytes_per_weight + 2 * FLOAT32)
    return RoomNeeded(round(memory), size.saved_bytes)


def push(size: Size, *, bucket: int, staged: bool) -> RoomNeeded:
    """Weights on their way to a server, without the reference models that check them.

    Args:
        bucket: bytes that travel together.
        staged: a copy is written for the server: the checkpoint is not safetensors, or is on
            another file system than the folder that the server reads.
    """
    memory = COPIES_OF_A_BUCKET * max(bucket, round(size.largest * size.bytes_per_weight))
    return RoomNeeded(memory, size.saved_bytes if staged else 0)


def training(size: Size) -> RoomNeeded:
    """Some steps of AdamW: weights, gradients and two moments in float32, and a checkpoint."""
    return RoomNeeded(4 * FLOAT32 * size.parameters + BESIDE, size.saved_bytes)


def least(size: Size) -> RoomNeeded:
    """What the checks of a model take at a time that push a second checkpoint: that is written, or
    one reference model is streamed after the other."""
    written = variant(size)
    return RoomNeeded(
        max(written.memory, reference_model(size, streamed=True).memory), written.disk
    )


#: Models of the field in bfloat16, by their names there: Qwen2.5-0.5B, Llama-3.1-8B and -70B. The
#: figures are those of their configurations: vocabulary x width, and one decoder layer.
EXAMPLES = {
    "0.5B": Size(494_032_768, 2, 151_936 * 896, 151_936 * 896 + 14_912_384),
    "8B": Size(8_030_261_248, 2, 128_256 * 4_096, 128_256 * 4_096 + 218_112_000),
    "70B": Size(70_553_706_496, 2, 128_256 * 8_192, 128_256 * 8_192 + 855_654_400),
}


def table(bucket: int) -> str:
    """What the examples need, as Markdown. Args: bucket: as :func:`push` takes it."""
    rows = [
        "| | reference model, held | reference model, streamed | second checkpoint | push |",
        "|---|---|---|---|---|",
    ]
    for name, size in EXAMPLES.items():
        cells = (
            reference_model(size, streamed=False),
            reference_model(size, streamed=True),
            variant(size),
            push(size, bucket=bucket, staged=True),
        )
        rows.append(f"| {name} | {' | '.join(map(in_words, cells))} |")
    return "\n".join(rows)


def in_words(needs: RoomNeeded) -> str:
    memory = f"{gigabytes(needs.memory)} memory"
    return f"{memory}, {gigabytes(needs.disk)} disk" if needs.disk else memory


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def require(
    what: str, needs: RoomNeeded, folder: Path | None = None, *, less: str = "take a smaller model"
) -> None:
    """Looks before anything is loaded or written.

    Args:
        what: that needs it, as a message begins: ``The second checkpoint of /models/x``.
        folder: where the disk is needed.
        less: what a person can do to need less.

    Raises:
        NotEnoughRoom: says what is needed, what is there, and what to do.
    """
    memory = needs.memory
    if folder is not None and needs.disk:
        disk = headroom.disk(folder)
        if needs.disk > disk.free:
            raise NotEnoughRoom(
                f"{what} needs {gigabytes(needs.disk)} of disk, and {gigabytes(disk.free)} are "
                f"free in {folder}.",
                advice=f"Set TMPDIR to a folder with more space, or {less}.",
            )
        if disk.in_memory:
            memory += needs.disk
    there = headroom.memory()
    if memory > there.available:
        in_memory = memory - needs.memory
        tmpfs = f" ({gigabytes(in_memory)} of it for files: {folder} is a tmpfs)"
        raise NotEnoughRoom(
            f"{what} needs {gigabytes(memory)} of memory{tmpfs if in_memory else ''}, and "
            f"{gigabytes(there.available)} are available; the bound is {there.limited_by}.",
            advice=(
                f"Set TMPDIR to a folder on a disk, or {less}."
                if in_memory
                else f"Give it more memory, or {less}."
            ),
        )
