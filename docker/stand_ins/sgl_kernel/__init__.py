"""Stands in for SGLang's compiled CPU kernels, which no package index offers.

SGLang with ``SGLANG_USE_CPU_ENGINE=1`` imports names from ``sgl_kernel`` at start-up. On a
CPU without AMX it then computes with plain torch and calls none of them (seen for SGLang
0.5.20 to 0.5.23 with Llama, Qwen2, Qwen3, Qwen3-MoE and Mixtral). So every name exists
here, and calling one says that the result would have been invented.
"""

from collections.abc import Callable

__version__ = "0.0.0+stand-in"


def __getattr__(name: str) -> Callable[..., object]:
    if name.startswith("__"):
        raise AttributeError(name)

    def not_compiled(*_args: object, **_kwargs: object) -> object:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this is the CPU stand-in, which computes "
            "nothing. SGLang took a path that needs its compiled kernels."
        )

    not_compiled.__name__ = name
    return not_compiled
