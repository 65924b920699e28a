"""Tear-down: every step is tried, what failed is told, and an interruption waits for the rest."""

from __future__ import annotations

import pytest

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import EngineError, Interrupted


def fails(error: BaseException) -> None:
    raise error


def test_a_step_that_fails_skips_none_of_the_others_and_is_told():
    done: list[str] = []
    with Teardown() as down:
        down.step("peer", lambda: fails(EngineError("no answer")))
        down.step("server", lambda: done.append("server"))
        down.step("folder", lambda: fails(TimeoutError()))
        down.step("volume", lambda: done.append("volume"))
    assert done == ["server", "volume"]
    assert down.failures == ["peer: EngineError: no answer", "folder: TimeoutError"]


def test_a_step_gives_its_result_or_none():
    with Teardown() as down:
        assert down.step("exit code", lambda: 137) == 137
        assert down.step("exit code", lambda: fails(OSError("gone"))) is None


def test_what_a_step_left_behind_is_told_in_order():
    with Teardown() as down:
        down.collect("first", lambda: ["container a", "volume b"])
        down.collect("second", lambda: fails(OSError("disk")))  # type: ignore[arg-type,func-returns-value]
        down.collect("third", list[str])
    assert down.failures == ["container a", "volume b", "second: OSError: disk"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), Interrupted(15), SystemExit(1)])
def test_an_interruption_is_raised_after_the_remaining_steps(interruption: BaseException):
    done: list[str] = []
    down = Teardown()

    def tear_down() -> None:
        with down:
            down.step("server", lambda: fails(interruption))
            down.step("folder", lambda: done.append("folder"))
            down.step("second Ctrl-C", lambda: fails(KeyboardInterrupt("again")))
            down.step("volume", lambda: done.append("volume"))

    with pytest.raises(type(interruption)) as raised:
        tear_down()
    assert raised.value is interruption
    assert done == ["folder", "volume"]
    assert down.failures[0] == f"server: interrupted ({type(interruption).__name__})"


def test_what_is_being_raised_already_goes_on():
    with pytest.raises(ValueError, match="first"):  # noqa: PT012 -- the order is what is tested
        try:
            raise ValueError("first")
        finally:
            with Teardown() as down:
                down.step("peer", lambda: fails(OSError("later")))
    assert down.failures == ["peer: OSError: later"]
