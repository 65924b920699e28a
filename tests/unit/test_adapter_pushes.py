"""An adapter, from the call to the report: what is refused, and which copies of it stay."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_server import Answer, ScriptedServer, Seen

from sglang_harness.client import Client, RequestsTransport
from sglang_harness.errors import ModelError, SpecError, TimeIsOver
from sglang_harness.weights import AdapterFailed, AdapterPusher, WeightPusher

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


class LoraServer:
    """Holds adapters by name; a target for pushes whose base model is not on this machine, so that
    nothing but the requests is looked at."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.refuses = False
        self.unloads = True
        self.shared: set[PurePosixPath] = set()
        self._copies = 0
        self.lora = True
        posts = {
            "/load_lora_adapter": self.load,
            "/load_lora_adapter_from_tensors": self.load,
            "/unload_lora_adapter": self.unload,
        }
        self.http = ScriptedServer(
            {
                **{f"POST {path}": answer for path, answer in posts.items()},
                "GET /openapi.json": Answer(body={"paths": {p: {"post": {}} for p in posts}}),
                "GET /server_info": lambda _: Answer(
                    body={"tp_size": 2, "enable_lora": self.lora, "dtype": "float32"}
                ),
                "GET /model_info": Answer(body={"model_path": "m", "weight_version": "default"}),
                "GET /v1/models": lambda _: Answer(
                    body={"data": [{"id": name} for name in ("base", *self.loaded)]}
                ),
            }
        )
        self.client = Client(RequestsTransport(self.http.url), timeout=30.0)
        self.model = None
        self.device = "cpu"
        self.may_change = True
        self.spec = SimpleNamespace(limits=SimpleNamespace(check=30.0))
        self.running = SimpleNamespace(
            model_path=lambda: "m", reach=self, shared_folder=None, why_no_files=lambda: None
        )
        self.adapters = AdapterPusher(self, WeightPusher(self))  # type: ignore[arg-type]

    def load(self, seen: Seen) -> Answer:
        body = seen.json()
        if self.refuses:
            return Answer(body={"success": False, "error_message": "its rank is too large"})
        if "lora_path" in body:
            assert PurePosixPath(body["lora_path"]) in self.shared
        else:
            assert len(body["serialized_named_tensors"]) == 2, "one for each rank"
        self.loaded[body["lora_name"]] = body.get("lora_path", "")
        return Answer(body={"success": True, "loaded_adapters": list(self.loaded)})

    def unload(self, seen: Seen) -> Answer:
        if not self.unloads or seen.json()["lora_name"] not in self.loaded:
            return Answer(400, {"error": {"message": "no such adapter"}})
        del self.loaded[seen.json()["lora_name"]]
        return Answer(body={"success": True})

    # --- a reach that copies --------------------------------------------------------------

    def share(self, path: Path) -> PurePosixPath:
        self._copies += 1
        inside = PurePosixPath(f"/volume/{path.name}-{self._copies}")
        self.shared.add(inside)
        return inside

    def unshare(self, inside: PurePosixPath) -> None:
        self.shared.discard(inside)


@pytest.fixture
def server() -> Iterator[LoraServer]:
    made = LoraServer()
    yield made
    made.client.close()
    made.http.close()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2}))
    safetensors.save_file({"lora_A": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    return folder


def test_a_copy_stays_while_the_adapter_is_loaded(server: LoraServer, adapter: Path):
    """The server may evict the adapter, and load it from there again."""
    report = server.adapters.push(adapter, name="policy", route="disk")
    assert report.outcome == "unproven"
    assert "not known which base weights" in report.reason
    assert report.loaded == ["policy"]
    assert len(server.shared) == 1
    server.adapters.unload("policy")
    assert server.shared == set()


@pytest.mark.parametrize("route", ["disk", "tensor"])
def test_replacing_an_adapter_removes_the_copy_of_the_one_before(
    server: LoraServer, adapter: Path, route: Any
):
    for _ in range(3):
        report = server.adapters.push(adapter, name="policy", route="disk")
    assert report.replaced
    assert {str(inside) for inside in server.shared} == {server.loaded["policy"]}
    server.adapters.push(adapter, name="policy", route=route)
    assert len(server.shared) == (1 if route == "disk" else 0)


def test_a_copy_of_what_another_client_unloaded_goes_with_the_next_push(
    server: LoraServer, adapter: Path
):
    server.adapters.push(adapter, name="one", route="disk")
    server.client.unload_lora_adapter("one")
    server.adapters.push(adapter, name="two", route="disk")
    assert {str(inside) for inside in server.shared} == {server.loaded["two"]}


def test_a_refused_adapter_leaves_neither_itself_nor_a_copy(server: LoraServer, adapter: Path):
    server.refuses = True
    with pytest.raises(AdapterFailed, match="its rank is too large") as raised:
        server.adapters.push(adapter, name="policy", route="disk")
    assert "No adapter named 'policy' is loaded." in str(raised.value)
    assert server.shared == set()


def test_an_interrupted_push_leaves_neither_an_adapter_nor_a_copy(
    server: LoraServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.adapters, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.adapters.push(adapter, name="policy", route="disk")
    assert server.loaded == {}
    assert server.shared == set()


def test_a_bound_of_the_caller_never_forbids_to_unload_what_failed(
    server: LoraServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
):
    def over(*_: object) -> None:
        server.client._deadline = time.monotonic()
        server.client.models()

    monkeypatch.setattr(server.adapters, "_ask", over)
    with server.client.within(600), pytest.raises(AdapterFailed) as raised:
        server.adapters.push(adapter, name="policy", route="disk")
    assert isinstance(raised.value.__cause__, TimeIsOver)
    assert server.loaded == {}
    assert server.shared == set()


def test_an_adapter_that_cannot_be_unloaded_is_told(server: LoraServer, adapter: Path):
    server.adapters.push(adapter, name="policy", route="disk")
    server.unloads = False
    with pytest.raises(AdapterFailed, match="An adapter named 'policy' is still loaded"):
        server.adapters.push(adapter, name="policy", route="disk")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_sent(server: LoraServer, adapter: Path, value: float):
    tensors = {"lora_A": torch.tensor([1.0, value])}
    safetensors.save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite: lora_A"):
        server.adapters.push(adapter, name="policy")
    assert not [seen for seen in server.http.seen if seen.method == "POST"]


def test_a_server_that_takes_no_adapters_is_told(server: LoraServer, adapter: Path):
    server.lora = False
    with pytest.raises(SpecError, match="started without --enable-lora"):
        server.adapters.push(adapter, name="policy")
    with pytest.raises(SpecError, match="Choose one of disk, tensor"):
        server.adapters.push(adapter, name="policy", route="pigeon")  # type: ignore[arg-type]
