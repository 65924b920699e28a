"""In the body of the request: works wherever HTTP does, and costs base64."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from sglang_harness.client import calls
from sglang_harness.weights.routes import packing
from sglang_harness.weights.routes.base import Job, Needs, Route, Sent, register
from sglang_harness.weights.routes.buckets import Bucket

if TYPE_CHECKING:
    import torch

#: Of every route that ends at ``/update_weights_from_tensor``.
TENSOR_UPDATE = Needs(posts=("/update_weights_from_tensor",), one_replica=True)


class InBody(Route):
    """``/update_weights_from_tensor`` with the bytes themselves, once for every rank."""

    needs = TENSOR_UPDATE
    flattened: ClassVar[bool] = False

    def prepare(self, job: Job) -> None:
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
        update = job.target.client.send(calls.update_weights_from_tensor(body, timeout=job.timeout))
        answered = time.monotonic()
        given = body.handed_over_at or answered
        return Sent(update.message, read - started, packed - read, given - packed, answered - given)

    def close(self) -> list[str]:
        self.__dict__.pop("_room", None)
        return []


@register
class Tensor(InBody):
    """As a list of names and tensors."""

    name = "tensor"
    title = "sent as lists of tensors in the body of requests"


@register
class TensorBucket(InBody):
    """As one ``flattened_bucket``."""

    name = "tensor-bucket"
    title = "sent as flattened buckets in the body of requests"
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
