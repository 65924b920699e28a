"""What is known of a push afterwards: plain data, so that it is evidence in a verdict. Weights
and adapters have the same witnesses, outcomes and layout of a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.errors import HarnessError


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


#: ``good``: both independent witnesses agree; ``failed``: one of them differs, or it did not go
#: through; ``unproven``: it went through, and one of them could say nothing.
Outcome = Literal["good", "failed", "unproven"]
AdapterRoute = Literal["disk", "tensor"]


class Step(_Record):
    """One call of the bracket around the buckets.

    Attributes:
        name: ``pause``, ``flush``, ``begin``, ``bucket 3``, ``end``, ``continue``, ...
        at: seconds since the push began.
        outcome: ``left out`` where the server has no such call or it was not asked for.
    """

    name: str
    at: float
    seconds: float
    outcome: Literal["done", "failed", "left out"]
    detail: str = ""


class BucketSent(_Record):
    """One bucket, with the time that it took on each side, in seconds.

    Attributes:
        bytes: of the tensors in it.
        read: from the checkpoint into the bucket.
        pack: converting it to what the route sends.
        hand_over: until the server (or the group) had all of it.
        server: from there to its answer.
        outcome: ``done`` is what the server answered; ``unknown``: no answer came.
        weight_version: the label that was sent with it. It labels and proves nothing.
    """

    number: int
    tensors: list[str]
    bytes: int
    read: float = 0.0
    pack: float = 0.0
    hand_over: float = 0.0
    server: float = 0.0
    outcome: Literal["done", "refused", "unknown", "not sent"]
    detail: str = ""
    weight_version: str | None = None


class Token(_Record):
    """One generated token: log-probabilities in nats, as served and by the
    reference models with the new and with the old weights."""

    prompt: int
    place: int
    id: int
    served: float
    new: float
    old: float | None


WitnessName = Literal["checksums", "log-probabilities", "weight version"]


class Witness(_Record):
    """What one independent measurement says of the push.

    Attributes:
        says: ``agrees``, ``differs``, or why it says nothing (``not available``).
        how: what was compared with what.
        wrong: each deviation, named.
    """

    name: WitnessName
    says: Literal["agrees", "differs", "not available"]
    how: str
    wrong: list[str] = Field(default_factory=list)

    @classmethod
    def silent(cls, name: WitnessName, why: str) -> Witness:
        """One that can say nothing."""
        return cls(name=name, says="not available", how=why)

    def lines(self, title: str) -> list[str]:
        """For a person: one line, and below it the first five deviations."""
        result = {"agrees": "match", "differs": "mismatch"}.get(self.says, self.says)
        return [f"  {title}: {result} ({self.how})", *(f"    {each}" for each in self.wrong[:5])]


def conclude(witnesses: Iterable[tuple[str, Witness]]) -> tuple[Outcome, str]:
    """What witnesses, each with its title, make of a push that went through, and why."""
    told = list(witnesses)
    if wrong := [(title, it.wrong) for title, it in told if it.says == "differs"]:
        return "failed", "; ".join(f"{title}: {_first(each)}" for title, each in wrong)
    if silent := [(title, it.how) for title, it in told if it.says != "agrees"]:
        return "unproven", "; ".join(f"{title}: {how}" for title, how in silent)
    return "good", ""


def _first(wrong: list[str]) -> str:
    return wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")


class PushReport(_Record):
    """One push.

    Attributes:
        outcome: by the witnesses ``checksums`` and ``logprobs``; the label proves nothing.
        bytes: of the tensors pushed.
        seconds: from the first call of the bracket to the last.
        seconds_staged: copying the checkpoint to where the server or the peer can read it.
        session: whether SGLang's weight-update session was open around the buckets.
        new, old, unknown: tensors by what is known of them when the push has failed.
        put_back: which weights the server serves after a failed push; ``None``: it is not known.
        unfit: why the server must not be used any more; ``None``: it may.
        peer_peak_bytes: the most that the peer held above what its imports hold, including its
            bucket; ``None`` where no peer was used, or it was ended.
    """

    route: str
    checkpoint: str
    outcome: Outcome
    reason: str
    tensors: int
    bytes: int
    ranks: int
    version: str
    pause: str | None
    flush: bool
    strict: bool
    session: bool
    seconds: float
    seconds_staged: float
    buckets: list[BucketSent]
    steps: list[Step]
    checksums: Witness
    logprobs: Witness
    label: Witness
    tokens: list[Token]
    new: list[str]
    old: list[str]
    unknown: list[str]
    put_back: str | None
    unfit: str | None
    notes: list[str]
    peer_peak_bytes: int | None = None

    @property
    def seconds_ours(self) -> float:
        """Reading, packing and handing over, all buckets."""
        return sum(b.read + b.pack + b.hand_over for b in self.buckets)

    @property
    def seconds_server(self) -> float:
        """Waiting for the server's answers, all buckets."""
        return sum(b.server for b in self.buckets)

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes pushed over the time of the whole bracket, in 1e9 bytes a second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0

    def __str__(self) -> str:
        lines = [
            f"push {self.outcome}: {self.tensors} tensors, {self.bytes / 1e6:.1f} MB via "
            f"'{self.route}' in {self.seconds:.2f} s ({self.gigabytes_per_second:.3f} GB/s; "
            f"harness {self.seconds_ours:.2f} s, server {self.seconds_server:.2f} s)",
            *([f"  {self.reason}"] if self.reason else []),
        ]
        for witness in (self.checksums, self.logprobs, self.label):
            lines += witness.lines(witness.name)
        if self.put_back:
            lines.append(f"  restored: {self.put_back}")
        if self.unfit:
            lines.append(f"  do not use this server any more: {self.unfit}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


class NotPrepared(HarnessError):
    """A push could not be prepared, as on a full disk. Nothing was sent to the server."""


class PushFailed(HarnessError):
    """New weights did not arrive, or not as they should have.

    Attributes:
        report: everything that is known of the push.
    """

    def __init__(self, report: PushReport) -> None:
        state = f" {_sentence(report.put_back)}" if report.put_back else ""
        unfit = f" Do not use this server any more: {report.unfit}." if report.unfit else ""
        super().__init__(
            f"Pushing {report.checkpoint} via '{report.route}' failed: "
            f"{report.reason.rstrip('.')}.{state}{unfit}",
            advice="Start a new server." if report.unfit else "",
        )
        self.report = report


class AdapterReport(_Record):
    """One adapter, pushed.

    Attributes:
        bytes: of the adapter's tensors.
        seconds: until the server answered that it has loaded it; ``seconds_ours`` of these for
            reading, packing and sharing.
        replaced: another adapter had this name, and was unloaded first.
        loaded: the adapters that the server says it holds.
        applied: answers that ask for the adapter, compared with PEFT's; those of the base model as
            control.
        base: answers that ask for none, compared with the base model's; those of the adapter as
            control.
        left: what the server holds after a failure.
    """

    adapter: str
    name: str
    route: AdapterRoute
    outcome: Outcome
    reason: str
    tensors: int
    bytes: int
    seconds: float
    seconds_ours: float
    replaced: bool
    loaded: list[str]
    applied: Witness
    base: Witness
    tokens: list[Token] = Field(default_factory=list)
    left: str = ""

    @staticmethod
    def titled(applied: Witness, base: Witness) -> tuple[tuple[str, Witness], ...]:
        """Both witnesses, as reports and errors call them."""
        return (("with the adapter", applied), ("without it", base))

    def __str__(self) -> str:
        lines = [
            f"adapter {self.outcome}: {self.name!r}, {self.tensors} tensors, "
            f"{self.bytes / 1e6:.2f} MB via '{self.route}' in {self.seconds:.2f} s (harness "
            f"{self.seconds_ours:.2f} s){', replacing another' if self.replaced else ''}",
            *([f"  {self.reason}"] if self.reason else []),
        ]
        for title, witness in self.titled(self.applied, self.base):
            lines += witness.lines(title)
        return "\n".join([*lines, *([f"  {self.left}"] if self.left else [])])


class AdapterFailed(HarnessError):
    """An adapter was not loaded, or answers do not come from it.

    Attributes:
        report: everything that is known of the push.
    """

    def __init__(self, report: AdapterReport) -> None:
        left = f" {_sentence(report.left)}" if report.left else ""
        super().__init__(
            f"Loading adapter {report.adapter} via '{report.route}' failed: "
            f"{report.reason.rstrip('.')}.{left}"
        )
        self.report = report


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
