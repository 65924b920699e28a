"""From a peer next to the server: handles to shared memory or to a GPU's, not bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, ClassVar

from sglang_harness.client import calls
from sglang_harness.peer import Peer
from sglang_harness.weights.routes.base import Job, Route, Sent, register
from sglang_harness.weights.routes.buckets import Bucket
from sglang_harness.weights.routes.gpu_places import of_ranks
from sglang_harness.weights.routes.in_body import TENSOR_UPDATE, fields

#: Seconds at least for a peer to import torch, and for CUDA's context in it.
OPENS_WITHIN = 60.0


class Text:
    """A body that is small enough to be held whole."""

    def __init__(self, data: dict[str, object]) -> None:
        self._text = json.dumps(data).encode()

    def __len__(self) -> int:
        return len(self._text)

    def __iter__(self) -> Iterator[bytes]:
        yield self._text


def open_in_peer(
    job: Job, inside: PurePosixPath, *, shared: bool, devices: list[int] | None = None
) -> Peer:
    """The peer, with the checkpoint open in it and room for the largest bucket.

    Args:
        inside: the checkpoint's folder, as the peer sees it.
        shared: the room is to be in ``/dev/shm``.
        devices: numbers of GPUs on which it needs room too.
    """
    peer = job.peer()
    # Not the time of one bucket: it imports torch, and opens CUDA.
    within = max(OPENS_WITHIN, job.timeout)
    peer.ask("open", folder=str(inside), timeout=within)
    room = largest(job.buckets)
    peer.ask("ready", room=room, shared=shared, devices=devices, timeout=within)
    return peer


def slots(bucket: Bucket) -> list[list[Any]]:
    """A bucket as the peer's orders name it: name, start, bytes, dtype and shape of each
    tensor."""
    return [[s.name, s.start, s.nbytes, s.dtype, list(s.shape)] for s in bucket.slots]


def largest(buckets: Iterable[Bucket]) -> int:
    """Bytes of buffer for any one of them."""
    return max(bucket.extent for bucket in buckets)


@register
class SharedMemory(Route):
    """``/update_weights_from_tensor`` with a handle to ``/dev/shm``, one for every rank."""

    name = "shared-memory"
    title = "handed over in shared memory (`/dev/shm`) by a peer next to the server"
    needs = replace(TENSOR_UPDATE, peer=True)
    cuda: ClassVar[bool] = False

    def prepare(self, job: Job) -> None:
        self._job = job
        self._devices: list[int] | None = None
        if self.cuda:
            # Each rank gets a handle to memory of the GPU that it is on itself.
            self._devices = of_ranks(job.target.client.server_info())
        self._inside = job.stage(reader="peer")

    def open(self, job: Job) -> None:
        self._peer = open_in_peer(job, self._inside, shared=not self.cuda, devices=self._devices)

    def send(self, bucket: Bucket) -> Sent:
        job = self._job
        started = time.monotonic()
        packed = self._peer.ask(
            "pack",
            slots=slots(bucket),
            extent=bucket.extent,
            # One buffer for all of them, as large as the largest.
            room=largest(job.buckets),
            ranks=job.ranks,
            devices=self._devices,
            timeout=job.timeout,
        )
        ready = time.monotonic()
        body = {
            "serialized_named_tensors": packed["payloads"],
            **fields(job, flattened=True),
        }
        update = job.target.client.send(
            calls.update_weights_from_tensor(Text(body), timeout=job.timeout)
        )
        read, pack = float(packed["seconds_read"]), float(packed["seconds_pack"])
        return Sent(
            update.message,
            read,
            pack,
            # What it takes to speak to the peer.
            max(0.0, ready - started - read - pack),
            time.monotonic() - ready,
        )


@register
class CudaIpc(SharedMemory):
    """The same with a handle to the memory of the GPU that the rank runs on. Written from
    what is known of it; not run on a GPU by this project yet."""

    name = "cuda-ipc"
    title = "handed over in GPU memory (CUDA IPC) by a peer on the same GPUs"
    needs = replace(SharedMemory.needs, gpu=True)
    unverified = "not run yet"
    cuda = True
