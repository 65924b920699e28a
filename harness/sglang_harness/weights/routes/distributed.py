"""By a process group: a peer next to the server is rank 0, the server's ranks follow.

NCCL (GPU) was not run by this project yet; gloo (CPU) was.
"""

from __future__ import annotations

import threading
import time
import uuid

from sglang_harness.client import Update, calls
from sglang_harness.errors import HarnessError, NoAnswerInTime
from sglang_harness.peer import Peer
from sglang_harness.weights.report import NotPrepared
from sglang_harness.weights.routes.base import Job, Needs, Route, Sent, register
from sglang_harness.weights.routes.buckets import Bucket
from sglang_harness.weights.routes.gpu_places import beside
from sglang_harness.weights.routes.peer import largest, open_in_peer, slots

#: Seconds for all ranks to find each other.
JOINS_WITHIN = 60.0

#: Seconds for the peer to import SGLang, whose rendezvous it uses.
IMPORTS_WITHIN = 180.0


@register
class Distributed(Route):
    """``/init_weights_update_group`` and ``/update_weights_from_distributed``.

    Args:
        joins_within: seconds for the rendezvous. A server that waits for a peer answers nothing
            else (SGLang 0.5.23); this bounds how long the harness waits for it.
    """

    name = "distributed"
    title = "broadcast by a peer over a process group (gloo on a CPU, NCCL on a GPU)"
    needs = Needs(
        posts=("/init_weights_update_group", "/update_weights_from_distributed"),
        peer=True,
        one_replica=True,
        gpu_beside=True,
    )
    # The peer imports SGLang for its rendezvous: half a minute.
    quick = False
    unverified = "NCCL: not run yet"

    def __init__(self, *, joins_within: float = JOINS_WITHIN) -> None:
        self._joins_within = joins_within
        self._group = f"sglang-harness-{uuid.uuid4().hex[:8]}"
        self._joined = False
        self._peer: Peer | None = None
        self._device: int | None = None
        """The number of the GPU that the peer sends from; ``None``: it sends from memory."""

    def prepare(self, job: Job) -> None:
        self._job = job
        if job.target.device == "gpu":
            place = beside(job.target, job.target.client.server_info())
            if isinstance(place, str):
                raise NotPrepared(f"Route '{self.name}' is not available any more: {place}.")
            self._device = place
        self._inside = job.stage(reader="peer")

    def open(self, job: Job) -> None:
        self._peer = peer = open_in_peer(job, self._inside, shared=False)
        peer.ask("prepare", timeout=IMPORTS_WITHIN)
        port = int(peer.ask("port", timeout=10.0)["port"])
        backend = "gloo" if self._device is None else "nccl"
        self._join(peer, backend, port)
        answer: list[Update | HarnessError] = []

        def ask_server() -> None:
            try:
                answer.append(
                    job.target.client.send(
                        calls.init_weights_update_group(
                            master_address="127.0.0.1",
                            master_port=port,
                            rank_offset=1,
                            world_size=1 + job.ranks,
                            group_name=self._group,
                            backend=backend,
                            timeout=self._joins_within,
                        )
                    )
                )
            except HarnessError as error:
                answer.append(error)

        asking = threading.Thread(target=ask_server, daemon=True, name="join-group")
        asking.start()
        asking.join(self._joins_within + 10.0)
        (told,) = answer or [
            NoAnswerInTime("POST /init_weights_update_group", "the call did not come back")
        ]
        if isinstance(told, HarnessError):
            raise told
        self._await_join(peer)
        self._joined = True

    def _join(self, peer: Peer, backend: str, port: int) -> None:
        """Rank 0 goes first: it is the one that is looked for."""
        peer.tell(
            "join",
            backend=backend,
            port=port,
            world=1 + self._job.ranks,
            group=self._group,
            timeout=self._joins_within,
            device=self._device,
        )

    def _await_join(self, peer: Peer) -> None:
        peer.answer(self._joins_within + 10.0)

    def send(self, bucket: Bucket) -> Sent:
        job, peer = self._job, self._peer
        assert peer is not None
        started = time.monotonic()
        peer.tell("broadcast", slots=slots(bucket), room=largest(job.buckets))
        update = job.target.client.send(
            calls.update_weights_from_distributed(
                names=bucket.names,
                dtypes=[slot.dtype for slot in bucket.slots],
                shapes=[slot.shape for slot in bucket.slots],
                group_name=self._group,
                weight_version=job.version,
                abort_all_requests=job.abort_all_requests,
                timeout=job.timeout,
            )
        )
        sent = peer.answer(job.timeout)
        whole = time.monotonic() - started
        read, hand_over = float(sent["seconds_read"]), float(sent["seconds_send"])
        return Sent(update.message, read, 0.0, hand_over, max(0.0, whole - read - hand_over))

    def close(self) -> list[str]:
        """Both sides leave the group; a peer that cannot is ended by the pusher."""
        left: list[str] = []
        if not self._joined or self._peer is None:
            return left
        for what, do in (
            ("the peer", lambda peer: peer.ask("leave", timeout=20.0)),
            (
                "the server",
                lambda _: self._job.target.client.send(
                    calls.destroy_weights_update_group(self._group, timeout=20.0)
                ),
            ),
        ):
            try:
                do(self._peer)
            except HarnessError as error:
                left.append(f"{what} has not left the process group: {error.message}")
        return left
