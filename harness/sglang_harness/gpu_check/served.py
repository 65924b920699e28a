"""Which models and servers the parts about weights and memory ask for, and how a part that has seen
something ends. They ask for the same server, so that it is started once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_harness import checkpoint
from sglang_harness.errors import NotProvided
from sglang_harness.gpu_check.context import Context
from sglang_harness.gpu_check.outcomes import NotHere
from sglang_harness.server import Server
from sglang_harness.spec import Argument

#: Seconds for twenty cycles, and for one push: see :class:`sglang_harness.spec.Limits`.
CHECK = 100.0

#: Bytes of disk that one of these models takes on a GPU.
MODEL_BYTES = 2_500_000_000

#: Share of the free memory that a server takes: there has to be room for servers of the suite's
#: checks beside the first one and for peers, and what is released and resumed fifty times takes its
#: time by its size.
MEMORY = 0.4

#: Deviations that a part's message names.
NAMED = 5


def model(context: Context, *, seed: int = 0) -> str:
    """A checkpoint in bfloat16 of the size that GPUs are used for; on a CPU a small one. Those of
    two seeds have the same shape and other weights."""
    size = "1.2b" if context.on_gpu else "small"
    return f"random-{size}" if seed == 0 else f"random-{size}:{seed}"


def other_checkpoint(context: Context) -> Path:
    """A second checkpoint for the server of :func:`shared`, made where it is missing.

    Raises:
        MissingExtra: torch is missing.
        NotEnoughRoom: the disk does not suffice.
    """
    folder = checkpoint.locate(model(context, seed=1), context.say)
    assert folder is not None, "a model that is made has a folder"
    return folder


def shared(context: Context) -> Server:
    """The server that these parts share, with a memory saver on a GPU.

    Raises:
        HarnessError: it did not start.
        NotHere: it did not start before.
    """
    return context.server(
        model=model(context),
        server_args={**memory_share(context), **saver(context)},
        limits=limits(context),
    )


def memory_share(context: Context) -> dict[str, Argument]:
    """The flag with which a server takes :data:`MEMORY`, on a GPU and unless the command line has
    another."""
    if not context.on_gpu or "mem-fraction-static" in context.settings.server_args:
        return {}
    return {"mem-fraction-static": MEMORY}


def saver(context: Context) -> dict[str, Argument]:
    """The flag of the memory saver, unless ``server-flags`` has found out whether it works here."""
    if not context.on_gpu or context.earlier("server-flags").get("server_args") is not None:
        return {}
    return {"enable-memory-saver": True}


def limits(context: Context) -> dict[str, float]:
    """Seconds, where these parts need others than the usual ones."""
    return {"check": CHECK * context.settings.slow}


def scratch(context: Context) -> Path:
    """A folder that goes with the run."""
    folder = context.settings.models / context.part
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ended(context: Context, figures: Mapping[str, Any], wrong: Sequence[str]) -> dict[str, Any]:
    """The end of a part that has seen everything: its figures, kept whether it holds or not.

    Raises:
        AssertionError: something is wrong; names the first ones.
    """
    for key, value in figures.items():
        context.put(key, value)
    for each in wrong:
        context.say(f"wrong: {each}")
    more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    assert not wrong, "; ".join(wrong[:NAMED]) + more
    return dict(figures)


@contextmanager
def not_run_where_not_provided() -> Iterator[None]:
    """What this machine or SGLang cannot provide is no failure.

    Raises:
        NotHere: in place of NotProvided.
    """
    try:
        yield
    except NotProvided as error:
        raise NotHere(error.message.rstrip(".")) from None
