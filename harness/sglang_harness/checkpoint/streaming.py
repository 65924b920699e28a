"""A model of transformers that holds no weights: a layer's are read from the checkpoint when it
computes, into memory that the next layer uses again.

The weights of a model in float32 take twice the memory of its checkpoint in 16 bit. Computed
this way a model takes the memory of its largest layer beside that of its largest other tensor
(embeddings, output). The results are the same to the bit: the same modules compute with the same
values; only when these are read differs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness.checkpoint.formats.spans import empty
from sglang_harness.checkpoint.model_tensors import names_on_disk
from sglang_harness.checkpoint.reading import Checkpoint, TensorInfo, open_checkpoint
from sglang_harness.errors import MissingExtra, ModelError

if TYPE_CHECKING:
    import torch


class NotStreamable(ModelError):
    """The model cannot be computed from its files layer by layer; it has to be held whole."""


def streamed(folder: Path) -> Any:
    """The model in ``folder``, as ``AutoModelForCausalLM.from_pretrained`` gives it in float32.

    It computes inside ``torch.inference_mode`` only, and one pass at a time.

    Raises:
        MissingExtra: torch, transformers or accelerate is not installed.
        NotStreamable: quantised weights; or parameters that are other than what is on disk in
            more than their names and the stacking of experts.
        ModelError: the folder cannot be read.
    """
    try:
        import torch
        from accelerate.big_modeling import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ImportError:
        raise MissingExtra("Reading a model layer by layer", "torch") from None
    checkpoint = open_checkpoint(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None):
            raise NotStreamable(f"The weights in {folder} are quantised.")
        # The tables of rotary embeddings are computed, not saved: these are made.
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise NotStreamable(f"transformers cannot make a model of {folder}: {reason}.") from None
    places = _places(model, checkpoint, folder)
    _fill_buffers(model, checkpoint)
    _Reading(checkpoint, places).follow(model)
    return model.eval()


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the checkpoint goes in a parameter: so many elements from ``first`` on,
    in row-major order."""

    name: str
    shape: tuple[int, ...]
    first: int

    def room(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.view(-1)[self.first : self.first + prod(self.shape)].view(self.shape)


def _places(model: Any, checkpoint: Checkpoint, folder: Path) -> dict[int, tuple[_Place, ...]]:
    """By the parameter's ``id``, what it is made of. Tied parameters are one object."""
    found: dict[int, tuple[_Place, ...]] = {}
    other: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        info = checkpoint.tensors.get(name)
        if info is not None and info.shape == tuple(parameter.shape):
            found.setdefault(id(parameter), (_Place(name, info.shape, 0),))
        else:
            other[name] = parameter
    missing = {name: each for name, each in other.items() if id(each) not in found}
    for name, places in _by_conversion(model, missing, checkpoint.tensors).items():
        found[id(missing[name])] = places
    if lacking := [name for name, each in missing.items() if id(each) not in found]:
        raise NotStreamable(
            f"The checkpoint in {folder} has {lacking[0]} in another form than transformers."
        )
    return found


def _by_conversion(
    model: Any, parameters: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, tuple[_Place, ...]]:
    """Parameters that transformers renames or stacks when it loads them.

    transformers 5 keeps a mixture's experts in one tensor in memory and apart on disk, and tells
    how one becomes the other. It is asked with the numbers of rows in place of rows: what comes
    back tells which rows are which tensor on disk.
    """
    import torch

    asked: dict[str, Any] = {}
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        rows = (*shape[:-1], 1) if len(shape) > 1 else shape
        # Apart from those of every other parameter.
        begin = len(asked) * _APART
        asked[name] = torch.arange(begin, begin + prod(rows)).view(rows)
    try:
        told = names_on_disk(model, asked) if asked else {}
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}
    names = list(asked)
    made: dict[str, list[_Place]] = {}
    for on_disk, rows in told.items():
        info = tensors.get(on_disk)
        first = int(rows.reshape(-1)[0]) if rows.numel() else 0
        if info is None or not torch.equal(
            rows.reshape(-1), torch.arange(first, first + rows.numel())
        ):
            continue
        number, row = divmod(first, _APART)
        shape = tuple(parameters[names[number]].shape)
        width = shape[-1] if len(shape) > 1 else 1
        if prod(info.shape) == rows.numel() * width and info.shape[-1:] == shape[-1:]:
            made.setdefault(names[number], []).append(_Place(on_disk, info.shape, row * width))
    return {
        name: tuple(places)
        for name, places in made.items()
        if sum(prod(place.shape) for place in places) == parameters[name].numel()
    }


#: Between the numbers of one parameter's rows and of the next one's.
_APART = 1 << 40


def _fill_buffers(model: Any, checkpoint: Checkpoint) -> None:
    """Those that are saved, such as the biases of some routers; small, and held."""
    saved = {name: each for name, each in model.named_buffers() if name in checkpoint.tensors}
    for (_, buffer), (_, read) in zip(saved.items(), checkpoint.read(list(saved)), strict=True):
        buffer.copy_(read)


@dataclass(frozen=True)
class _Slot:
    """A parameter of a module, and what fills it.

    Attributes:
        module: does not live by this: a model that is released gives its memory back at once.
    """

    module: Any
    name: str
    shape: tuple[int, ...]
    places: tuple[_Place, ...]


class _Reading:
    """Fills the parameters of a part of the model before it computes, and takes them back after.

    Args:
        places: by a parameter's ``id``, what it is made of.
    """

    def __init__(self, checkpoint: Checkpoint, places: Mapping[int, tuple[_Place, ...]]) -> None:
        self._checkpoint = checkpoint
        self._places = places
        self._free: dict[tuple[int, ...], list[torch.Tensor]] = {}
        """Memory that is not in use, by the shape of the tensors it was made for."""

    def follow(self, model: Any) -> None:
        for part in _parts(model):
            slots = [
                _Slot(
                    weakref.proxy(module), name, tuple(parameter.shape), self._places[id(parameter)]
                )
                for module in part.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None
            ]
            part.register_forward_pre_hook(lambda *_, slots=slots: self._fill(slots))
            kept = [slot.module._parameters[slot.name] for slot in slots]
            part.register_forward_hook(
                lambda *_, slots=slots, kept=kept: self._take_back(slots, kept), always_call=True
            )

    def _fill(self, slots: list[_Slot]) -> None:
        import torch

        rooms = []
        for slot in slots:
            free = self._free.setdefault(slot.shape, [])
            memory = free.pop() if free else empty(slot.shape, "float32")
            slot.module._parameters[slot.name] = torch.nn.Parameter(memory, requires_grad=False)
            rooms += [(place.name, place.room(memory)) for place in slot.places]
        self._checkpoint.read_into(rooms)

    def _take_back(self, slots: list[_Slot], kept: list[Any]) -> None:
        for slot, parameter in zip(slots, kept, strict=True):
            filled = slot.module._parameters[slot.name]
            if filled is not parameter:
                self._free[slot.shape].append(filled.data)
                slot.module._parameters[slot.name] = parameter


def _parts(module: Any, *, in_list: bool = False) -> Iterator[Any]:
    """What is filled at a time: a decoder layer as a whole, as its code may use a weight outside
    of the module that has it; and each module with weights that is in no list of layers."""
    import torch

    if in_list or any(parameter is not None for parameter in module._parameters.values()):
        yield module
        return
    for child in module.children():
        yield from _parts(child, in_list=isinstance(module, torch.nn.ModuleList))
