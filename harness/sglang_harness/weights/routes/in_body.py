"""In the body of the request: works wherever HTTP does, and costs base64."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sglang_harness.client import calls
from sglang_harness.weights.routes import packing
from sglang_harness.weights.routes.base import Job, Sent, register
from sglang_harness.weights.routes.buckets import Bucket

if TYPE_CHECKING:
    import torch

    from sglang_harness.server import Server


class InBody:
    """``/update_weights_from_tensor`` with the bytes themselves, once for every rank."""

    name = "tensor"
    needs_session = True
    in_one_piece = False
    flattened = False

    def lacking(self, server: Server) -> str | None:
        return lacks_tensor_update(server)

    def open(self, job: Job) -> None:
        self._job = job
        self._room: torch.Tensor = packing.buffer(max(b.extent for b in job.buckets))

    def send(self, bucket: Bucket) -> Sent:
        job = self._job
        started = time.monotonic()
        rooms = ((slot.name, packing.place(self._room, slot)) for slot in bucket.slots)
        job.source.read_into(rooms)
        read = time.monotonic()
        body = packing.TensorBody(
            packing.pieces(self._room, bucket, flattened=self.flattened),
            ranks=job.ranks,
            fields=fields(job, flattened=self.flattened),
        )
        packed = time.monotonic()
        update = job.server.client.send(calls.update_weights_from_tensor(body, timeout=job.timeout))
        answered = time.monotonic()
        given = body.handed_over_at or answered
        return Sent(update.message, read - started, packed - read, given - packed, answered - given)

    def close(self) -> list[str]:
        self.__dict__.pop("_room", None)
        return []


@register("tensor")
class Tensor(InBody):
    """As a list of names and tensors."""


@register("tensor-bucket")
class TensorBucket(InBody):
    """As one ``flattened_bucket``."""

    name = "tensor-bucket"
    flattened = True


def fields(job: Job, *, flattened: bool) -> dict[str, Any]:
    """The rest of the body of ``/update_weights_from_tensor``."""
    return {
        "load_format": "flattened_bucket" if flattened else None,
        # The bracket flushes; refused here, the weights have changed all the same.
        "flush_cache": False,
        "abort_all_requests": job.abort_all_requests,
        "weight_version": job.version,
    }


def lacks_tensor_update(server: Server) -> str | None:
    """Why tensors cannot be pushed to this server; ``None``: they can."""
    if not server.client.has_route("POST", "/update_weights_from_tensor"):
        return "this SGLang has no POST /update_weights_from_tensor"
    return lacks_one_replica(server)


def lacks_one_replica(server: Server) -> str | None:
    """Data-parallel servers fail an assertion here (SGLang 0.5.23)."""
    size = int(server.client.server_info().get("dp_size") or 1)
    return None if size == 1 else f"the server runs {size} data-parallel replicas (dp_size)"
