"""Is memory given back to the trainer, and taken again, as often as one likes? On a GPU by NVML;
what needs no GPU is asked on host memory too, and each figure says where it was read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from sglang_harness import oracle as oracles
from sglang_harness.errors import HarnessError
from sglang_harness.memory.explained import ROUNDED_BY, said
from sglang_harness.memory.leak import Slope, slope
from sglang_harness.memory.steady import Settled, settle
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    Need,
    NotProvided,
    Observation,
    expect,
    register,
)
from sglang_harness.suite.generate import PROMPTS, greedy
from sglang_harness.suite.needs import CHECKSUMS, GPU, STARTED_HERE, launched_with, route
from sglang_harness.suite.scored import Scored, Tokens, not_greedy, unequal, wrong_logprobs
from sglang_harness.suite.weights import (
    NEW_VERSION,
    PUSHED,
    first_weights_afterwards,
    update_from_disk,
    variant,
)
from sglang_harness.verdict import Figure

if TYPE_CHECKING:
    from sglang_harness.server import Server

MIB = 1 << 20

#: As trainers name them, and as every SGLang that has tags knows them.
ALL_TAGS = ("kv_cache", "weights", "cuda_graph")
#: Seconds for memory to be free after a release has answered, or to be back after a resume.
FREE_WITHIN = 20.0
#: What is no release: less than this may be freed by chance.
BY_CHANCE = 64 * MIB
#: Cycles of release, resume and push, and those before them that may settle buffers.
CYCLES, WARM_UP = 20, 2
#: Fewer give no slope that can be trusted (``memory/leak.py``).
FEWEST_CYCLES = 12

RELEASE = route("POST", "/release_memory_occupation")
RESUME = route("POST", "/resume_memory_occupation")
SAVER = launched_with("enable-memory-saver", "it releases nothing")


def _has_saver(server: Server) -> str | None:
    if server.client.server_info().get("enable_memory_saver"):
        return "the server was started with --enable-memory-saver: it is to release"
    return None


def _says_nothing(server: Server) -> str | None:
    if said(server.client.server_info()).weights is None:
        return "this SGLang does not say how much memory it holds"
    return None


WITHOUT_SAVER = Need("no --enable-memory-saver", _has_saver)
SAYS_ITS_MEMORY = Need("memory figures in /server_info", _says_nothing)


def tolerance(bytes_said: int) -> int:
    """How far a device may be from what the server said: rounding, pages and what a driver keeps
    of a mapping. Not measured on a GPU."""
    return 32 * MIB + ROUNDED_BY + bytes_said // 50


def _devices(context: Context) -> list[str]:
    """GPUs that the server has loaded something to; none where it has no GPU."""
    main = context.server.memory.source_names[0]
    if main != "nvml":
        return []
    marks = {r.mark: r.parts for r in context.server.memory.readings if r.source == main}
    before, ready = marks.get("before start", {}), marks.get("ready", {})
    return sorted(u for u in ready if ready[u] - before.get(u, 0) > BY_CHANCE)


def _read(context: Context) -> Callable[[], tuple[int, dict[str, int]]]:
    return context.server.memory.source(context.server.memory.source_names[0]).read


def _fallen(
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


def _back(
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


@contextmanager
def _resumed_afterwards(server: Server) -> Iterator[list[str]]:
    """The tags in the list are released; what is left there by an error is taken again, so that
    the next check finds a server that generates."""
    released: list[str] = []
    try:
        yield released
    finally:
        if released:
            with suppress(HarnessError):
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
        now = _read(context)()[1]
        return Holdings(
            used={u: now[u] - before.get(u, 0) for u in _devices(context)},
            weights=what.weights,
            kv_cache=what.kv_cache,
            graphs=what.graphs,
        )

    def judge(self, seen: Holdings) -> list[Mismatch]:
        known = sum(part or 0 for part in (seen.weights, seen.kv_cache, seen.graphs))
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
        known = sum(part or 0 for part in (seen.weights, seen.kv_cache, seen.graphs))
        unexplained = max((used - known) / MIB for used in seen.used.values())
        return [Figure.of("GPU memory that nobody explains", "MiB", "lower", max(0.0, unexplained))]


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
    needs = (GPU, SAVER, STARTED_HERE, SAYS_ITS_MEMORY, *PUSHED, CHECKSUMS, RELEASE, RESUME)
    changes = True

    def observe(self, context: Context) -> ReleasedByTag:
        client, devices = context.server.client, _devices(context)
        sums = client.checksums()
        with first_weights_afterwards(context) as path:
            releases = [
                self._once(context, tags, devices, path)
                for tags in (("kv_cache",), ("weights",), ("kv_cache", "weights"))
            ]
            differing = client.checksums().changed_since(sums)
            answers = _scored(context, context.oracle)
        return ReleasedByTag(
            devices=devices, releases=releases, differing_checksums=differing, answers=answers
        )

    @staticmethod
    def _once(
        context: Context, tags: tuple[str, ...], devices: Sequence[str], path: str
    ) -> Released:
        client, read = context.server.client, _read(context)
        holds = said(client.server_info()).of(tags) or 0
        client.flush_cache()
        before = settle(read).parts
        with _resumed_afterwards(context.server) as still:
            client.release_memory(tags)
            still += tags
            released = _until_free(read, devices, before, holds)
            client.resume_memory(tags)
            still.clear()
        resumed = _until_back(read, devices, before, holds)
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
            wrong += _fallen(
                f"release of {tags}", seen.devices, each.before, each.released, each.said
            )
            wrong += _back(f"resume of {tags}", seen.devices, each.before, each.resumed, each.said)
        wrong += expect("checksums with the weights pushed again", [], seen.differing_checksums)
        wrong += _wrong_answers("afterwards", seen.answers)
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


def _until_free(
    read: Callable[[], tuple[int, dict[str, int]]],
    devices: Sequence[str],
    before: dict[str, int],
    by: int,
) -> Settled:
    return settle(
        read,
        reached=lambda now: not list(_fallen("", devices, before, now, by)),
        timeout=FREE_WITHIN,
        since=time.monotonic(),
    )


def _until_back(
    read: Callable[[], tuple[int, dict[str, int]]],
    devices: Sequence[str],
    before: dict[str, int],
    by: int,
) -> Settled:
    return settle(
        read,
        reached=lambda now: not list(_back("", devices, before, now, by)),
        timeout=FREE_WITHIN,
        since=time.monotonic(),
    )


def _scored(context: Context, oracle: oracles.Oracle) -> list[Scored]:
    answers = []
    for prompt in PROMPTS[:2]:
        context.server.client.flush_cache()
        answer = context.server.client.generate(prompt, sampling=greedy(8), logprobs=True)
        answers.append(Scored.of(prompt, oracle.encode(prompt), answer, oracle, context.dtype))
    return answers


def _wrong_answers(where: str, answers: Sequence[Scored]) -> Iterator[Mismatch]:
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
        client, read = context.server.client, _read(context)

        def ask() -> Tokens:
            client.flush_cache()
            return Tokens.of(client.generate(PROMPTS[0], sampling=greedy(8), logprobs=True))

        before_answer = ask()
        client.flush_cache()
        before = settle(read, timeout=3.0).used
        with _resumed_afterwards(context.server) as still:
            client.release_memory(ALL_TAGS)
            still += ALL_TAGS
            # Whatever would be freed gets the time for it.
            after = settle(read, flat_for=1.0, timeout=3.0).used
            after_answer = ask()
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


# --- the order of trainers ---------------------------------------------------------------------


class Colocated(Observation):
    source: str
    saver: bool
    """Started with --enable-memory-saver: the figures of the device have to follow."""
    devices: list[str]
    weights: int
    kv_cache: int
    steps: dict[str, dict[str, int]]
    """Bytes in use by part: ``before``, ``released``, ``weights resumed``, ``pushed``,
    ``all resumed``."""
    success: bool
    message: str
    unchanged: list[str]
    """Parameters that the push has left as they were."""
    version: str
    cached_tokens: int
    answers: list[Scored]
    """Scored by the oracle of the new weights."""


@register
class ColocatedOrder(Check[Colocated]):
    id = "memory/colocated-order"
    sentence = (
        "In the order of trainers on the server's own GPUs (flush, release all, resume weights, "
        "push, flush with the KV cache still released, resume the rest) memory follows each "
        "step, and the new weights are served."
    )
    observation = Colocated
    needs = (STARTED_HERE, *PUSHED, CHECKSUMS, RELEASE, RESUME)
    changes = True

    def observe(self, context: Context) -> Colocated:
        server, new = context.server, variant(context)
        client, read, devices = server.client, _read(context), _devices(context)
        info = client.server_info()
        saver, what = bool(info.get("enable_memory_saver")), said(info)
        weights, kv_cache = what.weights or 0, what.kv_cache or 0
        on_gpu = saver and server.device == "gpu"
        steps: dict[str, dict[str, int]] = {}
        sums = client.checksums()
        with first_weights_afterwards(context), _resumed_afterwards(server) as still:
            client.flush_cache()
            steps["before"] = read()[1]
            client.release_memory(ALL_TAGS)
            still += ALL_TAGS
            freed = weights + kv_cache if on_gpu else 0
            steps["released"] = _until_free(read, devices, steps["before"], freed).parts
            client.resume_memory(["weights"])
            still.remove("weights")
            steps["weights resumed"] = settle(read, timeout=5.0).parts
            update = update_from_disk(context, new.inside, NEW_VERSION)
            client.flush_cache()
            steps["pushed"] = settle(read, timeout=5.0).parts
            client.resume_memory(list(still))
            still.clear()
            steps["all resumed"] = _until_back(
                read, devices if on_gpu else [], steps["before"], weights + kv_cache
            ).parts
            changed = set(client.checksums().changed_since(sums))
            first = client.generate(PROMPTS[0], sampling=greedy(1))
            return Colocated(
                source=server.memory.source_names[0],
                saver=on_gpu,
                devices=devices,
                weights=weights,
                kv_cache=kv_cache,
                steps=steps,
                success=update.success,
                message=update.message,
                unchanged=[n for n in sorted(sums.ranks[0]) if n not in changed],
                version=str(first.weight_version),
                cached_tokens=first.cached_tokens,
                answers=_scored(context, new.oracle),
            )

    def judge(self, seen: Colocated) -> list[Mismatch]:
        wrong = list(expect("success of the push", True, seen.success))
        # Buffers (rotary tables) are computed, not loaded: they rightly stay.
        stale = [n for n in seen.unchanged if not n.endswith(("cos_sin_cache", "inv_freq"))]
        wrong += expect("parameters that stayed as they were", [], stale)
        wrong += expect("weight version in answers", NEW_VERSION, seen.version)
        wrong += expect("cached tokens of the first answer", 0, seen.cached_tokens)
        wrong += _wrong_answers("with the new weights", seen.answers)
        order = ("before", "released", "weights resumed", "pushed", "all resumed")
        if missing := [step for step in order if step not in seen.steps]:
            return [*wrong, Mismatch("readings", ", ".join(order), f"none at {missing[0]!r}")]
        if not seen.saver:
            return wrong
        if not seen.devices:
            wrong.append(Mismatch("GPUs that the server is on", "some", "none"))
        before = seen.steps["before"]
        both = seen.weights + seen.kv_cache
        kept = {"released": both, "weights resumed": seen.kv_cache, "pushed": seen.kv_cache}
        for step, by in kept.items():
            wrong += _fallen(step, seen.devices, before, seen.steps[step], by)
        wrong += _back("all resumed", seen.devices, before, seen.steps["all resumed"], both)
        return wrong


# --- again and again ---------------------------------------------------------------------------


class Cycles(Observation):
    saver: bool
    used_bytes: dict[str, list[int]]
    """By source and, for GPUs, device: at the end of each cycle, the first ones left out."""
    seconds: list[float]
    """Of each cycle."""


@register
class CyclesDoNotGrow(Check[Cycles]):
    id = "memory/cycles"
    sentence = (
        "Release, resume and push, again and again, leave no more memory in use: the slope over "
        "the cycles is zero."
    )
    observation = Cycles
    profile = "full"
    needs = (STARTED_HERE, *PUSHED, RELEASE, RESUME)
    changes = True

    def observe(self, context: Context) -> Cycles:
        server, new = context.server, variant(context)
        client, ledger = server.client, server.memory
        sources = [ledger.source(name) for name in ledger.source_names]
        used: dict[str, list[int]] = {}
        seconds: list[float] = []
        until = time.monotonic() + 0.7 * server.spec.limits.check
        with first_weights_afterwards(context) as old, _resumed_afterwards(server) as still:
            for number in range(WARM_UP + CYCLES):
                began = time.monotonic()
                client.flush_cache()
                client.release_memory(ALL_TAGS)
                still += ALL_TAGS
                client.resume_memory(["weights"])
                still.remove("weights")
                update_from_disk(context, old if number % 2 else new.inside, f"cycle-{number}")
                client.resume_memory(list(still))
                still.clear()
                client.generate(PROMPTS[0], sampling=greedy(1))
                client.flush_cache()
                if number >= WARM_UP:
                    for source in sources:
                        whole, parts = settle(source.read, timeout=2.0, flat_for=0.2).used, {}
                        if source.name == "nvml":
                            parts = source.read()[1]
                        named = {f"GPU {u}": v for u, v in parts.items()} or {source.name: whole}
                        for name, value in named.items():
                            used.setdefault(name, []).append(value)
                seconds.append(time.monotonic() - began)
                if time.monotonic() > until:
                    break
        if len(seconds) < WARM_UP + FEWEST_CYCLES:
            raise NotProvided(
                f"Only {len(seconds)} cycles fit into {until - began:.0f} s, and a slope takes "
                f"{WARM_UP + FEWEST_CYCLES}.",
                advice="Raise --check-timeout.",
            )
        return Cycles(
            saver=bool(client.server_info().get("enable_memory_saver")),
            used_bytes=used,
            seconds=seconds,
        )

    def judge(self, seen: Cycles) -> list[Mismatch]:
        wrong = [] if seen.used_bytes else [Mismatch("sources of memory", "some", "none")]
        for source, values in seen.used_bytes.items():
            if len(values) < FEWEST_CYCLES:
                wrong.append(Mismatch(source, f"{FEWEST_CYCLES} readings", str(len(values))))
            elif (found := slope(values)).leaks:
                wrong.append(
                    Mismatch(f"{source} memory over cycles", "a slope of zero", str(found))
                )
        return wrong

    def figures(self, seen: Cycles) -> list[Figure]:
        found: list[tuple[str, Slope]] = [
            (source, slope(values))
            for source, values in seen.used_bytes.items()
            if len(values) >= FEWEST_CYCLES
        ]
        slopes = [
            Figure.of(f"memory a cycle ({source})", "MB", "lower", max(0.0, each.mb))
            for source, each in found
        ]
        if not seen.seconds:
            return slopes
        return [*slopes, Figure.of("release, resume and push", "s", "lower", *seen.seconds)]
