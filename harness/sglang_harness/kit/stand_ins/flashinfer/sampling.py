"""Imported by SGLang's sampler."""

from __future__ import annotations

from typing import NoReturn

_ADVICE = "FlashInfer is a stand-in here; use --sampling-backend pytorch"


def min_p_sampling_from_probs(*_words: object, **_named: object) -> NoReturn:
    """Not here."""
    raise NotImplementedError(f"flashinfer.sampling.min_p_sampling_from_probs: {_ADVICE}")


def top_k_top_p_sampling_from_probs(*_words: object, **_named: object) -> NoReturn:
    """Not here."""
    raise NotImplementedError(f"flashinfer.sampling.top_k_top_p_sampling_from_probs: {_ADVICE}")
