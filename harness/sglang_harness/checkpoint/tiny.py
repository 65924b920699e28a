"""A tiny seeded random Llama: written in a second, different answers for every seed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sglang_harness import places
from sglang_harness.errors import MissingExtra

#: Raised when the recipe changes, so that no old folder is taken for a new one.
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


def folder(seed: int) -> Path:
    """The checkpoint for ``seed`` (Hugging Face layout, float32), made where missing.

    0.7 M parameters, 2 layers, byte-level BPE with a chat template.

    Raises:
        MissingExtra: torch or transformers is not installed.
    """
    path = places.cache() / "models" / f"tiny-{RECIPE}-seed{seed}"
    if not (path / "config.json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made beside and renamed: nobody ever sees half a checkpoint.
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            made = Path(work) / "made"
            write(made, seed)
            try:
                made.rename(path)
            except OSError:  # another process was first
                if not (path / "config.json").is_file():
                    shutil.rmtree(path, ignore_errors=True)
                    made.rename(path)
    return path


def write(path: Path, seed: int) -> None:
    """Writes the checkpoint of ``seed`` to ``path``, readable for every user."""
    try:
        import torch
        from tokenizers import ByteLevelBPETokenizer
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
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
    config = LlamaConfig(
        # No more than the tokenizer knows: every token that is generated has a text.
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # Wide enough that answers differ clearly between seeds and tokens are no near-ties.
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.do_sample = False
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    path.chmod(0o755)
    for each in path.iterdir():
        os.chmod(each, 0o644)  # noqa: PTH101
