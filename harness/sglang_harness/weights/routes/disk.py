"""From disk: the server reads a folder that both sides see."""

from __future__ import annotations

import time

from sglang_harness.client import calls
from sglang_harness.weights.routes.base import Job, Needs, Route, Sent, register
from sglang_harness.weights.routes.buckets import Bucket


@register
class Disk(Route):
    """``/update_weights_from_disk``. Needs no session. It also changes ``model_path`` and the
    served name to the folder's (SGLang 0.5.23)."""

    name = "disk"
    title = "read by the server from a folder that both sides can read"
    needs = Needs(posts=("/update_weights_from_disk",), shared_folder=True)
    needs_session = False
    in_one_piece = True

    def prepare(self, job: Job) -> None:
        self._job = job
        self.inside = str(job.stage(reader="server"))

    def send(self, bucket: Bucket) -> Sent:
        del bucket
        job = self._job
        started = time.monotonic()
        update = job.target.client.send(
            calls.update_weights_from_disk(
                self.inside,
                weight_version=job.version,
                # The bracket flushes; refused here, the weights have changed all the same.
                flush_cache=False,
                abort_all_requests=job.abort_all_requests,
                timeout=job.timeout,
            )
        )
        return Sent(update.message, 0.0, 0.0, 0.0, time.monotonic() - started)
