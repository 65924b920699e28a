"""Which GPU a peer sends from.

A server and its peer see the same GPUs under the same numbers: those of ``gpus`` of the spec, which
the run has leased. Rank ``r`` of SGLang is on number ``base_gpu_id + r * gpu_id_step``, the ranks
of further pipeline stages behind it (``srt/entrypoints/engine.py``, 0.5.15 and 0.5.23).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglang_harness.errors import HarnessError
from sglang_harness.runtime import device

if TYPE_CHECKING:
    from sglang_harness.weights.target import Target


def of_ranks(about: Mapping[str, Any]) -> list[int]:
    """The number of the GPU of each tensor-parallel rank, of the first pipeline stage.

    Args:
        about: the server's ``/server_info``.
    """
    first, step = int(about.get("base_gpu_id") or 0), int(about.get("gpu_id_step") or 1)
    return [first + rank * step for rank in range(int(about.get("tp_size") or 1))]


def beside(target: Target, about: Mapping[str, Any]) -> int | str:
    """The number of a GPU that no rank of the server is on; or why there is none, as the rest of a
    sentence.

    NCCL refuses two ranks on one GPU (``Duplicate GPU detected``), and tells GPUs apart by their
    place on the bus: two MIG instances of one GPU are one to it.
    """
    try:
        seen = device.meant(target.spec.gpus)
    except HarnessError as error:
        return f"which GPUs its peer would see is not known: {error.message.rstrip('.')}"
    first, stages = of_ranks(about), int(about.get("pp_size") or 1)
    taken = {number + stage * len(first) for stage in range(stages) for number in first}
    whole = [each.parent or each.uuid for each in seen]
    busy = {whole[number] for number in taken if number < len(whole)}
    free = [n for n in range(len(seen)) if n not in taken and whole[n] not in busy]
    if free:
        return free[0]
    return (
        f"NCCL takes no two ranks on one GPU: the sender needs one beside those of the server's "
        f"{len(taken)} {'rank' if len(taken) == 1 else 'ranks'}, and this run has {len(seen)} in "
        f"all (--gpus {target.spec.gpus})"
    )
