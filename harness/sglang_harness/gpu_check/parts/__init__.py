"""The parts of gpu-check in the order in which they run, most valuable first.

A module here holds the parts of one subject, and imports neither torch nor SGLang before one of
them runs: this table is read by the process that must not initialise CUDA.
"""

from __future__ import annotations

from sglang_harness.gpu_check.part import Part
from sglang_harness.gpu_check.parts import (
    cycles,
    death,
    driver_figures,
    facts,
    fused_layout,
    imports,
    ipc,
    kernels,
    leases,
    mock_driver,
    occupancy,
    planted_leak,
    pushes,
    qualify,
    releases,
    second_gpu,
    server_flags,
    tolerances,
)

PARTS: tuple[Part, ...] = (
    facts.PART,
    *driver_figures.PARTS,
    ipc.PART,
    leases.PART,
    mock_driver.PART,
    imports.PART,
    kernels.KERNELS,
    kernels.MEMORY_SAVER,
    server_flags.PART,
    qualify.TINY,
    qualify.LARGE,
    fused_layout.PART,
    pushes.PART,
    releases.PART,
    cycles.PART,
    planted_leak.PART,
    occupancy.PART,
    tolerances.PART,
    death.PART,
    second_gpu.PART,
    qualify.FULL,
)
