"""Imported by SGLang's attention of towers for pictures."""

from __future__ import annotations

from typing import NoReturn


def cudnn_batch_prefill_with_kv_cache(*_words: object, **_named: object) -> NoReturn:
    """Not here."""
    raise NotImplementedError(
        "flashinfer.prefill.cudnn_batch_prefill_with_kv_cache: FlashInfer is a stand-in here"
    )
