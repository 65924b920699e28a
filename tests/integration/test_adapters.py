"""LoRA adapters on a real server: brought by each route, proven, exchanged and taken away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_harness.checkpoint.made import lora
from sglang_harness.checkpoint.made.perturb import perturbed
from sglang_harness.errors import ModelError, SpecError
from sglang_harness.runtime.docker import DockerRuntime
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.checks.lora import lora_arguments
from sglang_harness.weights import AdapterFailed

pytestmark = pytest.mark.engine

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def server(warm_runtime: DockerRuntime) -> Iterator[Server]:
    spec = ServerSpec(model="tiny", server_args=lora_arguments("cpu"))
    with Server.start(spec, runtime=warm_runtime) as started:
        yield started


@pytest.fixture(scope="module")
def made(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    assert server.model is not None
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: lora.made(server.model, folder / name, seed)
        for seed, name in enumerate(("one", "two"), 1)
    }


def test_both_routes_bring_an_adapter_that_answers_as_peft_does(
    server: Server, made: dict[str, Path]
) -> None:
    for replaced, route in enumerate(("disk", "tensor")):
        report = server.adapters.push(made["one"], name="policy", route=route)  # type: ignore[arg-type]
        assert report.outcome == "good", report
        assert report.replaced is bool(replaced)
        assert (report.applied.says, report.base.says) == ("agrees", "agrees")
        assert "control: that with the base model is off by up to" in report.applied.how
        assert "policy" in server.client.models()
    second = server.adapters.push(made["two"], name="policy")
    assert second.outcome == "good", "nothing of the one before is left"
    server.adapters.unload("policy")
    assert "policy" not in server.client.models()


def test_it_lies_on_the_weights_that_were_pushed_before(
    server: Server, made: dict[str, Path], tmp_path: Path
) -> None:
    assert server.model is not None
    server.weights.push(perturbed(server.model, tmp_path / "step-1", seed=1), route="disk")
    assert server.adapters.push(made["one"], name="policy").outcome == "good"
    server.adapters.unload("policy")
    server.weights.push(server.model, route="disk")


def test_a_server_that_applies_another_adapter_is_told_and_it_is_taken_away(
    server: Server, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    share = server.reach.share
    monkeypatch.setattr(server.reach, "share", lambda _: share(made["two"]))
    with pytest.raises(AdapterFailed, match=r"with the adapter: prompt 0, token 0 .*adapter") as it:
        server.adapters.push(made["one"], name="policy", route="disk")
    assert (it.value.report.applied.says, it.value.report.base.says) == ("differs", "agrees")
    assert "policy" not in server.client.models()


def test_a_rank_that_the_server_does_not_take_is_told_in_its_words(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.model is not None
    monkeypatch.setattr(lora, "RANK", 16)
    large = lora.made(server.model, tmp_path / "large", 3)
    with pytest.raises(AdapterFailed, match=r"(?i)rank") as caught:
        server.adapters.push(large, name="large")
    assert "No adapter named 'large' is loaded" in str(caught.value)
    assert server.client.generate("Hello", sampling={"max_new_tokens": 2}).completion_tokens == 2


def test_what_is_no_adapter_is_never_sent(
    server: Server, made: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json is not there"):
        server.adapters.push(tmp_path, name="policy")
    bad = tmp_path / "bad"
    shutil.copytree(made["one"], bad)
    tensors = safetensors.load_file(bad / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    safetensors.save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"not finite: {name}"):
        server.adapters.push(bad, name="policy")
    with pytest.raises(SpecError, match="Unknown route 'carrier-pigeon' for adapters"):
        server.adapters.push(made["one"], name="policy", route="carrier-pigeon")  # type: ignore[arg-type]
    assert "policy" not in server.client.models()
