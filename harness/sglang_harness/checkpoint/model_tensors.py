"""Which tensors a model folder expects: names, shapes and dtypes as Hugging Face has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sglang_harness.checkpoint.reading import TensorInfo, open_checkpoint
from sglang_harness.errors import MissingExtra, ModelError

#: What old versions of transformers saved although it is computed: neither missing nor extra.
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "embeddings.position_ids")

#: The matrix that turns hidden states into logits, as every causal model in transformers has it.
OUTPUT = "lm_head.weight"

#: And the one that turns token ids into hidden states, by its last parts.
_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True, eq=False)
class ExpectedTensors:
    """The tensors of a model.

    Attributes:
        source: what they were taken from, for messages.
        tensors: by name.
        tied: names that share another one's memory, and whose. A checkpoint may lack these.
    """

    source: str
    tensors: Mapping[str, TensorInfo]
    tied: Mapping[str, str]


def expected_by(folder: Path) -> ExpectedTensors:
    """What the folder's own weights are, or where it has none, what its configuration asks for.

    Its weights come first: transformers 5 calls the experts of a mixture otherwise in memory
    than on disk, and a server reads the names on disk.

    Raises:
        ModelError: there is no ``config.json``, or transformers cannot make a model of it.
        MissingExtra: the folder has no weights, and transformers is not installed.
    """
    described = _config(folder)
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth", ".metadata")
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        return _by_configuration(folder)
    tensors = open_checkpoint(folder).tensors
    tie = described.get("tie_word_embeddings")
    if tie is None:
        tie = described.get("text_config", {}).get("tie_word_embeddings")
    if tie is None:  # the class's own default, which is not written down
        tie = OUTPUT not in tensors
    own = next((name for name in tensors if name.endswith(_INPUTS)), None)
    tied = {OUTPUT: own} if tie and own else {}
    return ExpectedTensors(f"the weights in {folder}", tensors, MappingProxyType(tied))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json.", advice="Give a model folder.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from None
    if not isinstance(described, dict):
        raise ModelError(f"{path} does not describe a model.", advice="Give a model folder.")
    return described


def _by_configuration(folder: Path) -> ExpectedTensors:
    """By transformers, on torch's meta device: no memory is taken for the weights."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise MissingExtra("Reading what a configuration asks for", "torch") from None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            # In the configuration's dtype; the argument that says so changed its name.
            model = AutoModelForCausalLM.from_config(config)
        state = model.state_dict(keep_vars=True)
        on_disk = names_on_disk(model, state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(
            f"transformers cannot make a model of {folder}/config.json: {reason}.",
            advice="Give a folder with the model's weights.",
        ) from None
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in state.items():
        if (owner := first.setdefault(id(parameter), name)) != name:
            tied[name] = owner
    tensors = {
        name: TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in on_disk.items()
        if name not in tied
    }
    return ExpectedTensors(
        f"{folder}/config.json", MappingProxyType(tensors), MappingProxyType(tied)
    )


def names_on_disk(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state as ``save_pretrained`` would write it: transformers 5 keeps a mixture's experts
    in one tensor in memory and apart on disk; older ones keep them apart in both."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return state
    plain = {name: tensor.detach() for name, tensor in state.items()}
    return dict(revert_weight_conversion(model, plain))
