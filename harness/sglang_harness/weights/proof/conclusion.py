"""What a push comes to: from everything that was gathered to the report. Sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_harness.client import Checksums
from sglang_harness.errors import HarnessError
from sglang_harness.weights.bracket import Session
from sglang_harness.weights.proof.checksums import ExpectedChecksums, ServedLayout
from sglang_harness.weights.proof.witnesses import (
    judge_checksums,
    judge_label,
    judge_logprobs,
    known_states,
)
from sglang_harness.weights.report import (
    BucketSent,
    Outcome,
    PushReport,
    Token,
    Witness,
    conclude,
)
from sglang_harness.weights.routes.base import Job, Route


@dataclass
class Gathered:
    """What is gathered while a push goes on.

    Attributes:
        opened: the route was opened: before that, nothing can have happened to the server.
        entered: the bracket was entered: what failed before has changed no weights.
        seconds: from the first call of the bracket to the last.
    """

    route: Route
    job: Job
    served: ServedLayout
    strict: bool
    session: Session
    started: float
    buckets: list[BucketSent] = field(default_factory=list)
    before: Checksums | None = None
    after: Checksums | None = None
    why_no_checksums: str = ""
    why_no_logprobs: str = ""
    expected: ExpectedChecksums | None = None
    tokens: list[Token] = field(default_factory=list)
    stated: dict[str, str | None] = field(default_factory=dict)
    error: HarnessError | None = None
    opened: bool = False
    entered: bool = False
    seconds: float = 0.0
    peer_peak_bytes: int | None = None

    @property
    def sent_nothing(self) -> bool:
        sent = any(bucket.outcome != "not sent" for bucket in self.buckets)
        return not sent and not (self.strict and self.entered)


@dataclass(frozen=True)
class Findings:
    """What the witnesses say, and what that makes of the push."""

    checksums: Witness
    logprobs: Witness
    label: Witness
    outcome: Outcome
    reason: str


def find(push: Gathered, known_here: Callable[[], set[str] | None]) -> Findings:
    """Judges what was gathered; see :func:`judge_checksums` for ``known_here``."""
    if push.error is not None:
        how = "the push did not complete"
        return Findings(
            Witness.silent("checksums", how),
            Witness.silent("log-probabilities", how),
            Witness.silent("weight version", how),
            "failed",
            _where(push, push.error),
        )
    checksums = judge_checksums(
        push.before,
        push.after,
        push.expected,
        why_none=push.why_no_checksums or push.served.unknown or "",
        pushed=push.job.source.tensors,
        known_here=known_here,
    )
    if push.why_no_logprobs:
        logprobs = Witness.silent("log-probabilities", push.why_no_logprobs)
    else:
        logprobs = judge_logprobs(push.tokens, push.served.dtype, same_weights=_same(push))
    label = judge_label(push.job.version, push.stated)
    outcome, reason = conclude((w.name, w) for w in (checksums, logprobs))
    return Findings(checksums, logprobs, label, outcome, reason)


def _where(push: Gathered, error: HarnessError) -> str:
    failed = [step.name for step in push.session.steps if step.outcome == "failed"]
    if failed:
        return f"{failed[0]}: {error.message}"
    return f"{'verifying' if push.entered else 'opening the route'}: {error.message}"


def _same(push: Gathered) -> bool:
    """Whether what was pushed is what was there before, by the checksums of every parameter."""
    if push.before is None or push.expected is None:
        return False
    return all(
        then.get(name) == wanted
        for then, rank in zip(push.before.ranks, push.expected.ranks, strict=False)
        for name, wanted in rank.items()
    )


def states(push: Gathered) -> tuple[set[str], set[str]]:
    """Which tensors are new and which are old; proven by checksums where there are any, else
    by which buckets the server took."""
    names = set(push.job.source.tensors)
    if push.sent_nothing:
        return set(), names
    if push.after is not None and push.expected is not None:
        how = push.served.layout(push.job.source)
        parts = {name: recipe.parts for name, recipe in how.recipes.items()}
        new, old = known_states(push.before, push.after, push.expected, parts)
        return new & names, old & names
    taken = {n for b in push.buckets if b.outcome == "done" for n in b.tensors}
    tried = {n for b in push.buckets if b.outcome != "not sent" for n in b.tensors}
    return taken, set() if push.strict else names - tried


def report(
    push: Gathered,
    findings: Findings,
    *,
    new: set[str],
    old: set[str],
    pause: str | None,
    flush: bool,
    put_back: str | None,
    unfit: str | None,
) -> PushReport:
    """Everything as data."""
    source, session = push.job.source, push.session
    done = {bucket.number for bucket in push.buckets}
    rest = [
        BucketSent(number=b.number, tensors=b.names, bytes=b.nbytes, outcome="not sent")
        for b in push.job.buckets
        if b.number not in done
    ]
    names = list(source.tensors)
    failed = findings.outcome == "failed"
    return PushReport(
        route=push.route.name,
        checkpoint=str(source.path),
        outcome=findings.outcome,
        reason=findings.reason,
        tensors=len(names),
        bytes=sum(info.nbytes for info in source.tensors.values()),
        ranks=push.job.ranks,
        version=push.job.version,
        pause=pause,
        flush=flush,
        strict=push.strict,
        session=any(s.name == "begin" and s.outcome == "done" for s in session.steps),
        seconds=push.seconds,
        seconds_staged=push.job.seconds_staged,
        buckets=[*push.buckets, *rest],
        steps=session.steps,
        checksums=findings.checksums,
        logprobs=findings.logprobs,
        label=findings.label,
        tokens=push.tokens,
        new=[n for n in names if n in new],
        old=[n for n in names if n in old],
        unknown=[n for n in names if n not in new | old] if failed else [],
        put_back=put_back,
        unfit=unfit,
        notes=push.job.notes,
        peer_peak_bytes=push.peer_peak_bytes,
    )
