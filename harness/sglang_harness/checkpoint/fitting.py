"""Does a checkpoint fit a model? Decided by names, shapes and dtypes before anything is sent; then
it is read under the model's names and in its dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from sglang_harness.checkpoint.model_tensors import COMPUTED, ExpectedTensors, expected_by
from sglang_harness.checkpoint.reading import Checkpoint, TensorInfo
from sglang_harness.errors import CheckpointMismatch, ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["Fit", "Misfit", "NotFinite", "fit", "not_finite", "raise_if_not_finite"]

#: Dtypes that are converted to each other. Others (integers, and 8-bit floats, whose values mean
#: nothing without a scale) have to be what the model expects.
CONVERTIBLE = frozenset({"bfloat16", "float16", "float32", "float64"})

#: What a trainer keeps in the model and no server uses: value heads. Noted, and not sent.
TRAINERS_OWN = ("v_head.*", "value_head.*", "score.*", "*.v_head.*")

#: How many names a message gives.
_FIRST = 5


@dataclass(frozen=True)
class Misfit:
    """A tensor with another shape, or a dtype that is not converted.

    Attributes:
        name: as the model has it.
        expected: shape and dtype, as a person reads them: ``(128, 64) bfloat16``.
        got: the same of the checkpoint.
    """

    name: str
    expected: str
    got: str


@dataclass(frozen=True)
class NotFinite:
    """A tensor with values that are NaN or infinite.

    Attributes:
        name: as the model has it.
        nans: how many of its values are NaN.
        infinities: how many are infinite, in the dtype that the model expects.
        values: how many there are.
    """

    name: str
    nans: int
    infinities: int
    values: int


@dataclass(frozen=True, eq=False)
class Fit:
    """A checkpoint compared with a model.

    Attributes:
        sources: the checkpoint's name of each tensor of the model that it has, by the model's
            name, in the order of the checkpoint's files.
        missing: what the model expects and the checkpoint lacks; tied weights are not among it.
        extra: what the checkpoint has and the model does not.
        misshaped: what both have, in shapes or dtypes that cannot be reconciled.
        converted: the dtypes from which and to which each tensor goes that changes its dtype.
        notes: what a person should know, the checkpoint's own notes first.
    """

    checkpoint: Checkpoint
    expected: ExpectedTensors
    sources: Mapping[str, str]
    missing: tuple[TensorInfo, ...]
    extra: tuple[TensorInfo, ...]
    misshaped: tuple[Misfit, ...]
    converted: Mapping[str, tuple[str, str]]
    notes: tuple[str, ...]
    _dtypes: Mapping[str, str]
    _copies: Mapping[str, str]
    """The checkpoint's name of each copy of a tied weight, and of that weight."""

    @property
    def renamed(self) -> Mapping[str, str]:
        """The checkpoint's name by the model's, where they differ."""
        return {name: own for name, own in self.sources.items() if name != own}

    @property
    def nbytes(self) -> int:
        """Of all tensors, in the dtypes that the model expects."""
        return sum(
            TensorInfo(name, self._dtypes[name], self.checkpoint.tensors[own].shape).nbytes
            for name, own in self.sources.items()
        )

    def raise_if_unfit(self, *, allow: Iterable[str] = ()) -> None:
        """Rejects a checkpoint of another model.

        Args:
            allow: patterns (``mtp.*``) of names that may be missing or extra.

        Raises:
            CheckpointMismatch: with the first five names that do not fit.
        """
        patterns = tuple(allow)

        def counts(name: str) -> bool:
            return not any(fnmatchcase(name, pattern) for pattern in patterns)

        wrong = [(m.name, f"expected {m.expected}, got {m.got}") for m in self.misshaped]
        missing = [(t.name, f"missing, expected {_told(t)}") for t in self.missing]
        extra = [(t.name, f"extra, {_told(t)}") for t in self.extra]
        missing, extra = ([x for x in each if counts(x[0])] for each in (missing, extra))
        if not (all_ := wrong + missing + extra):
            return
        first = "; ".join(f"{name} ({why})" for name, why in all_[:_FIRST])
        more = f"; and {len(all_) - _FIRST} more" if len(all_) > _FIRST else ""
        raise CheckpointMismatch(
            f"{self.checkpoint.path} does not fit {self.expected.source}: {len(missing)} missing, "
            f"{len(extra)} extra, {len(wrong)} of another shape or dtype, {len(self.sources)} "
            f"that fit. {first}{more}.",
            tuple(name for name, _ in all_),
            advice=_advice([name for name, _ in extra]),
        )

    def raise_if_not_finite(self) -> None:
        """Rejects NaN and infinite values, also those that the model's dtype makes of large
        ones, and copies of tied weights that differ. Reads every tensor once.

        Raises:
            CheckpointMismatch: with the first five names.
        """
        raise_if_not_finite(self.checkpoint.path, self.read())
        if untied := self.check_tied():
            name, own = next(iter(untied.items()))
            raise CheckpointMismatch(
                f"{self.checkpoint.path}: {name} is not {own}, although the model ties them; "
                f"the server would use {own} for both.",
                tuple(untied),
                advice="Train with tied embeddings, or serve a model that does not tie them.",
            )

    def check_finite(self) -> tuple[NotFinite, ...]:
        """Every tensor that has values that are not finite. One streamed pass."""
        return _not_finite(self.read())

    def check_tied(self) -> dict[str, str]:
        """Copies of tied weights that differ from what they should be copies of. Two tensors
        are in memory at a time."""
        return {
            copy: own for copy, own in self._copies.items() if not _equal(*self._tied(copy, own))
        }

    def _tied(self, copy: str, own: str) -> Iterator[torch.Tensor]:
        """Both as they are served: a trainer may keep one of them in another dtype."""
        served = {self.sources[name]: self._dtypes[name] for name in self.sources}
        dtype = served.get(own, self.checkpoint.tensors[own].dtype)
        convertible = self.checkpoint.tensors[copy].dtype in CONVERTIBLE and dtype in CONVERTIBLE
        dtypes = {own: dtype, copy: dtype} if convertible else {own: dtype}
        return (tensor for _, tensor in self.checkpoint.read([copy, own], dtypes=dtypes))

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors one after another under the model's names and in its dtypes: contiguous, on
        the CPU, each with memory of its own. Misshaped ones are not among them.

        Args:
            names: which ones, by the model's names; all, in the order of the files, where not
                given.

        Raises:
            BrokenCheckpoint: a file ends early, or changed since it was opened.
            KeyError: a name that does not fit.
        """
        wanted = list(self.sources if names is None else names)
        stream = self.checkpoint.read(
            [self.sources[name] for name in wanted],
            dtypes={own: self._dtypes[name] for name, own in self.sources.items()},
        )
        # Bound to no name: what was handed out is its receiver's alone.
        return zip(wanted, (tensor for _, tensor in stream), strict=True)

    def read_into(self, rooms: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As :meth:`Checkpoint.read_into`, by the model's names."""
        self.checkpoint.read_into((self.sources[name], room) for name, room in rooms)

    @property
    def content(self) -> Hashable:
        """Equal for the same files under the same names and in the same dtypes."""
        named = frozenset((name, own, self._dtypes[name]) for name, own in self.sources.items())
        return (self.checkpoint.content, named)


def fit(checkpoint: Checkpoint, model_folder: Path | str, *, dtype: str | None = None) -> Fit:
    """Compares the checkpoint with the model in ``model_folder``. Reads no tensor.

    Args:
        dtype: of all floating-point weights, for a server that was told to use another than the
            model's own; as torch names it, without ``torch.``.

    Raises:
        ModelError: what the folder expects is not known; see :func:`.model_tensors.expected_by`.
        MissingExtra: the folder has no weights, and transformers is not installed.
    """
    if dtype is not None and dtype not in CONVERTIBLE:
        raise ModelError(
            f"Weights cannot be converted to {dtype}.",
            advice=f"Give one of {sorted(CONVERTIBLE)}.",
        )
    expected = expected_by(Path(model_folder))
    wanted, have = expected.tensors, checkpoint.tensors
    names = _renamed(list(have), {**wanted, **dict.fromkeys(expected.tied)})
    by_model = {model: own for own, model in names.items()}
    notes = list(checkpoint.notes)
    copies = {}
    for copy, owner in expected.tied.items():
        if copy in by_model and owner in by_model:
            copies[by_model[copy]] = by_model[owner]
            if copy not in wanted:
                del by_model[copy]
                notes.append(f"{copy} is not sent: the model ties it to {owner}")
        elif copy in by_model and copy not in wanted:
            # Of two names for one weight a trainer kept the other one.
            by_model[owner] = by_model.pop(copy)
    sources, dtypes, converted, misshaped = {}, {}, {}, []
    for name, own in sorted(by_model.items(), key=_order(list(have))):
        ours, theirs = wanted[name], have[own]
        target = dtype if dtype and ours.dtype in CONVERTIBLE else ours.dtype
        if ours.shape != theirs.shape or (
            target != theirs.dtype and not {target, theirs.dtype} <= CONVERTIBLE
        ):
            expects = TensorInfo(name, target, ours.shape)
            misshaped.append(Misfit(name, _told(expects), _told(theirs)))
            continue
        sources[name], dtypes[name] = own, target
        if target != theirs.dtype:
            converted[name] = (theirs.dtype, target)
    if renamed := [(name, own) for name, own in sources.items() if name != own]:
        notes.append(f"{len(renamed)} names changed: {renamed[0][1]} is {renamed[0][0]}")
    for (before, after), number in Counter(converted.values()).items():
        notes.append(f"{number} tensors from {before} to {after}")
    used = {*by_model.values(), *copies}
    extra = [info for name, info in have.items() if name not in used]
    if heads := [t.name for t in extra if _matches(t.name, TRAINERS_OWN)]:
        notes.append(f"not sent, the trainer's own: {', '.join(heads[:_FIRST])}")
    missing = [
        info
        for name, info in wanted.items()
        if name not in by_model and name not in expected.tied and not name.endswith(COMPUTED)
    ]
    return Fit(
        checkpoint,
        expected,
        MappingProxyType(sources),
        tuple(missing),
        tuple(
            info
            for info in extra
            if not info.name.endswith(COMPUTED) and not _matches(info.name, TRAINERS_OWN)
        ),
        tuple(misshaped),
        MappingProxyType(converted),
        tuple(notes),
        MappingProxyType(dtypes),
        MappingProxyType(copies),
    )


def _renamed(have: Sequence[str], wanted: Mapping[str, object]) -> dict[str, str]:
    """The model's name for each of the checkpoint's names that has one.

    A name that the model knows stays. For the others the front that most of the checkpoint's
    names share is replaced by the one that most of the model's names share, whichever pair
    of fronts makes the most names fit.
    """
    strip, add = max(
        ((s, a) for s in _fronts(have) for a in _fronts(wanted)),
        key=lambda pair: (
            sum(n.startswith(pair[0]) and pair[1] + n[len(pair[0]) :] in wanted for n in have),
            -len(pair[0]) - len(pair[1]),
        ),
    )
    names: dict[str, str] = {}
    taken: set[str] = set()
    for front, new in (("", ""), (strip, add), (strip, ""), ("", add)):
        for name in have:
            other = new + name.removeprefix(front)
            free = name not in names and other not in taken
            if free and name.startswith(front) and other in wanted:
                names[name] = other
                taken.add(other)
    return names


def _fronts(names: Iterable[str]) -> list[str]:
    """The beginnings, of up to three parts, that at least half of the names share."""
    names = list(names)
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts))))
    return ["", *(front for front, number in found.items() if 2 * number >= len(names))]


def _order(names: list[str]) -> Callable[[tuple[str, str]], int]:
    place = {name: number for number, name in enumerate(names)}
    return lambda pair: place[pair[1]]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _told(info: TensorInfo) -> str:
    return f"{info.shape} {info.dtype}"


def _advice(extra: list[str]) -> str:
    if any(".lora_" in name or ".base_layer." in name for name in extra):
        return "This is an adapter with its base model: merge it first (PEFT: merge_and_unload())."
    if any(name.endswith("flat_param") for name in extra):
        return "These are FSDP's flat parameters: save the full state, or with DCP."
    if any(name.endswith(".experts.gate_up_proj") for name in extra):
        return (
            "These are a mixture's experts in one tensor, as transformers 5 has them in memory: "
            "save with model.save_pretrained(folder), which writes them apart."
        )
    return "Give a checkpoint of this model, or the model folder that this one belongs to."


def _not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[NotFinite, ...]:
    return tuple(it for name, tensor in tensors if (it := not_finite(name, tensor)))


def raise_if_not_finite(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuses NaN and infinite values. One pass over ``tensors``.

    Args:
        path: the checkpoint that they are of, for the message.

    Raises:
        CheckpointMismatch: with the first five names.
    """
    if found := _not_finite(tensors):
        first = "; ".join(
            f"{it.name} ({it.nans} NaN, {it.infinities} infinite of {it.values} values)"
            for it in found[:_FIRST]
        )
        raise CheckpointMismatch(
            f"{path} has {len(found)} tensors with values that are not finite: {first}.",
            tuple(it.name for it in found),
            advice="Check the training run: SGLang serves such weights without an error. To push "
            "them on purpose: check_values=False.",
        )


def not_finite(name: str, tensor: torch.Tensor) -> NotFinite | None:
    """How many of a tensor's values are NaN or infinite; ``None``: none of them."""
    import torch

    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    ordinary = str(tensor.dtype).removeprefix("torch.") in CONVERTIBLE
    if ordinary:
        # No memory of its own and one pass: what is between finite bounds is finite, and a
        # NaN is its own bound.
        low, high = torch.aminmax(tensor)
        if torch.isfinite(low) and torch.isfinite(high):
            return None
    nans = infinities = 0
    for part in tensor.reshape(-1).split(1 << 20):
        values = part if ordinary or part.is_complex() else part.float()
        nans += int(values.isnan().sum())
        infinities += int(values.isinf().sum())
    if not nans and not infinities:
        return None
    return NotFinite(name, nans, infinities, tensor.numel())


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one.dtype == other.dtype and torch.equal(one, other)
