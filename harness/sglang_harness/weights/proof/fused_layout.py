"""Which tensors of a checkpoint make which parameter of a server, on each tensor-parallel rank.

SGLang holds q, k and v as one ``qkv_proj``, gate and up as one ``gate_up_proj``, and the experts
of a layer as ``w13_weight`` and ``w2_weight``. What is written down here was read in SGLang
0.5.23 (``srt/layers/linear.py``, ``vocab_parallel_embedding.py``, ``moe/fused_moe_triton/
layer.py`` and the models' ``load_weights``), without quantisation and expert parallelism.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Read = Callable[[list[str]], "list[torch.Tensor]"]

#: Vocabularies are filled up with zeros to a multiple of this.
VOCABULARY_PADDING = 64

#: Model types that are laid out as :func:`layout` says.
DENSE = frozenset({"llama", "qwen2", "qwen3"})
MIXED = frozenset({"mixtral", "qwen3_moe"})

#: Buffers that are computed, not loaded: SGLang leaves them out of its checksums too.
COMPUTED = ("cos_sin_cache", "cos_cache", "sin_cache", "inv_freq", "freqs_cis", "expert_mask_gpu")


@dataclass(frozen=True)
class Fused:
    """One rank's share of a parameter, without a copy of it.

    Attributes:
        pieces: its elements are theirs, one piece after another, each row by row.
        shape: of the whole.
    """

    pieces: tuple[torch.Tensor, ...]
    shape: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """All of it in one tensor."""
        import torch

        return torch.cat([piece.reshape(-1) for piece in self.pieces]).reshape(self.shape)


Make = Callable[["list[torch.Tensor]", int], Fused]


@dataclass(frozen=True)
class FusionRecipe:
    """How one parameter is put together.

    Attributes:
        parts: the checkpoint's tensors that go into it, in their order.
        fuse: from those tensors and a rank, that rank's share, still in the checkpoint's dtype.
    """

    parts: tuple[str, ...]
    fuse: Make

    def make(self, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
        """:attr:`fuse`, in one tensor."""
        return self.fuse(parts, rank).tensor()


@dataclass(frozen=True)
class Layout:
    """Every parameter that a checkpoint makes, by the server's name for it.

    Attributes:
        ignored: tensors of the checkpoint that no parameter is made of.
    """

    recipes: Mapping[str, FusionRecipe]
    ignored: tuple[str, ...]


def unknown(config: Mapping[str, Any], about: Mapping[str, Any]) -> str | None:
    """Why a server's layout is not known here; ``None``: it is.

    Args:
        config: the model's ``config.json``.
        about: the server's ``/server_info``.
    """
    kind = config.get("model_type")
    if kind not in DENSE | MIXED:
        return f"how SGLang lays out a {kind!r} model is not known here"
    if config.get("quantization_config") or about.get("quantization"):
        return "the weights are quantised"
    for name in ("ep_size", "pp_size"):
        if int(about.get(name) or 1) != 1:
            return f"the server runs with {name} {about[name]}"
    if about.get("enable_dp_attention"):
        return "the server runs with attention data parallelism"
    return None


def layout(config: Mapping[str, Any], names: Iterable[str], ranks: int) -> Layout:
    """How the tensors ``names`` are laid out over ``ranks``; see :func:`unknown` for where
    that can be told."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    tied = bool(config.get("tie_word_embeddings"))
    parts: dict[str, dict[tuple[int, int], str]] = {}
    recipes: dict[str, FusionRecipe] = {}
    ignored = []
    for name in names:
        if name.endswith(COMPUTED) or (tied and name == "lm_head.weight"):
            ignored.append(name)
        elif found := _EXPERT.fullmatch(name):
            fused, place = _EXPERTS[found["part"]]
            parameter = f"{found['before']}.experts.{fused}_weight"
            parts.setdefault(parameter, {})[int(found["expert"]), place] = name
        elif found := _FUSED.fullmatch(name):
            fused, place = _PLACES[found["part"]]
            parts.setdefault(f"{found['before']}.{fused}.{found['kind']}", {})[0, place] = name
        else:
            recipes[name] = FusionRecipe((name,), _single(name, ranks))
    for parameter, placed in parts.items():
        ordered = tuple(placed[key] for key in sorted(placed))
        if parameter.endswith("w13_weight"):
            fuse = _gate_and_up_of_experts(ranks)
        elif parameter.endswith("w2_weight"):
            fuse = _down_of_experts(ranks)
        elif ".qkv_proj." in parameter:
            fuse = _qkv(ranks, kv_heads)
        else:
            fuse = _columns(ranks)
        wanted = 3 if ".qkv_proj." in parameter else 1 if parameter.endswith("w2_weight") else 2
        experts = {expert for expert, _ in placed}
        if len(placed) == wanted * len(experts) and experts == set(range(len(experts))):
            recipes[parameter] = FusionRecipe(ordered, fuse)
        else:
            # A part of it alone: known to be touched, not what it becomes.
            recipes[parameter] = FusionRecipe((*ordered, MISSING), fuse)
    return Layout(recipes, tuple(ignored))


#: Stands for the tensors of a parameter that a checkpoint does not hold.
MISSING = "(not in the checkpoint)"

_FUSED = re.compile(
    r"(?P<before>.+)\.(?P<part>q_proj|k_proj|v_proj|gate_proj|up_proj)\.(?P<kind>weight|bias)"
)
_EXPERT = re.compile(
    r"(?P<before>.+)\.experts\.(?P<expert>\d+)\."
    r"(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight"
)
_PLACES = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_EXPERTS = {
    "w1": ("w13", 0),
    "w3": ("w13", 1),
    "w2": ("w2", 0),
    "gate_proj": ("w13", 0),
    "up_proj": ("w13", 1),
    "down_proj": ("w2", 0),
}


def _share(tensor: torch.Tensor, dimension: int, rank: int, ranks: int) -> torch.Tensor:
    length = tensor.shape[dimension] // ranks
    return tensor.narrow(dimension, rank * length, length)


def _one_after_another(pieces: Sequence[torch.Tensor]) -> Fused:
    rows = sum(piece.shape[0] for piece in pieces)
    return Fused(tuple(pieces), (rows, *pieces[0].shape[1:]))


def _stacked(each: Sequence[Fused]) -> Fused:
    pieces = tuple(piece for fused in each for piece in fused.pieces)
    return Fused(pieces, (len(each), *each[0].shape))


def _single(name: str, ranks: int) -> Make:
    """A parameter that is one tensor of the checkpoint."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return _vocabulary(ranks)
    if re.fullmatch(r".+\.(o_proj|down_proj)\.weight", name):
        return lambda parts, rank: _whole(_share(parts[0], 1, rank, ranks))
    return lambda parts, _: _whole(parts[0])


def _whole(tensor: torch.Tensor) -> Fused:
    return Fused((tensor,), tuple(tensor.shape))


def _vocabulary(ranks: int) -> Make:
    def fuse(parts: list[torch.Tensor], rank: int) -> Fused:
        (tensor,) = parts
        words = tensor.shape[0]
        padded = -(-words // VOCABULARY_PADDING) * VOCABULARY_PADDING
        each = padded // ranks
        first = min(rank * each, words)
        own = tensor[first : min(first + each, words)]
        if len(own) == each:
            return _whole(own)
        return _one_after_another([own, tensor.new_zeros((each - len(own), *tensor.shape[1:]))])

    return fuse


def _columns(ranks: int) -> Make:
    """Each part split by rows of its own, the pieces one after another."""

    def fuse(parts: list[torch.Tensor], rank: int) -> Fused:
        return _one_after_another([_share(part, 0, rank, ranks) for part in parts])

    return fuse


def _qkv(ranks: int, kv_heads: int) -> Make:
    def fuse(parts: list[torch.Tensor], rank: int) -> Fused:
        query, *others = parts
        pieces = [_share(query, 0, rank, ranks)]
        for part in others:
            if ranks <= kv_heads:
                pieces.append(_share(part, 0, rank, ranks))
            else:
                # Fewer heads than ranks: several ranks hold the same one.
                pieces.append(_share(part, 0, rank // (ranks // kv_heads), kv_heads))
        return _one_after_another(pieces)

    return fuse


def _gate_and_up_of_experts(ranks: int) -> Make:
    def fuse(parts: list[torch.Tensor], rank: int) -> Fused:
        of_one = _columns(ranks)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return _stacked([of_one(list(pair), rank) for pair in pairs])

    return fuse


def _down_of_experts(ranks: int) -> Make:
    def fuse(parts: list[torch.Tensor], rank: int) -> Fused:
        return _stacked([_whole(_share(part, 1, rank, ranks)) for part in parts])

    return fuse
