"""Every route to new weights, on real SGLang in separate containers, and what happens when one
breaks on the way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sglang_harness.checkpoint.made import tiny
from sglang_harness.errors import NoAnswerInTime, Refused
from sglang_harness.peer import Peer
from sglang_harness.runtime import engine
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.weights import PushFailed, PushReport, routes
from sglang_harness.weights.routes.base import Sent
from sglang_harness.weights.routes.buckets import Bucket
from sglang_harness.weights.routes.distributed import Distributed
from sglang_harness.weights.routes.in_body import Tensor

pytestmark = pytest.mark.engine

#: Those that lead to a server on a CPU.
ROUTES = routes.names(device="cpu")

#: Cuts the tiny model's 2 MB into three buckets.
SMALL = 800_000


@pytest.fixture(scope="module")
def folders() -> tuple[Path, Path]:
    """The served checkpoint and another one."""
    return tiny.folder(0), tiny.folder(7)


# --- 0.5.20: no sessions, and checksums that need CUDA ----------------------------------------


def test_a_server_without_sessions(folders: tuple[Path, Path]) -> None:
    old, new = folders
    with Server.start(ServerSpec(model="tiny", sglang_version="0.5.20")) as server:
        assert not server.client.has_route("POST", "/begin_weight_update")
        for route in ROUTES:
            for folder in (new, old):
                report = server.weights.push(folder, route=route, bucket_bytes=SMALL)
                assert not report.session
                assert report.outcome == "unproven"
                assert report.checksums.says == "not available"
                assert "CUDA" in report.checksums.how
                assert report.logprobs.says == "agrees", str(report)
                assert report.label.says == "agrees"


# --- a peer that never joins ----------------------------------------------------------------


class NeverJoins(Distributed):
    """A trainer that dies before the rendezvous: nobody is rank 0."""

    def _join(self, peer: Peer, backend: str, port: int) -> None:
        pass


def test_a_peer_that_never_joins_is_bounded_and_leaves_an_unfit_server(
    folders: tuple[Path, Path], warm_runtime: DockerRuntime
) -> None:
    spec = ServerSpec(model="tiny", limits={"stop": 5})
    with Server.start(spec, runtime=warm_runtime) as server:
        started = time.monotonic()
        with pytest.raises(PushFailed) as raised:
            server.weights.push(folders[1], route=NeverJoins(joins_within=8.0))
        report = raised.value.report
        assert isinstance(raised.value.__cause__, NoAnswerInTime)
        assert time.monotonic() - started < 240
        assert "init_weights_update_group" in report.reason
        assert report.old == [n for b in report.buckets for n in b.tensors]
        # The server waits for rank 0 and answers nothing else (0.5.23).
        assert report.unfit is not None
        assert "no generation succeeded" in report.unfit
        assert report.steps == []
        assert server.stop().left_behind == []


# --- 0.5.23, the shared server for the rest -----------------------------------------------------


@pytest.fixture
def server(shared_server: Server) -> Server:
    return shared_server


def shm(server: Server) -> set[str]:
    """torch's segments in the server's /dev/shm."""
    container: Any = server.running
    code = "import os; print(*[n for n in os.listdir('/dev/shm') if n.startswith('torch_')])"
    done = container._container.exec_run(["python3", "-c", code])
    return set(done.output.decode().split())


def test_every_route_makes_the_same_server_and_the_way_back_restores_it(
    server: Server, folders: tuple[Path, Path]
) -> None:
    old, new = folders
    first = server.client.checksums()
    answer = server.client.generate("Hello", sampling={"temperature": 0, "max_new_tokens": 8})
    made = {}
    for route in ROUTES:
        there = server.weights.push(new, route=route, bucket_bytes=SMALL)
        made[route] = server.client.checksums()
        back = server.weights.push(old, route=route, bucket_bytes=SMALL)
        for report in (there, back):
            assert report.outcome == "good", str(report)
            assert report.label.says == "agrees"
            assert report.session == routes.kind(route).needs_session
            assert len(report.buckets) == (1 if routes.kind(route).in_one_piece else 3)
            assert report.seconds_ours + report.seconds_server <= report.seconds
            assert PushReport.model_validate_json(report.model_dump_json()) == report
        assert server.client.checksums() == first, route
        again = server.client.generate("Hello", sampling={"temperature": 0, "max_new_tokens": 8})
        assert again.output_ids == answer.output_ids
    assert len({sums.engine for sums in made.values()}) == 1, "all routes end at one server"
    assert made["disk"].changed_since(first)


def test_strict_wipes_the_old_weights_first(server: Server, folders: tuple[Path, Path]) -> None:
    for folder in reversed(folders):
        report = server.weights.push(folder, route="tensor", strict=True)
        assert report.outcome == "good"
        assert [s.outcome for s in report.steps if s.name == "wipe"] == ["done"]


class LosesOne(Tensor):
    """Leaves one tensor out, and takes the server's 'success' for an answer."""

    def send(self, bucket: Bucket) -> Sent:
        kept = tuple(s for s in bucket.slots if not s.name.endswith("1.mlp.down_proj.weight"))
        return super().send(Bucket(bucket.number, kept))


def test_a_lost_tensor_is_named_although_the_server_said_success(
    server: Server, folders: tuple[Path, Path]
) -> None:
    with pytest.raises(PushFailed) as raised:
        server.weights.push(folders[1], route=LosesOne())
    report = raised.value.report
    assert {b.outcome for b in report.buckets} == {"done"}
    assert report.checksums.says == "differs"
    assert report.logprobs.says == "differs"
    assert report.old == ["model.layers.1.mlp.down_proj.weight"]
    assert "its old value" in report.checksums.wrong[0]
    assert "token" in report.logprobs.wrong[0]
    assert report.put_back is not None
    assert report.unfit is None
    assert server.weights.push(folders[0], route="tensor").outcome == "good"


class Breaks(Tensor):
    """Its second bucket names a format that the server refuses, with 400, before it looks."""

    def send(self, bucket: Bucket) -> Sent:
        if bucket.number == 1:
            self._job.target.client.update_weights_from_disk("/nowhere")
        return super().send(bucket)


def test_a_bucket_that_fails_in_the_middle_leaves_a_server_that_serves(
    server: Server, folders: tuple[Path, Path]
) -> None:
    before = server.client.checksums()
    with pytest.raises(PushFailed) as raised:
        server.weights.push(folders[1], route=Breaks(), bucket_bytes=SMALL)
    report = raised.value.report
    assert isinstance(raised.value.__cause__, Refused)
    assert [b.outcome for b in report.buckets] == ["done", "refused", "not sent"]
    assert {"end", "continue"} <= {s.name for s in report.steps if s.outcome == "done"}
    assert set(report.new) | set(report.old) | set(report.unknown) == {
        n for b in report.buckets for n in b.tensors
    }
    assert "lm_head.weight" in report.new
    assert report.old
    assert report.put_back is not None
    assert "verified by checksums" in report.put_back
    assert server.client.checksums() == before
    assert server.client.generate("Hello", sampling={"max_new_tokens": 2}).completion_tokens == 2


def test_a_peer_and_its_shared_memory_are_gone_when_it_has_ended(
    server: Server, folders: tuple[Path, Path]
) -> None:
    before = shm(server)
    server.weights.push(folders[1], route="shared-memory")
    client = engine.connect()
    try:
        (beside,) = [t for t in engine.ours(client) if "-peer-" in t.name]
        inspected = client.api.inspect_container(beside.name)
        assert shm(server) - before, "it is there while it is used, or this proves nothing"
        key = server.running.api_key
        assert key
        assert key not in str(inspected["Config"]), "the peer has no use for the server's key"
        assert server.weights.close() == []
        assert not [t for t in engine.ours(client) if "-peer-" in t.name]
        assert shm(server) <= before
    finally:
        client.close()
    again = server.weights.push(folders[0], route="shared-memory")
    assert again.outcome == "good", str(again)


def test_a_trainer_that_left_its_session_open_is_told(
    server: Server, folders: tuple[Path, Path]
) -> None:
    server.client.begin_weight_update()
    try:
        with pytest.raises(PushFailed, match="already open") as raised:
            server.weights.push(folders[1])
        assert "nothing was sent" in (raised.value.report.put_back or "")
    finally:
        server.client.end_weight_update()
    assert server.weights.unfit is None
