"""``gpu-check``: what only a GPU can show, as questions with an outcome each.

A question is a *part* (:mod:`~sglang_harness.gpu_check.part`). The parts are listed in
:mod:`~sglang_harness.gpu_check.parts`, run in child processes by
:mod:`~sglang_harness.gpu_check.run_parts`, and their results are on disk as soon as each has ended
(:mod:`~sglang_harness.gpu_check.results`). The process that runs them never initialises CUDA: it
reads GPUs through NVML alone.
"""
