"""Stands in for FlashInfer, of which SGLang imports names of ``prefill`` and ``sampling`` on CUDA
without asking.

Nothing calls them with attention by triton and sampling by torch. Every other name is missing on
purpose: SGLang asks for those inside try/except, on demand, or where SGLANG_IS_FLASHINFER_AVAILABLE
is not false.
"""

__version__ = "0.0.0+stand.in"
