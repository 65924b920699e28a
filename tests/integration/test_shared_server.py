"""What one healthy server shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_harness import suite
from sglang_harness.errors import Refused, SpecError
from sglang_harness.runtime.docker import SGLangServerContainer
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec
from sglang_harness.suite.check import Context, run_check
from sglang_harness.suite.checks.generate import greedy
from sglang_harness.suite.checks.weights.disk import variant
from sglang_harness.verdict import Outcome

pytestmark = pytest.mark.engine


@pytest.fixture
def context(shared_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Context:
    def none() -> None:
        raise AssertionError("no check here needs a server of its own")

    return Context(shared_server, 11, none, tmp_path_factory.mktemp("scratch"))


def test_the_server_came_up_phase_by_phase(shared_server: Server) -> None:
    report = shared_server.report
    assert [p.name for p in report.phases] == ["create", "import", "load", "first generation"]
    assert report.ready_by == "/ready"
    assert report.first_tokens == 2


def test_listed_models_answer_before_the_server_can_generate(shared_server: Server) -> None:
    # The classic wrong readiness probe; seen with every version that was run.
    assert "/v1/models" in shared_server.report.premature


def test_the_container_has_no_more_rights_than_it_needs(shared_server: Server) -> None:
    made = shared_server.about()
    assert made["cap_drop"] == ["ALL"]
    assert made["read_only_root"] is True
    assert made["user"] == "sglang"
    assert made["init"] is True
    assert made["security_opt"] == ["no-new-privileges:true"]
    (binding,) = made["ports"]["30000/tcp"]
    assert binding["HostIp"] == "127.0.0.1"


def test_the_key_is_in_no_argument_list_and_in_no_log(shared_server: Server) -> None:
    key = shared_server.running.api_key
    assert key
    pids = shared_server.running.host_pids()
    assert pids, "the processes of the server can be seen from here"
    for pid in pids:
        try:
            assert key not in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        except FileNotFoundError:
            continue
    assert key in shared_server.running.logs(), "SGLang prints its key, or this proves nothing"
    assert key not in shared_server.logs()
    assert key not in str(shared_server.about())


def test_a_refusal_names_the_call_and_the_reason(shared_server: Server) -> None:
    with pytest.raises(Refused, match=r"POST /generate.*400") as refused:
        shared_server.client.generate("x", sampling={"max_new_tokens": 1, "no_such_field": 1})
    assert "no_such_field" in refused.value.reason


@pytest.mark.parametrize(
    ("sampling", "words"),
    [({"temperature": -1.0}, "temperature"), ({"max_new_tokens": "many"}, "")],
)
def test_each_shape_of_error_becomes_one_type(
    shared_server: Server, sampling: dict[str, object], words: str
) -> None:
    with pytest.raises(Refused) as refused:
        shared_server.client.generate("x", sampling=sampling)
    assert refused.value.status == 400
    assert words in refused.value.reason


def test_routes_are_known_by_asking_the_server(shared_server: Server) -> None:
    assert shared_server.client.has_route("POST", "/begin_weight_update")
    assert not shared_server.client.has_route("POST", "/no_such_route")


def test_new_weights_are_told_apart_from_wrong_ones(context: Context) -> None:
    """The check is right on a real server, and wrong as soon as nothing was pushed."""
    from sglang_harness.suite.checks.weights.disk import DiskUpdateIsServed

    class NothingPushed(DiskUpdateIsServed):
        """Pushes the weights that are served already: an update that changes nothing."""

        def observe(self, context: Context):
            made = variant(context)
            lie = type(made)(
                made.folder, context.server.running.model_path(), made.bytes, made.oracle
            )
            context.variants[context.seed] = lie
            try:
                return super().observe(context)
            finally:
                context.variants[context.seed] = made

    honest, figures = run_check(DiskUpdateIsServed(), context)
    assert honest.outcome is Outcome.PASS, honest.message
    assert {f.name for f in figures} == {"push from disk", "push from disk, rate"}
    lying, _ = run_check(NothingPushed(), context)
    assert lying.outcome is Outcome.FAIL
    assert "unchanged" in lying.message
    assert "log-probability" in lying.message


def test_a_check_leaves_the_server_as_it_was(context: Context) -> None:
    client = context.server.client
    before, info = client.checksums(), client.model_info()
    for name in ("weights/disk", "weights/stale-prefix", "memory/updates-do-not-grow"):
        result, _ = run_check(suite.registered()[name], context)
        assert result.outcome is Outcome.PASS, result.message
    assert client.checksums() == before
    assert client.model_info() == info


def test_a_check_that_takes_too_long_is_an_error_and_not_a_verdict(context: Context) -> None:
    with context.server.client.within(0.05):
        result, _ = run_check(suite.registered()["generate/greedy-tokens"], context)
    assert result.outcome is Outcome.ERROR
    assert re.search(r"the caller's time limit", result.message)


def test_a_port_in_use_is_one_clear_line_and_leaves_nothing(shared_server: Server) -> None:
    port = int(shared_server.address.rsplit(":", 1)[1])
    container = SGLangServerContainer(
        ServerSpec(model="tiny", port=port),
        model=shared_server.model,
        image=shared_server.about()["image"],
        device="cpu",
    )
    with pytest.raises(SpecError, match=f"Port {port} on 127.0.0.1 is in use"):
        container.start()
    assert container.left_behind() == []


def test_a_container_for_a_gpu_is_created_as_asked_and_never_started(shared_server: Server) -> None:
    container = SGLangServerContainer(
        ServerSpec(model="tiny", gpus="0,GPU-abc", shm_size="32g", memory="16g"),
        model=shared_server.model,
        image=shared_server.about()["image"],
        device="gpu",
    )
    try:
        container.create()
        made = container.inspect()
    finally:
        container.end()
    (request,) = made["device_requests"]
    assert request["DeviceIDs"] == ["0", "GPU-abc"]
    assert request["Capabilities"] == [["gpu"]]
    assert made["ipc_mode"] == "shareable"
    assert made["shm_size"] == 32 << 30
    assert {u["Name"]: u["Hard"] for u in made["ulimits"]} == {"memlock": -1, "stack": 67108864}
    assert made["memory_limit"] == 16 << 30
    assert "--device" not in made["command"], "SGLang finds the GPU by itself"
    assert container.left_behind() == []


def test_memory_is_read_where_it_is(shared_server: Server) -> None:
    (reading,) = shared_server.memory.mark("test")
    assert reading.source == "container"
    # Three Python processes with torch and SGLang imported: hundreds of MiB at least.
    assert reading.used_bytes > 300 << 20
    assert reading.used_bytes == reading.parts["anonymous"] + reading.parts["shared"]


def test_thirty_two_threads_share_one_client(shared_server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> int:
        answer = shared_server.client.generate([number + 10, 20], sampling=greedy(2))
        return answer.prompt_tokens

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == [2] * 32


def test_a_server_without_lora_takes_no_adapter_and_is_not_asked(
    shared_server: Server, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="it was started without --enable-lora"):
        shared_server.adapters.push(tmp_path, name="policy")
