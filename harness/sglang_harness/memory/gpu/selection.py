"""Which devices words mean: ``--gpus``, ``CUDA_VISIBLE_DEVICES``, MIG instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_harness.errors import SpecError, TelemetryError
from sglang_harness.memory.gpu.driver import Gpu


def usable(gpus: Sequence[Gpu]) -> list[Gpu]:
    """What CUDA can take: whole devices, and for one that is split its MIG instances."""
    return [g for g in gpus if not g.split]


def select(gpus: Sequence[Gpu], wanted: str, *, failed: Sequence[TelemetryError] = ()) -> list[Gpu]:
    """What ``--gpus`` means: ``all``, or by commas NVML's indices (``0``), UUIDs or beginnings
    of them, and MIG instances (``0:1``, or their UUIDs). A device that is split into MIG
    instances means all of them.

    Args:
        failed: why devices do not answer; ``all`` is ambiguous while there are such.

    Raises:
        SpecError: there is no such device, or a name fits several.
        TelemetryError: ``all`` is wanted, and one does not answer.
    """
    if wanted == "all":
        if failed:
            raise failed[0]
        return usable(gpus)
    chosen: list[Gpu] = []
    for word in (part.strip() for part in wanted.split(",")):
        found = _named(gpus, word)
        if not found:
            why = f" ({failed[0].message})" if failed else ""
            raise SpecError(
                f"gpus names {word}, which this host does not have (it has {_list(gpus)}){why}."
            )
        for each in found:
            parts = [g for g in gpus if g.parent == each.uuid] if each.split else [each]
            chosen += [g for g in parts if g not in chosen]
    return chosen


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[Gpu] | None:
    """What ``CUDA_VISIBLE_DEVICES`` leaves of the devices; ``None`` where it is not set.

    As CUDA reads it: indices or UUIDs (or their beginnings) by commas; the first word that
    names nothing hides itself and all after it; an empty value leaves nothing.

    Raises:
        SpecError: it counts devices of different kinds in CUDA's own order, which NVML does
            not know.
    """
    value = environment.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    candidates = usable(gpus)
    words = [word.strip() for word in value.split(",")]
    whole = [g for g in candidates if not g.parent] or candidates
    by_index = any(word.isdigit() for word in words)
    order = environment.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    if by_index and order != "PCI_BUS_ID" and len({g.name for g in whole}) > 1:
        raise SpecError(
            f"CUDA_VISIBLE_DEVICES={value} counts GPUs of different kinds, fastest first, and "
            "the driver counts them in the order of the bus.",
            advice="Name them by UUID, or set CUDA_DEVICE_ORDER=PCI_BUS_ID.",
        )
    chosen: list[Gpu] = []
    for word in words:
        if word.isdigit():
            found = [whole[int(word)]] if int(word) < len(whole) else []
        else:
            found = [g for g in candidates if word and g.uuid.startswith(word)]
        if len(found) != 1:
            break
        chosen += [g for g in found if g not in chosen]
    return chosen


def allotted(
    gpus: Sequence[Gpu],
    wanted: str,
    environment: Mapping[str, str],
    *,
    failed: Sequence[TelemetryError] = (),
) -> list[Gpu]:
    """The devices that a server with ``--gpus wanted`` may use: ``all`` means all that
    ``CUDA_VISIBLE_DEVICES`` leaves, and a name has to be among them.

    Raises:
        SpecError: nothing is left, or a device is named that is not left.
        TelemetryError: ``all`` is wanted, and one does not answer.
    """
    left = visible(gpus, environment)
    if left is None:
        return select(gpus, wanted, failed=failed)
    value = environment["CUDA_VISIBLE_DEVICES"]
    if not left:
        raise SpecError(
            f"CUDA_VISIBLE_DEVICES={value!r} leaves no GPU.",
            advice="Unset it, name a GPU there, or use device=cpu.",
        )
    if wanted == "all":
        return left
    chosen = select(gpus, wanted, failed=failed)
    if hidden := [g for g in chosen if g not in left]:
        raise SpecError(
            f"gpus names {hidden[0].uuid}, and CUDA_VISIBLE_DEVICES={value} does not leave it.",
            advice="Name one of those that it leaves.",
        )
    return chosen


def _named(gpus: Sequence[Gpu], word: str) -> list[Gpu]:
    if word.isdigit():
        return [g for g in gpus if not g.parent and g.index == int(word)]
    index, colon, number = word.partition(":")
    if colon and index.isdigit() and number.isdigit():
        return [g for g in gpus if g.parent and (g.index, g.instance) == (int(index), int(number))]
    exact = [g for g in gpus if g.uuid == word]
    found = exact or [g for g in gpus if word and g.uuid.startswith(word)]
    if len(found) > 1:
        raise SpecError(
            f"gpus names {word}, which fits {', '.join(g.uuid for g in found)}.",
            advice="Give more of the UUID.",
        )
    return found


def _list(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return "none that answers"
    return ", ".join(f"{_number(g)} {g.uuid}" for g in gpus)


def _number(gpu: Gpu) -> str:
    return f"{gpu.index}" if gpu.instance is None else f"{gpu.index}:{gpu.instance}"
