"""The parts of gpu-check in the order in which they run, most valuable first.

A module here holds the parts of one subject, and imports neither torch nor SGLang before one of
them runs: this table is read by the process that must not initialise CUDA.
"""

from __future__ import annotations

from sglang_harness.gpu_check.part import Part
from sglang_harness.gpu_check.parts import facts, kernels, qualify, server_flags, tolerances

PARTS: tuple[Part, ...] = (
    facts.PART,
    kernels.KERNELS,
    kernels.MEMORY_SAVER,
    server_flags.PART,
    qualify.TINY,
    qualify.LARGE,
    tolerances.PART,
    qualify.FULL,
)
