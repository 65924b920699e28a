"""Methods of the client, made from the calls, so that a signature is written once.

``generate = sends(calls.generate)`` in a class is a method with the parameters, types and
docstring of :func:`calls.generate`, for mypy and an IDE (through ``ParamSpec``) and for ``help``.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Generator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sglang_harness.client.call import Call

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class Sender(Protocol):
    """What such a method needs of the class that it is in."""

    def send(self, call: Call[T], /) -> T: ...

    def events(self, call: Call[T], /) -> Generator[T, None, None]: ...


def sends(make: Callable[P, Call[T]]) -> Callable[Concatenate[Sender, P], T]:
    """A method that sends the call that ``make`` makes, and returns its answer."""

    def method(client: Sender, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client.send(make(*args, **kwargs))

    return _method_like(method, make, _answer(make))


def streams(
    make: Callable[P, Call[T]],
) -> Callable[Concatenate[Sender, P], Generator[T, None, None]]:
    """A method that sends the call, and yields the events of the answer.

    Nothing is sent before the first event is asked for. Closing the generator closes the
    connection, upon which the server ends the request.
    """

    def method(client: Sender, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return client.events(make(*args, **kwargs))

    return _method_like(method, make, Generator[_answer(make), None, None])  # type: ignore[misc]


def gathers(
    make: Callable[P, Call[T]], whole: Callable[[Generator[T, None, None]], R], returns: type[R]
) -> Callable[Concatenate[Sender, P], R]:
    """A method that sends the call, and returns what ``whole`` makes of all events together."""

    def method(client: Sender, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return whole(client.events(make(*args, **kwargs)))

    return _method_like(method, make, returns)


def described_as(function: F, like: Callable[..., Any], *, returns: Any) -> F:
    """``function`` with the name, docstring and parameters of ``like``."""
    functools.update_wrapper(function, like)
    described = inspect.signature(like, eval_str=True).replace(return_annotation=returns)
    function.__signature__ = described  # type: ignore[attr-defined]
    return function


def _method_like(method: F, like: Callable[..., Any], returns: Any) -> F:
    described_as(method, like, returns=returns)
    # Else inspect takes the call's first parameter for the one that is bound.
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    taken = inspect.signature(method)
    described = taken.replace(parameters=[itself, *taken.parameters.values()])
    method.__signature__ = described  # type: ignore[attr-defined]
    return method


def _answer(make: Callable[..., Any]) -> Any:
    """``T`` of the ``Call[T]`` that ``make`` returns."""
    return typing.get_args(inspect.signature(make, eval_str=True).return_annotation)[0]
