"""A server's state is read from the server, and restored within bounds of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from scripted_runtime import DONE, GENERATED, HANGS, ScriptedRuntime, ScriptedSGLang
from scripted_server import Answer

from sglang_harness.errors import ServerDied
from sglang_harness.server import Server, state
from sglang_harness.server.state import CannotRestore, State, restore, unresponsive
from sglang_harness.spec import ServerSpec

Start = Callable[..., Server]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a server over a scripted SGLang, prepared by a function of it."""
    monkeypatch.setattr(state, "ANSWERS_WITHIN", 0.5)
    monkeypatch.setattr(state, "LOOKED_AT_WITHIN", 1.0)
    started: list[Server] = []

    def start(prepare: Callable[[ScriptedSGLang], object] = lambda _: None) -> Server:
        runtime = ScriptedRuntime(lambda running: prepare(running.sglang))
        limits = {"start": 5.0, "request": 5.0}
        started.append(Server.start(ServerSpec.make(limits=limits), runtime=runtime))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def sglang(server: Server) -> Any:
    running: Any = server.running
    return running.sglang


def test_a_server_that_was_left_alone_differs_in_nothing(start: Start):
    server = start()
    assert restore(server, State.of(server)).differed == []


@pytest.mark.parametrize(
    ("leave", "told"),
    [
        (lambda s: s.client.pause(), "paused"),
        (lambda s: s.client.update_weights_from_disk("/other"), "1 tensors (w, ...)"),
    ],
    ids=["paused", "other weights"],
)
def test_what_was_left_is_restored_although_the_time_of_the_check_is_over(
    start: Start, leave: Any, told: str
):
    server = start()
    first = State.of(server)
    leave(server)
    with server.client.within(-1.0):
        assert told in restore(server, first).differed
    assert State.of(server) == first
    assert unresponsive(server) is None


def test_requests_that_still_run_are_aborted(start: Start):
    server = start()
    first = State.of(server)
    script = sglang(server).http.script
    script["POST /flush_cache"] = [Answer(400, {"error": "pending requests"}), Answer(body="ok")]
    script["POST /abort_request"] = DONE
    assert restore(server, first).differed == ["running requests"]


def test_an_adapter_that_was_not_there_is_unloaded(start: Start):
    server = start()
    first = State.of(server)
    names = ["tiny", "policy"]
    script = sglang(server).http.script

    def unload(seen: Any) -> Answer:
        names.remove(seen.json()["lora_name"])
        return Answer(body={"success": True, "loaded_adapters": {}})

    script["GET /v1/models"] = lambda _: Answer(body={"data": [{"id": n} for n in names]})
    script["POST /unload_lora_adapter"] = unload
    restore(server, first)
    assert names == ["tiny"]


def test_weights_that_cannot_be_loaded_again_are_told(start: Start):
    server = start()
    first = State.of(server)
    server.client.update_weights_from_disk("/other")
    sglang(server).disk_works = False
    with pytest.raises(CannotRestore, match="still differ"):
        restore(server, first)


@pytest.mark.parametrize("route", ["GET /model_info", "POST /generate", "POST /flush_cache"])
def test_a_server_that_hangs_is_not_waited_for_longer_than_looking_may_take(
    start: Start, route: str
):
    server = start()
    first = State.of(server)
    sglang(server).http.script[route] = HANGS
    with pytest.raises(CannotRestore, match="cannot be restored"):
        restore(server, first)


def test_a_server_that_died_is_told_as_that(start: Start):
    server = start()
    first = State.of(server)
    sglang(server).mortal.die()
    assert server.running.watch.wait(5.0) is not None
    with pytest.raises(ServerDied):
        restore(server, first)


def cannot_compute_checksums(server: ScriptedSGLang) -> None:
    server.http.script["POST /weights_checker"] = Answer(400, {"message": "needs CUDA"})
    server.http.script["POST /generate"] = lambda _: Answer(body=with_logprobs(server.weights))


def with_logprobs(weights: str) -> dict[str, Any]:
    about = {**GENERATED["meta_info"], "output_token_logprobs": [[-float(len(weights)), 5, None]]}
    return {**GENERATED, "meta_info": about}


def test_where_there_are_no_checksums_log_probabilities_tell_other_weights(start: Start):
    server = start(cannot_compute_checksums)
    first = State.of(server)
    assert first.checksums is None
    server.client.update_weights_from_disk("/quite-another")
    assert restore(server, first).differed == ["weights (by log-probabilities)"]
    assert sglang(server).weights == "first"


def test_another_number_of_ranks_or_of_tokens_is_a_difference_and_no_slip(start: Start):
    server = start()
    first = State.of(server)
    ranks = [{"parallelism_info": {"tp_rank": n}, "checksums": {"w": "first"}} for n in range(2)]
    sglang(server).http.script["POST /weights_checker"] = Answer(body={"ranks": ranks})
    assert first.differences(State.of(server)) == ["2 ranks state checksums"]
    by_tokens, fewer = (
        replace(first, checksums=None, fingerprint=tokens) for tokens in ((0.0, 1.0), (0.0,))
    )
    assert by_tokens.differences(fewer) == ["weights (by log-probabilities)"]


def says_nothing_of_its_routes(server: ScriptedSGLang) -> None:
    # Every path is 200 to OPTIONS: the answers tell nothing, so every route counts as offered.
    for path in ("/sglang-harness/no-such-route", "/ready", "/continue_generation"):
        for method in ("OPTIONS", "PROPFIND"):
            server.http.script[f"{method} {path}"] = Answer(200, "")
    server.http.script["GET /openapi.json"] = Answer(404, {"detail": "Not Found"})
    del server.http.script["POST /continue_generation"]


def test_a_server_that_does_not_tell_its_routes_can_be_restored(start: Start):
    server = start(says_nothing_of_its_routes)
    first = State.of(server)
    ready = sglang(server).http.script.pop("GET /ready")
    assert state.is_paused(server) is None
    assert restore(server, first).differed == []
    sglang(server).http.script["GET /ready"] = ready
