"""What a server offers is asked of it, with requests that change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scripted_server import Answer, Script, ScriptedServer, Seen

from sglang_harness.client import Client, RequestsTransport
from sglang_harness.client.offered import UNKNOWN_PATH
from sglang_harness.errors import Refused, Unreachable

NOT_ALLOWED = Answer(405, {"detail": "Method Not Allowed"})
NO_CONTENT = Answer(204)


@contextmanager
def asked(script: Script) -> Iterator[tuple[Client, ScriptedServer]]:
    with ScriptedServer(script) as server:
        client = Client(RequestsTransport(server.url, read_timeout=5.0), read_only=True)
        try:
            yield client, server
        finally:
            client.close()


def sent(server: ScriptedServer) -> list[str]:
    return [f"{seen.method} {seen.path}" for seen in server.seen]


def test_the_routes_are_read_from_the_servers_own_list_and_once() -> None:
    body = {"paths": {"/flush_cache": {"get": {}, "post": {}}, "/ready": {"get": {}}}}
    with asked({"GET /openapi.json": Answer(body=body)}) as (client, server):
        assert client.has_route("post", "/flush_cache")
        assert client.has_route("GET", "/ready")
        assert not client.has_route("POST", "/ready")
        assert not client.has_route("POST", "/begin_weight_update")
        assert sent(server) == ["GET /openapi.json"]


@pytest.mark.parametrize(
    "no_list",
    [
        pytest.param(Answer(404, {"detail": "Not Found"}), id="documentation disabled"),
        pytest.param(Answer(403, "Forbidden"), id="a proxy that hides it"),
        pytest.param(Answer(500, "Internal Server Error"), id="a list that cannot be made"),
        pytest.param(Answer(200, "<html>Welcome</html>"), id="a proxy's own page"),
        pytest.param(Answer(200, {"info": {}}), id="another document"),
    ],
)
def test_a_server_without_a_list_is_asked_for_each_path_once_with_a_safe_method(
    no_list: Answer,
) -> None:
    script: Script = {"GET /openapi.json": no_list, "OPTIONS /flush_cache": NOT_ALLOWED}
    with asked(script) as (client, server):
        for _ in range(2):
            assert client.has_route("POST", "/flush_cache")
            assert not client.has_route("POST", "/begin_weight_update")
        assert sent(server) == [
            "GET /openapi.json",
            f"OPTIONS {UNKNOWN_PATH}",
            "OPTIONS /flush_cache",
            "OPTIONS /begin_weight_update",
        ]


def as_cors(unknown: Answer) -> dict[str, Any]:
    """Answers every OPTIONS by itself, as the CORS layer before a server does."""
    answers = {f"OPTIONS {p}": NO_CONTENT for p in (UNKNOWN_PATH, "/ready", "/pause_generation")}
    return {
        **answers,
        f"PROPFIND {UNKNOWN_PATH}": unknown,
        "PROPFIND /ready": NOT_ALLOWED,
    }


def test_where_every_options_is_answered_alike_another_safe_method_tells() -> None:
    with asked(as_cors(Answer(404))) as (client, _):
        assert client.has_route("GET", "/ready")
        assert not client.has_route("POST", "/pause_generation")


def test_where_nothing_tells_the_check_is_asked_and_the_servers_refusal_is_judged() -> None:
    with asked(as_cors(NOT_ALLOWED)) as (client, server):
        assert client.has_route("GET", "/ready")
        assert client.has_route("POST", "/pause_generation")
        assert all(seen.method in ("GET", "OPTIONS", "PROPFIND") for seen in server.seen)
        assert {seen.path for seen in server.seen} == {"/openapi.json", UNKNOWN_PATH}


@pytest.mark.parametrize("status", [401, 503])
def test_what_says_nothing_about_a_route_is_no_answer_and_is_asked_again(status: int) -> None:
    script: Script = {"GET /openapi.json": [Answer(status, "no"), Answer(body={"paths": {}})]}
    with asked(script) as (client, _):
        with pytest.raises(Refused, match=str(status)):
            client.has_route("GET", "/ready")
        assert not client.has_route("GET", "/ready")


def test_a_server_that_goes_away_meanwhile_is_unreachable_and_not_without_the_route() -> None:
    gone = Answer(ending="silence")
    with asked({"OPTIONS /ready": gone}) as (client, _), pytest.raises(Unreachable):
        client.has_route("GET", "/ready")


def test_what_is_asked_runs_nothing_of_the_servers() -> None:
    def refuse(_: Seen) -> Answer:
        raise AssertionError("a route of the server was called")

    script: Script = {f"{m} /flush_cache": refuse for m in ("GET", "POST", "PUT", "DELETE")}
    with asked({**script, "OPTIONS /flush_cache": NOT_ALLOWED}) as (client, server):
        assert client.has_route("POST", "/flush_cache")
        assert all(not seen.body for seen in server.seen)
