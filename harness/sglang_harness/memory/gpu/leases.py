"""Which run has which GPU, so that no two runs use one by mistake.

A lease is a file lock by UUID, in one folder of the machine, for all its users. The kernel
releases it when its holder dies.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sglang_harness._base.file_lease import Lease, LeaseTaken
from sglang_harness.errors import HarnessError
from sglang_harness.memory.gpu.driver import Gpu

#: The same for every user and whatever TMPDIR says; ``SGLANG_HARNESS_GPU_LEASES`` moves it.
FOLDER = Path("/tmp/sglang-harness.gpu-leases")  # noqa: S108

#: Every user of the machine makes locks in it, and with the sticky bit none can remove another's:
#: a lock whose file was removed protects nothing.
SHARED = 0o1777


@dataclass
class _Taken:
    lease: Lease
    run_id: str
    times: int = 1


_LOCK = threading.Lock()
_TAKEN: dict[str, _Taken] = {}


@dataclass
class GpuLeases:
    """GPUs that this process holds for a run, until :meth:`release`.

    Attributes:
        fresh: UUIDs that no other server of the run was on.
        warnings: about holders that died without giving a GPU back.
    """

    uuids: list[str]
    fresh: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _over: bool = False

    def release(self) -> None:
        """Gives them back. Again: nothing. A GPU that another server of the run is on stays."""
        if self._over:
            return
        self._over = True
        with _LOCK:
            for uuid in self.uuids:
                _give_back(uuid)


def folder() -> Path:
    """Where the locks are; made where it is missing.

    Raises:
        HarnessError: it cannot be used, or is a link.
    """
    place = Path(os.environ.get("SGLANG_HARNESS_GPU_LEASES") or FOLDER)
    try:
        with suppress(FileExistsError):
            place.mkdir(parents=True)
            place.chmod(SHARED)
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise HarnessError(f"{place} is not a folder: GPUs cannot be leased.")
        if found.st_uid == os.geteuid() and found.st_mode & 0o1002 == 0o002:
            place.chmod(SHARED)  # as it was made by an earlier version
    except OSError as error:
        raise HarnessError(
            f"GPUs cannot be leased: {place}: {error.strerror}.",
            advice="Set SGLANG_HARNESS_GPU_LEASES to a folder that all runs of this machine see.",
        ) from None
    return place


def acquire(gpus: Sequence[Gpu], *, run_id: str, purpose: str, timeout: float) -> GpuLeases:
    """Leases every one of ``gpus``, or none.

    They are taken in the order of their UUIDs, so that two who want the same never wait for
    each other. A MIG instance and the whole GPU that it is of exclude each other, because a
    whole GPU that is split means its instances. Servers of one run share.

    Args:
        timeout: seconds to wait in all.

    Raises:
        LeaseTaken: another run holds one; says which, for what, and since when.
        HarnessError: the folder of the locks cannot be used.
    """
    until = time.monotonic() + timeout
    place = folder()
    held = GpuLeases([])
    try:
        for gpu in sorted(gpus, key=lambda g: g.uuid):
            _take(place, gpu, held, run_id, purpose, until - time.monotonic(), timeout)
    except BaseException:
        held.release()
        raise
    return held


def _take(
    place: Path,
    gpu: Gpu,
    held: GpuLeases,
    run_id: str,
    purpose: str,
    left: float,
    timeout: float,
) -> None:
    with _LOCK:
        taken = _TAKEN.get(gpu.uuid)
        if taken is not None and taken.run_id == run_id:
            taken.times += 1
            held.uuids.append(gpu.uuid)
            return
    path = place / f"{gpu.uuid}.lock"
    lease = Lease(path, name=f"run {run_id}")
    try:
        before = lease.acquire(purpose, timeout=max(0.0, left))
    except LeaseTaken as error:
        holder = lease.holder()
        who = (
            f"{holder.name} (process {holder.pid}) has it for {holder.purpose}, for "
            f"{max(0.0, time.time() - holder.since):.0f} s now"
            if holder is not None
            else error.message
        )
        raise LeaseTaken(
            f"GPU {gpu.uuid} was not free for {timeout:g} s: {who}.",
            advice="Wait longer (SGLANG_HARNESS_GPU_WAIT, in seconds), or name other GPUs.",
        ) from None
    except OSError as error:
        raise HarnessError(
            f"GPU {gpu.uuid} cannot be leased: {path}: {error.strerror}.",
            advice="The lock belongs to another user, or the disk is full.",
        ) from None
    with _LOCK:
        _TAKEN[gpu.uuid] = _Taken(lease, run_id)
    held.uuids.append(gpu.uuid)
    held.fresh.append(gpu.uuid)
    if before is not None:
        held.warnings.append(
            f"GPU {gpu.uuid} was held by {before.name} (process {before.pid}), which ended "
            "without giving it back"
        )


def _give_back(uuid: str) -> None:
    taken = _TAKEN.get(uuid)
    if taken is None:
        return
    taken.times -= 1
    if taken.times == 0:
        del _TAKEN[uuid]
        taken.lease.release()
