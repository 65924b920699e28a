"""Which GPU does a peer send from? By the mock driver: no GPU was seen."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvml_mock import GIB, Device, Scenario, installed
from sglang_harness import peer
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.checks.weights.routes import leads_here
from sglang_harness.weights import NotPrepared, routes
from sglang_harness.weights.routes.gpu_places import beside, of_ranks


@pytest.fixture
def three_gpus(tmp_path: Path) -> Iterator[None]:
    devices = [Device(f"GPU-{name}", total=80 * GIB) for name in "abc"]
    with installed(Scenario(tmp_path / "scenario", devices)):
        yield


def server(gpus: str = "all", device: str = "gpu", **about: Any) -> Any:
    """A server, as far as routes ask it before a push."""
    client = SimpleNamespace(
        has_route=lambda *_: True, server_info=lambda: {"dp_size": 1, "tp_size": 1, **about}
    )
    running = SimpleNamespace(why_no_sidecar=lambda: None, why_no_files=lambda: None)
    return SimpleNamespace(
        client=client,
        running=running,
        device=device,
        spec=ServerSpec.make(model="tiny", gpus=gpus),
        lacks={},
    )


def test_the_ranks_of_a_server_are_on_gpus_counted_as_sglang_counts_them():
    assert of_ranks({}) == [0]
    assert of_ranks({"tp_size": 2, "base_gpu_id": 0, "gpu_id_step": 1}) == [0, 1]
    assert of_ranks({"tp_size": 3, "base_gpu_id": 1, "gpu_id_step": 2}) == [1, 3, 5]


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("gpus", "about", "number"),
    [
        ("all", {}, 1),
        ("all", {"base_gpu_id": 1}, 0),
        ("all", {"tp_size": 2}, 2),
        ("all", {"tp_size": 2, "gpu_id_step": 2}, 1),
        ("GPU-c,GPU-a", {}, 1),
    ],
)
def test_nccl_sends_from_the_first_gpu_of_the_run_that_no_rank_is_on(
    gpus: str, about: dict[str, int], number: int
):
    target = server(gpus, **about)
    assert beside(target, target.client.server_info()) == number
    assert routes.make("distributed").lacking(target) is None


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("gpus", "about", "words"),
    [
        ("0", {}, "of the server's 1 rank, and this run has 1 in all (--gpus 0)"),
        ("0,1", {"tp_size": 2}, "of the server's 2 ranks, and this run has 2 in all"),
        ("all", {"tp_size": 1, "pp_size": 3}, "of the server's 3 ranks, and this run has 3"),
        ("7", {}, "which GPUs its peer would see is not known: gpus names 7"),
    ],
)
def test_without_a_gpu_beside_the_servers_nccl_leads_nowhere_and_says_why(
    gpus: str, about: dict[str, int], words: str
):
    target = server(gpus, **about)
    assert words in str(routes.make("distributed").lacking(target))
    assert words in str(leads_here("distributed").lacking(target)), "the check is outside"


def test_two_mig_instances_of_one_gpu_are_one_to_nccl(tmp_path: Path):
    parts = [Device(f"MIG-{n}", total=10 * GIB, parent="GPU-a") for n in range(2)]
    whole = Device("GPU-a", total=80 * GIB)
    with installed(Scenario(tmp_path / "scenario", [whole, *parts])):
        told = routes.make("distributed").lacking(server())
    assert "NCCL takes no two ranks on one GPU" in str(told)


def test_on_a_cpu_gloo_needs_no_gpu():
    assert routes.make("distributed").lacking(server(device="cpu")) is None


# --- what the peer is told ------------------------------------------------------------------------


class Told:
    """A peer that notes its orders and does nothing."""

    def __init__(self) -> None:
        self.orders: dict[str, dict[str, Any]] = {}

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        self.orders[do] = order
        return {"port": 1, "payloads": ["x"], "seconds_read": 0.0, "seconds_pack": 0.0}

    def tell(self, do: str, **order: Any) -> None:
        self.orders[do] = order

    def answer(self, _: float) -> dict[str, Any]:
        return {}


def job(target: Any, told: Told) -> Any:
    target.client.send = lambda _: SimpleNamespace(message="")
    return SimpleNamespace(
        target=target, buckets=[SimpleNamespace(extent=1, slots=[], names=[])], timeout=1.0,
        ranks=1, version="v", abort_all_requests=False, stage=lambda reader: Path("/x"),
        peer=lambda: told,
    )  # fmt: skip


@pytest.mark.usefixtures("three_gpus")
def test_the_peer_is_put_on_that_gpu():
    told, route = Told(), routes.make("distributed")
    work = job(server(base_gpu_id=0), told)
    route.prepare(work)
    route.open(work)
    assert told.orders["join"]["backend"] == "nccl"
    assert told.orders["join"]["device"] == 1


@pytest.mark.usefixtures("three_gpus")
def test_nothing_is_sent_where_there_is_none_any_more():
    with pytest.raises(NotPrepared, match="NCCL takes no two ranks on one GPU"):
        routes.make("distributed").prepare(job(server("0"), Told()))


def test_on_a_cpu_the_peer_is_put_on_no_gpu():
    told, route = Told(), routes.make("distributed")
    work = job(server(device="cpu"), told)
    route.prepare(work)
    route.open(work)
    assert (told.orders["join"]["backend"], told.orders["join"]["device"]) == ("gloo", None)


def test_handles_are_of_the_gpu_that_each_rank_is_on():
    for about, devices in (({}, [0]), ({"tp_size": 2, "base_gpu_id": 4, "gpu_id_step": 2}, [4, 6])):
        told, route = Told(), routes.make("cuda-ipc")
        work = job(server(**about), told)
        route.prepare(work)
        route.open(work)
        route.send(work.buckets[0])
        assert told.orders["pack"]["devices"] == devices
    told, route = Told(), routes.make("shared-memory")
    work = job(server(), told)
    route.prepare(work)
    route.open(work)
    route.send(work.buckets[0])
    assert told.orders["pack"]["devices"] is None


def test_a_spec_that_names_no_gpu_is_not_asked_of_an_unknown_driver(tmp_path: Path):
    with installed(Scenario(tmp_path / "scenario", [])):
        told = routes.make("distributed").lacking(server("0"))
    assert "which GPUs its peer would see is not known" in str(told)


def test_the_sender_makes_its_connections_on_the_gpu_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
):
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location(
        "sender", Path(peer.__file__).parent / "sender.py"
    )
    assert spec is not None
    assert spec.loader is not None
    sender: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sender)
    done: list[Any] = []
    utils = SimpleNamespace(
        init_custom_process_group=lambda **how: done.append(("group", how["rank"])) or "group"
    )
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sglang.srt.utils", utils)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: done.append(("gpu", number)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda number: done.append(("sent", number)))
    monkeypatch.setattr(
        torch.Tensor, "cuda", lambda self, number: done.append(("there", number)) or self
    )
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: done.append("broadcast"))
    one = sender.Sender()
    one.join("nccl", 1, 2, "g", 1.0, device=2)
    monkeypatch.setattr(one, "_fill", lambda *_, **__: 0.0)
    one.room = torch.zeros(8, dtype=torch.uint8)
    one.broadcast([["w", 0, 8, "float32", [2]]], room=8)
    assert done == [("gpu", 2), ("group", 0), ("there", 2), "broadcast", ("sent", 2)]
