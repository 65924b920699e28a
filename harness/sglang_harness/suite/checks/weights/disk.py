"""Do new weights arrive by an update from disk? The server's word is not evidence: checksums and
log-probabilities are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness import oracle as oracles
from sglang_harness.checkpoint import footprint
from sglang_harness.checkpoint.footprint import Size
from sglang_harness.checkpoint.made.perturb import perturbed, strength_for
from sglang_harness.checkpoint.writing import disk_may_be_full
from sglang_harness.client import Update
from sglang_harness.errors import EngineError, PeerFailed, Refused
from sglang_harness.oracle import Oracle
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    NotProvided,
    Observation,
    expect,
    register,
)
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.scored import (
    APART,
    Scored,
    Tokens,
    largest_error,
    not_greedy,
    unequal,
    wrong_logprobs,
)
from sglang_harness.suite.needs import (
    CHECKSUMS,
    LOADS_FROM_DISK,
    PREFIX_CACHE,
)
from sglang_harness.verdict import Figure
from sglang_harness.weights import PushFailed, PushReport

if TYPE_CHECKING:
    from sglang_harness.server import Server

NEW_VERSION = "harness-new"


#: Seconds after its answer in which a request may still count as running (some milliseconds in
#: SGLang 0.5.23).
COUNTED_FOR = 0.5


@dataclass(frozen=True)
class Variant:
    """A second checkpoint, of the same shape as the served one."""

    folder: Path
    inside: str
    """Its path as the server sees it."""
    bytes: int
    oracle: Oracle


def variant(context: Context) -> Variant:
    """The perturbed checkpoint of this run, made once.

    It is written to the scratch folder. A server that reads a folder on the same file system gets
    links to it, so that it takes its disk once.

    Raises:
        MissingExtra: torch is missing.
        NotProvided: the model is not on this machine.
        NotEnoughRoom: the disk or the memory does not suffice for it or for its reference model.
            Nothing of it stays.
    """
    if context.seed not in context.variants:
        server = context.server
        if server.model is None:
            raise NotProvided(
                f"{server.spec.model} is not on this machine: no second checkpoint can be made.",
                advice="Give the model as a folder.",
            )
        # First: a model whose reference does not fit here is not written either.
        _ = context.oracle
        target = context.scratch / "variant"
        footprint.require(
            f"The second checkpoint of {server.model}",
            footprint.variant(Size.of_folder(server.model)),
            target,
            less="take a smaller model, or select checks without it by -k",
        )
        strength = strength_for(context.dtype)
        made = _made(server, server.model, target, context.seed, strength)
        context.variants[context.seed] = made
    found = context.variants[context.seed]
    assert isinstance(found, Variant)
    return found


def _made(server: Server, model: Path, target: Path, seed: int, strength: float) -> Variant:
    folder = perturbed(model, target, seed, strength=strength)
    try:
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        with disk_may_be_full(target):
            inside = server.reach.share(folder)
        try:
            return Variant(folder, str(inside), size, oracles.for_folder(folder))
        except BaseException:
            server.reach.unshare(inside)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def update_from_disk(
    context: Context, inside: str, version: str, *, flush: bool = True, cached: bool = False
) -> Update:
    """One update from disk under a label, bounded by the check's limit.

    Args:
        flush: whether the update is told to empty the prefix cache.
        cached: the cache is left full until then: what it holds has to go by the update itself.
    """
    if cached:
        context.server.running.watch.wait(COUNTED_FOR)
    elif flush:
        # An update that meets a request still counted as running changes the weights and
        # answers 400 (0.5.23): wait for the count to be right first.
        context.server.client.flush_cache()
    return context.server.client.update_weights_from_disk(
        inside,
        weight_version=version,
        flush_cache=flush,
        timeout=context.server.spec.limits.check,
    )


def try_update(context: Context, inside: str, version: str) -> Update:
    """:func:`update_from_disk` of weights that the server should take: a refusal is what the check
    is there to see."""
    try:
        return update_from_disk(context, inside, version)
    except Refused as error:
        return Update(success=False, message=f"{error.status} {error.reason}", seconds=0.0)


@contextmanager
def first_weights_afterwards(context: Context) -> Iterator[str]:
    """Yields the path of the served checkpoint, and restores it and its label in the end, whatever
    happened and whether the check's time is over or not."""
    client = context.server.client
    info = client.model_info()
    path, version = str(info["model_path"]), str(info["weight_version"])
    try:
        yield path
    finally:
        with client.cleanup():
            try:
                client.flush_cache()
            except Refused:
                # Requests that an error left behind: their answers are of no use any more.
                client.abort_all()
                client.flush_cache()
            client.update_weights_from_disk(
                path,
                weight_version=version,
                flush_cache=True,
                timeout=context.server.spec.limits.start,
            )


def pushed(server: Server, checkpoint: Path, **options: Any) -> PushReport:
    """The report of a push, by default by the route ``tensor`` and without the reference model. A
    push that failed has a report too; where the server died of it, ``ServerDied`` is raised, and
    where nothing was sent because of an engine or a peer, their error: it says nothing of the
    server."""
    usual = {"route": "tensor", "version": NEW_VERSION, "logprobs": False}
    try:
        return server.weights.push(checkpoint, **{**usual, **options})
    except PushFailed as error:
        server.raise_if_dead()
        cause, sent = error.__cause__, {bucket.outcome for bucket in error.report.buckets}
        if isinstance(cause, EngineError | PeerFailed) and sent <= {"not sent"}:
            raise cause from None
        return error.report


class NewWeights(Observation):
    success: bool
    message: str
    seconds: float
    bytes: int
    asked_version: str
    info_version: str
    answer_version: str
    parameters: list[str]
    """Names of all parameters of every rank, fused as the server holds them."""
    unchanged: list[str]
    answers: list[Scored]
    """Scored by the oracle of the new weights."""
    old_oracle_error: float
    """How far the same served log-probabilities are from the old weights' oracle, in nats."""


@register
class DiskUpdateIsServed(Check[NewWeights]):
    id = "weights/disk"
    sentence = (
        "After an update from disk every parameter has changed, the new reference model agrees "
        "with what is generated, the old one does not, and the label is the new one."
    )
    observation = NewWeights
    needs = (*LOADS_FROM_DISK, CHECKSUMS)
    changes = True

    def observe(self, context: Context) -> NewWeights:
        client, new = context.server.client, variant(context)
        before = client.checksums()
        with first_weights_afterwards(context):
            update = try_update(context, new.inside, NEW_VERSION)
            after = client.checksums()
            changed = set(after.changed_since(before))
            answers, versions, off = [], [], 0.0
            for prompt in PROMPTS[:2]:
                answer = client.generate(prompt, sampling=greedy(12), logprobs=True)
                ids = new.oracle.encode(prompt)
                answers.append(Scored.of(prompt, ids, answer, new.oracle, context.dtype))
                old = Scored.of(prompt, ids, answer, context.oracle, context.dtype)
                off = max(off, largest_error([old]))
                versions.append(str(answer.weight_version))
            return NewWeights(
                success=update.success,
                message=update.message,
                seconds=update.seconds,
                bytes=new.bytes,
                asked_version=NEW_VERSION,
                info_version=str(client.model_info().get("weight_version")),
                answer_version=versions[-1],
                parameters=after.names(),
                unchanged=[n for n in after.names() if n not in changed],
                answers=answers,
                old_oracle_error=off,
            )

    def judge(self, seen: NewWeights) -> list[Mismatch]:
        wrong = []
        if not seen.success:
            wrong.append(Mismatch("update", "success", seen.message or "none"))
        # Buffers (rotary tables) are computed, not loaded: they rightly stay.
        stale = [n for n in seen.unchanged if not n.endswith(("cos_sin_cache", "inv_freq"))]
        if stale or not seen.parameters:
            wrong.append(
                Mismatch(
                    "checksums",
                    f"all of {len(seen.parameters)} parameters changed",
                    f"unchanged: {', '.join(stale[:5]) or 'no parameter is known'}",
                )
            )
        for answer in seen.answers:
            where = f"new weights, {answer.prompt!r}"
            wrong += not_greedy(where, answer)
            wrong += wrong_logprobs(where, answer)
        bound = APART * seen.answers[0].tolerance
        if not seen.old_oracle_error > bound:
            wrong.append(
                Mismatch(
                    "distance to the old reference model",
                    f"more than {bound:g}, so that old and new can be told apart",
                    f"{seen.old_oracle_error:.6f}",
                )
            )
        wrong += expect("weight version in /model_info", seen.asked_version, seen.info_version)
        wrong += expect("weight version in answers", seen.asked_version, seen.answer_version)
        return wrong

    def figures(self, seen: NewWeights) -> list[Figure]:
        rate = seen.bytes / max(seen.seconds, 1e-9) / 1e9
        return [
            Figure.of("push from disk", "s", "lower", seen.seconds),
            Figure.of("push from disk, rate", "GB/s", "higher", rate),
        ]


class RestoredWeights(Observation):
    changed_by_update: int
    differing_checksums: list[str]
    before: list[Tokens]
    after: list[Tokens]
    info_before: dict[str, str]
    info_after: dict[str, str]
    tolerance: float


@register
class DiskUpdateRestores(Check[RestoredWeights]):
    id = "weights/disk-restore"
    sentence = (
        "Updating to new weights and back restores every checksum exactly, every answer, and "
        "the name that is served."
    )
    observation = RestoredWeights
    needs = (*LOADS_FROM_DISK, CHECKSUMS)
    changes = True

    def observe(self, context: Context) -> RestoredWeights:
        client, new = context.server.client, variant(context)

        def ask() -> list[Tokens]:
            return [Tokens.asked(client, prompt, 8) for prompt in PROMPTS[:2]]

        def info() -> dict[str, str]:
            told = client.model_info()
            names = ("model_path", "served_model_name", "weight_version")
            return {name: str(told.get(name)) for name in names}

        info_before, sums_before, before = info(), client.checksums(), ask()
        with first_weights_afterwards(context):
            update_from_disk(context, new.inside, NEW_VERSION)
            changed = client.checksums().changed_since(sums_before)
        return RestoredWeights(
            changed_by_update=len(changed),
            differing_checksums=client.checksums().changed_since(sums_before),
            before=before,
            after=ask(),
            info_before=info_before,
            info_after=info(),
            tolerance=oracles.tolerance(context.dtype),
        )

    def judge(self, seen: RestoredWeights) -> list[Mismatch]:
        wrong = list(expect("checksums after going back", [], seen.differing_checksums))
        if not seen.changed_by_update:
            wrong.append(Mismatch("checksums after the update", "changed ones", "none"))
        for number, (before, after) in enumerate(zip(seen.before, seen.after, strict=True)):
            wrong += unequal(f"answer {number}", before, after, seen.tolerance)
        for name, value in seen.info_before.items():
            wrong += expect(name, value, seen.info_after.get(name))
        return wrong


class PrefixCache(Observation):
    warmed_cached_tokens: int
    """Of the second of two equal prompts, before any update: shows that the cache works."""
    flushed: Scored
    """Right after an update that flushes: nothing of it may come from the old weights."""
    unflushed: Scored
    """The negative control: the same after an update told not to flush."""


@register
class NoStalePrefix(Check[PrefixCache]):
    id = "weights/stale-prefix"
    sentence = (
        "A prefix that was cached before an update is not served after it; one that is (the "
        "control, told not to flush) is detected."
    )
    observation = PrefixCache
    needs = (*LOADS_FROM_DISK, PREFIX_CACHE)
    changes = True

    def observe(self, context: Context) -> PrefixCache:
        client, new = context.server.client, variant(context)
        prompt = " ".join(PROMPTS)
        ids = new.oracle.encode(prompt)
        # Only whole pages of the cache are ever shared between requests.
        page = int(client.server_info().get("page_size") or 1)
        ids *= -(-2 * page // len(ids))

        def ask() -> Scored:
            answer = client.generate(ids, sampling=greedy(6), logprobs=True)
            return Scored.of(prompt, ids, answer, new.oracle, context.dtype)

        with first_weights_afterwards(context) as old_path:
            ask()
            warmed = ask().cached_tokens
            update_from_disk(context, new.inside, NEW_VERSION, cached=True)
            flushed = ask()
            update_from_disk(context, old_path, "harness-old")
            ask()
            update_from_disk(context, new.inside, NEW_VERSION, flush=False, cached=True)
            unflushed = ask()
        return PrefixCache(warmed_cached_tokens=warmed, flushed=flushed, unflushed=unflushed)

    def judge(self, seen: PrefixCache) -> list[Mismatch]:
        wrong = []
        if seen.warmed_cached_tokens == 0:
            wrong.append(Mismatch("the same prompt again", "cached tokens", "none"))
        wrong += expect("cached tokens after the update", 0, seen.flushed.cached_tokens)
        wrong += not_greedy("after the update", seen.flushed)
        wrong += wrong_logprobs("after the update", seen.flushed)
        if seen.unflushed.cached_tokens and not list(wrong_logprobs("control", seen.unflushed)):
            wrong.append(
                Mismatch(
                    "the control, answered from a stale prefix",
                    "log-probabilities other than the new weights'",
                    "the new weights' own, so a stale prefix could not be detected here",
                )
            )
        return wrong
