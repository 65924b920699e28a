"""Tiny random models by seed: written in a second, with different answers for each seed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sglang_harness._base import paths
from sglang_harness.checkpoint.made.cached import once
from sglang_harness.errors import MissingExtra

#: Incremented when the recipe changes, so that an old folder is not used for a new one.
RECIPE = 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. Weights travel from the trainer to the "
    "server; the server answers with tokens. One two three four five six seven eight nine "
    "ten. In the beginning there was a checkpoint, and the checkpoint was on disk."
)


#: Every architecture as ``config.json`` names it, by what a model's name has after ``tiny-``;
#: ``tiny`` alone is the Llama.
ARCHITECTURES = {
    "": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}

NAMES = tuple("-".join(filter(None, ("tiny", each))) for each in ARCHITECTURES)
"""``tiny``, ``tiny-qwen2``, ...: each may have ``:SEED`` behind it."""


def named(model: str) -> tuple[str, int] | None:
    """Architecture and seed of ``tiny[-ARCHITECTURE][:SEED]``; ``None``: the name of another
    model."""
    found = re.fullmatch(r"tiny(?:-([a-z0-9-]+))?(?::(\d{1,9}))?", model)
    if found is None or (found[1] or "") not in ARCHITECTURES:
        return None
    return found[1] or "", int(found[2] or 0)


def folder(seed: int, architecture: str = "") -> Path:
    """The checkpoint for ``seed`` (Hugging Face layout, float32), made where missing.

    0.4 to 0.6 M parameters, 2 layers, byte-level BPE with a chat template.

    Raises:
        MissingExtra: torch or transformers is not installed.
        KeyError: ``architecture`` is not one of ``ARCHITECTURES``.
    """
    kind = f"{architecture}-" if architecture else ""
    path = paths.cache() / "models" / f"tiny-{kind}{RECIPE}-seed{seed}"
    return once(path, lambda made: write(made, seed, architecture))


def write(path: Path, seed: int, architecture: str = "") -> None:
    """Writes the checkpoint of ``seed`` to ``path``, readable for every user."""
    try:
        import torch
        import transformers
        from tokenizers import ByteLevelBPETokenizer
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import logging
    except ImportError:
        raise MissingExtra("Making a tiny model", "torch") from None
    logging.disable_progress_bar()

    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([_CORPUS], vocab_size=512, min_frequency=1, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    model_class: Any = getattr(transformers, ARCHITECTURES[architecture])
    config = model_class.config_class(
        # No more than the tokenizer knows: every token that is generated has a text.
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        **{**_SHAPE, **_OWN.get(architecture, {})},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        if architecture:
            _spread(model)
    model.generation_config.do_sample = False
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    path.chmod(0o755)
    for each in path.iterdir():
        os.chmod(each, 0o644)  # noqa: PTH101


_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    # Wide enough that answers differ clearly between seeds and tokens are no near-ties.
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}

#: What each architecture has of its own. Every token takes two of four experts: with few of
#: them the second and the third are seldom as good as one another.
_OWN: dict[str, dict[str, Any]] = {
    # As the small ones of its family are published.
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "qwen3-moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}


def _spread(model: Any) -> None:
    """Biases and norms begin as 0 and 1, so that a server which left them out would be right;
    and the experts of a fresh router all get the same share, near-ties among them."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif name.endswith("mlp.gate.weight"):
                parameter.mul_(ROUTER)


#: How much wider than the other weights a router's are: the best expert then has most of the
#: weight, and where the second and the third change places little depends on it.
ROUTER = 2.0
