"""From disk: the server reads a folder that both sides see."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sglang_harness.client import calls
from sglang_harness.weights.routes.base import Job, Sent, register
from sglang_harness.weights.routes.buckets import Bucket
from sglang_harness.weights.source.staging import stage

if TYPE_CHECKING:
    from sglang_harness.server import Server


@register("disk")
class Disk:
    """``/update_weights_from_disk``. Needs no session. It also changes ``model_path`` and the
    served name to the folder's (SGLang 0.5.23)."""

    name = "disk"
    needs_session = False
    in_one_piece = True

    def lacking(self, server: Server) -> str | None:
        if reason := lacks_shared_folder(server):
            return reason
        if not server.client.has_route("POST", "/update_weights_from_disk"):
            return "this SGLang has no POST /update_weights_from_disk"
        return None

    def open(self, job: Job) -> None:
        self._job = job
        started = time.monotonic()
        inside, made = stage(job.source, job.server.running, bin_too=True)
        job.seconds_staged = time.monotonic() - started
        if made is not None:
            job.staged.append(made)
        self.inside = str(inside)

    def send(self, bucket: Bucket) -> Sent:
        del bucket
        job = self._job
        started = time.monotonic()
        update = job.server.client.send(
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

    def close(self) -> list[str]:
        return []


def lacks_shared_folder(server: Server) -> str | None:
    """Why this server reads nothing that is put on disk here; ``None``: it does."""
    return server.running.why_no_files()
