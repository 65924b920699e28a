"""An abort is evidence about a neighbouring request only if that still ran when it was answered."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_harness.errors import HarnessError
from sglang_harness.suite.checks import stop
from sglang_harness.traffic.background import StreamEnded


class Client:
    """Aborts by what a request's id begins with, or by the whole id."""

    def __init__(self, *, by_prefix: bool, runs_for: int) -> None:
        self.by_prefix = by_prefix
        self.runs_for = runs_for
        """Requests of so many tokens or more still run when an abort is answered."""
        self.streams: list[Stream] = []

    def abort(self, request_id: str) -> None:
        for stream in self.streams:
            hit = stream.id.startswith(request_id) if self.by_prefix else stream.id == request_id
            stream.aborted = hit and not stream.is_over


class Stream:
    def __init__(self, client: Client, _: str, *, sampling: Any, request_id: str) -> None:
        self.id = request_id
        self.asked = sampling["max_new_tokens"]
        self.aborted = False
        self.is_over = self.asked < client.runs_for
        client.streams.append(self)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def wait_for(self, chunks: int, seconds: float) -> bool:
        return True

    def wait_until_over(self, seconds: float) -> bool:
        return True

    def end(self, seconds: float) -> StreamEnded:
        tokens = 4 if self.aborted else self.asked
        finish = "abort" if self.aborted else "length"
        return StreamEnded(text="", tokens=tokens, finish=finish, chunk_seconds=[])


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "BackgroundStream", Stream)


def seen(client: Client) -> stop.Aborted:
    return stop.abort_beside_neighbour(client, "x-1", "x-10")  # type: ignore[arg-type]


def test_a_neighbour_that_was_over_too_early_is_asked_for_more() -> None:
    client = Client(by_prefix=True, runs_for=50)
    told = seen(client)
    assert told.neighbour_asked == 96
    assert told.neighbour.finish == "abort", "the defect is seen on a fast machine too"
    assert stop.judge_aborted(told)


def test_one_that_ran_is_judged_at_once() -> None:
    assert seen(Client(by_prefix=True, runs_for=1)).neighbour_asked == 24
    assert stop.judge_aborted(seen(Client(by_prefix=False, runs_for=1))) == []


def test_where_nothing_can_be_found_out_that_is_said() -> None:
    with pytest.raises(HarnessError, match="384 tokens had ended before the abort"):
        seen(Client(by_prefix=True, runs_for=1000))
