"""Is memory released to the trainer and resumed, any number of times? Read by NVML on a GPU; what
needs no GPU is checked on host memory too, and each figure says where it was read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from sglang_harness import oracle as oracles
from sglang_harness.errors import HarnessError, NoAnswerInTime
from sglang_harness.memory.analysis.explained import ROUNDED_BY, Said, explain, said
from sglang_harness.memory.analysis.steady import Settled, settle
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    Need,
    Observation,
    expect,
    register,
)
from sglang_harness.suite.checks.weights.disk import (
    first_weights_afterwards,
    update_from_disk,
)
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.scored import Scored, Tokens, not_greedy, unequal, wrong_logprobs
from sglang_harness.suite.needs import (
    CHECKSUMS,
    GPU,
    LOADS_FROM_DISK,
    STARTED_HERE,
    launched_with,
    route,
)
from sglang_harness.verdict import Figure

if TYPE_CHECKING:
    from sglang_harness.server import Server

MIB = 1 << 20

#: As trainers name them, and as every SGLang that has tags knows them.
ALL_TAGS = ("kv_cache", "weights", "cuda_graph")
#: Seconds for memory to be free after a release has answered, or to be back after a resume.
FREE_WITHIN = 20.0
#: Bytes that may be freed by chance: less than this is not a release.
BY_CHANCE = 64 * MIB

RELEASE = route("POST", "/release_memory_occupation")
RESUME = route("POST", "/resume_memory_occupation")
SAVER = launched_with("enable-memory-saver", "it releases nothing")


def _has_saver(server: Server) -> str | None:
    if server.client.server_info().get("enable_memory_saver"):
        return "the server was started with --enable-memory-saver: it has to release memory"
    return None


def _says_nothing(server: Server) -> str | None:
    if said(server.client.server_info()).weights is None:
        return "this SGLang does not say how much memory it holds"
    return None


WITHOUT_SAVER = Need("no --enable-memory-saver", _has_saver)
SAYS_ITS_MEMORY = Need("memory figures in /server_info", _says_nothing)


def tolerance(bytes_said: int) -> int:
    """Bytes by which a device may be off what the server said: rounding, pages and what a driver
    keeps of a mapping. Not measured on a GPU."""
    return 32 * MIB + ROUNDED_BY + bytes_said // 50


def devices_of(context: Context) -> list[str]:
    """GPUs that the server has loaded something to; none where it has no GPU."""
    main = context.server.memory.source_names[0]
    if main != "nvml":
        return []
    marks = {r.mark: r.parts for r in context.server.memory.readings if r.source == main}
    before, ready = marks.get("before start", {}), marks.get("ready", {})
    return sorted(u for u in ready if ready[u] - before.get(u, 0) > BY_CHANCE)


def reader_of(context: Context) -> Callable[[], tuple[int, dict[str, int]]]:
    return context.server.memory.source(context.server.memory.source_names[0]).read


def fallen(
    where: str, devices: Sequence[str], high: dict[str, int], low: dict[str, int], by: int
) -> Iterator[Mismatch]:
    """Each device has at least ``by`` bytes less in use, less the tolerance."""
    for uuid in devices:
        freed = high.get(uuid, 0) - low.get(uuid, high.get(uuid, 0))
        if freed < by - tolerance(by):
            yield Mismatch(
                f"{where}, GPU {uuid}",
                f"at least {(by - tolerance(by)) / MIB:.0f} MiB less in use",
                f"{freed / MIB:.0f} MiB less",
                f"{high.get(uuid, 0) / MIB:.0f} to {low.get(uuid, 0) / MIB:.0f} MiB",
            )


def back(
    where: str, devices: Sequence[str], before: dict[str, int], after: dict[str, int], by: int
) -> Iterator[Mismatch]:
    """Each device is where it was, give or take the tolerance."""
    for uuid in devices:
        off = after.get(uuid, 0) - before.get(uuid, 0)
        if abs(off) > tolerance(by):
            yield Mismatch(
                f"{where}, GPU {uuid}",
                f"{before.get(uuid, 0) / MIB:.0f} MiB as before, within {tolerance(by) / MIB:.0f}",
                f"{after.get(uuid, 0) / MIB:.0f} MiB",
                f"{off / MIB:+.0f} MiB",
            )


def release(server: Server, released: list[str], tags: Sequence[str]) -> None:
    """Releases ``tags`` and notes them in ``released``, also where no answer came: the server may
    have obeyed all the same."""
    try:
        server.client.release_memory(tags)
    except NoAnswerInTime:
        released += tags
        raise
    released += tags


@contextmanager
def resumed_afterwards(server: Server) -> Iterator[list[str]]:
    """Yields a list for the tags that are released. What is left in it by an error is resumed, so
    that the next check finds a server that generates."""
    released: list[str] = []
    try:
        yield released
    finally:
        if released:
            with server.client.cleanup(), suppress(HarnessError):
                server.client.resume_memory(released)


# --- what the server says ----------------------------------------------------------------------


class Holdings(Observation):
    used: dict[str, int]
    """Bytes on each device of the server above what was there before it started."""
    weights: int | None
    kv_cache: int | None
    graphs: int | None


@register
class ServerKnowsItsMemory(Check[Holdings]):
    id = "memory/explained"
    sentence = "The server does not say it holds more memory than its GPU shows."
    observation = Holdings
    needs = (GPU, STARTED_HERE, SAYS_ITS_MEMORY)

    def observe(self, context: Context) -> Holdings:
        server = context.server
        what = said(server.client.server_info())
        before = next(r.parts for r in server.memory.readings if r.mark == "before start")
        now = reader_of(context)()[1]
        return Holdings(
            used={u: now[u] - before.get(u, 0) for u in devices_of(context)},
            weights=what.weights,
            kv_cache=what.kv_cache,
            graphs=what.graphs,
        )

    def judge(self, seen: Holdings) -> list[Mismatch]:
        known = Said(seen.weights, seen.kv_cache, seen.graphs).known
        wrong = [
            Mismatch(
                f"GPU {uuid}",
                f"at least the {known / MIB:.0f} MiB that the server says it holds",
                f"{used / MIB:.0f} MiB",
            )
            for uuid, used in seen.used.items()
            if known > used + tolerance(known)
        ]
        if not seen.used:
            wrong.append(Mismatch("GPUs that the server is on", "some", "none"))
        if not known > 0:
            wrong.append(Mismatch("what the server says it holds", "something", "nothing"))
        return wrong

    def figures(self, seen: Holdings) -> list[Figure]:
        if not seen.used:
            return []
        what = Said(seen.weights, seen.kv_cache, seen.graphs)
        most = max(explain(used, what).unexplained for used in seen.used.values())
        return [Figure.of("unexplained GPU memory", "MiB", "lower", max(0.0, most / MIB))]


# --- release by tag ----------------------------------------------------------------------------


class Released(BaseModel):
    """One release and the resume after it; bytes in use by device."""

    model_config = ConfigDict(extra="forbid")

    tags: list[str]
    said: int
    """What the server says that the tags hold on each of its devices."""
    before: dict[str, int]
    released: dict[str, int]
    resumed: dict[str, int]
    seconds_to_free: float
    """From the answer to the release until the device was where it stayed."""


class ReleasedByTag(Observation):
    devices: list[str]
    releases: list[Released]
    differing_checksums: list[str]
    """Against before, when the weights had been pushed again."""
    answers: list[Scored]


@register
class ReleaseByTag(Check[ReleasedByTag]):
    id = "memory/release-by-tag"
    sentence = (
        "Releasing 'kv_cache', 'weights' or both frees on each GPU what the server said they "
        "hold, resuming takes it again, and with the weights pushed again answers are right."
    )
    observation = ReleasedByTag
    needs = (
        GPU,
        SAVER,
        STARTED_HERE,
        SAYS_ITS_MEMORY,
        *LOADS_FROM_DISK,
        CHECKSUMS,
        RELEASE,
        RESUME,
    )
    changes = True

    def observe(self, context: Context) -> ReleasedByTag:
        client, devices = context.server.client, devices_of(context)
        sums = client.checksums()
        with first_weights_afterwards(context) as path:
            releases = [
                self._once(context, tags, devices, path)
                for tags in (("kv_cache",), ("weights",), ("kv_cache", "weights"))
            ]
            differing = client.checksums().changed_since(sums)
            answers = scored_by(context, context.oracle)
        return ReleasedByTag(
            devices=devices, releases=releases, differing_checksums=differing, answers=answers
        )

    @staticmethod
    def _once(
        context: Context, tags: tuple[str, ...], devices: Sequence[str], path: str
    ) -> Released:
        client, read = context.server.client, reader_of(context)
        holds = said(client.server_info()).of(tags) or 0
        client.flush_cache()
        before = settle(read).parts
        with resumed_afterwards(context.server) as still:
            release(context.server, still, tags)
            released = until(fallen, read, devices, before, holds)
            client.resume_memory(tags)
            still.clear()
        resumed = until(back, read, devices, before, holds)
        if "weights" in tags:
            # They come back as whatever was in those pages: sgl-project/sglang issue 19442.
            update_from_disk(context, path, "harness-again")
        return Released(
            tags=list(tags),
            said=holds,
            before=before,
            released=released.parts,
            resumed=resumed.parts,
            seconds_to_free=released.seconds,
        )

    def judge(self, seen: ReleasedByTag) -> list[Mismatch]:
        wrong: list[Mismatch] = []
        if not seen.devices:
            wrong.append(Mismatch("GPUs that the server is on", "some", "none"))
        if not any(r.said > 2 * tolerance(r.said) for r in seen.releases):
            wrong.append(
                Mismatch(
                    "what the server says it holds",
                    "enough to see whether it is released",
                    ", ".join(f"{'+'.join(r.tags)} {r.said / MIB:.0f} MiB" for r in seen.releases),
                )
            )
        for each in seen.releases:
            tags = "+".join(each.tags)
            wrong += fallen(
                f"release of {tags}", seen.devices, each.before, each.released, each.said
            )
            wrong += back(f"resume of {tags}", seen.devices, each.before, each.resumed, each.said)
        wrong += expect("checksums with the weights pushed again", [], seen.differing_checksums)
        wrong += wrong_answers("afterwards", seen.answers)
        return wrong

    def figures(self, seen: ReleasedByTag) -> list[Figure]:
        return [
            Figure.of(
                f"release of {'+'.join(each.tags)} to free memory",
                "s",
                "lower",
                each.seconds_to_free,
            )
            for each in seen.releases
        ]


def until(
    wrong: Callable[[str, Sequence[str], dict[str, int], dict[str, int], int], Iterator[Mismatch]],
    read: Callable[[], tuple[int, dict[str, int]]],
    devices: Sequence[str],
    before: dict[str, int],
    by: int,
) -> Settled:
    """Reads until ``wrong`` (:func:`fallen` or :func:`back`) finds nothing, or time is up."""
    return settle(
        read,
        reached=lambda now: not list(wrong("", devices, before, now, by)),
        timeout=FREE_WITHIN,
        since=time.monotonic(),
    )


def scored_by(context: Context, oracle: oracles.Oracle) -> list[Scored]:
    answers = []
    for prompt in PROMPTS[:2]:
        context.server.client.flush_cache()
        answer = context.server.client.generate(prompt, sampling=greedy(8), logprobs=True)
        answers.append(Scored.of(prompt, oracle.encode(prompt), answer, oracle, context.dtype))
    return answers


def wrong_answers(where: str, answers: Sequence[Scored]) -> Iterator[Mismatch]:
    if not answers:
        yield Mismatch(f"answers {where}", "some", "none")
    for answer in answers:
        if not answer.output_ids:
            yield Mismatch(f"{where}, {answer.prompt!r}", "tokens", "none")
        yield from not_greedy(f"{where}, {answer.prompt!r}", answer)
        yield from wrong_logprobs(f"{where}, {answer.prompt!r}", answer)


# --- the negative control ----------------------------------------------------------------------


class NothingReleased(Observation):
    source: str
    before: int
    after: int
    """When it had come to rest, some seconds after the release."""
    before_answer: Tokens
    after_answer: Tokens
    """While everything is released, as the server said."""
    tolerance: float


@register
class NothingWithoutSaver(Check[NothingReleased]):
    id = "memory/release-without-saver"
    sentence = (
        "Without --enable-memory-saver a release frees nothing, whatever it answers, and the "
        "server goes on as before."
    )
    observation = NothingReleased
    needs = (STARTED_HERE, WITHOUT_SAVER, RELEASE, RESUME)
    changes = True

    def observe(self, context: Context) -> NothingReleased:
        client, read = context.server.client, reader_of(context)
        before_answer = Tokens.asked(client, PROMPTS[0], 8)
        client.flush_cache()
        before = settle(read, timeout=3.0).used
        with resumed_afterwards(context.server) as still:
            release(context.server, still, ALL_TAGS)
            # Whatever would be freed gets the time for it.
            after = settle(read, flat_for=1.0, timeout=3.0).used
            after_answer = Tokens.asked(client, PROMPTS[0], 8)
        return NothingReleased(
            source=context.server.memory.source_names[0],
            before=before,
            after=after,
            before_answer=before_answer,
            after_answer=after_answer,
            tolerance=oracles.tolerance(context.dtype),
        )

    def judge(self, seen: NothingReleased) -> list[Mismatch]:
        wrong = []
        freed = seen.before - seen.after
        if freed > BY_CHANCE:
            wrong.append(
                Mismatch(
                    f"{seen.source} memory after a release",
                    f"as before, {seen.before / MIB:.0f} MiB",
                    f"{seen.after / MIB:.0f} MiB",
                    f"{freed / MIB:.0f} MiB were freed: the other checks of releases hold here",
                )
            )
        if not seen.before_answer.ids:
            wrong.append(Mismatch("answer before", "tokens", "none"))
        wrong += unequal("answer after it", seen.before_answer, seen.after_answer, seen.tolerance)
        return wrong
