"""What is known of a push afterwards: plain data, so that it is evidence in a verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.errors import HarnessError


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(_Record):
    """One call of the bracket around the buckets.

    Attributes:
        name: ``pause``, ``flush``, ``begin``, ``bucket 3``, ``end``, ``continue``, ...
        at: seconds since the push began.
        outcome: ``left out`` where the server has no such call or nobody asked for it.
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
        pack: making of it what the route sends.
        hand_over: until the server (or the group) had all of it.
        server: from there to its answer.
        outcome: ``done`` is the server's word; ``unknown``: no answer came.
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
    """One generated token: log-probabilities in nats, as served and by both oracles."""

    prompt: int
    place: int
    id: int
    served: float
    new: float
    old: float | None


WitnessName = Literal["checksums", "log-probabilities", "weight version"]


class Witness(_Record):
    """What one independent sign says of the push.

    Attributes:
        says: ``agrees``, ``differs``, or why it says nothing (``not available``).
        how: what was held against what.
        wrong: each thing that is not as it has to be, named.
    """

    name: WitnessName
    says: Literal["agrees", "differs", "not available"]
    how: str
    wrong: list[str] = Field(default_factory=list)

    @classmethod
    def silent(cls, name: WitnessName, why: str) -> Witness:
        """One that can say nothing."""
        return cls(name=name, says="not available", how=why)


class PushReport(_Record):
    """One push.

    Attributes:
        outcome: ``good`` when checksums and log-probabilities both agree; ``failed`` when
            either differs or the push did not go through; ``unproven`` when it went through
            and one of the two could say nothing.
        bytes: of the tensors pushed.
        seconds: from the first call of the bracket to the last.
        seconds_staged: copying the checkpoint to where the server or the peer can read it.
        session: whether the server has SGLang's session, and it was used.
        new, old, unknown: tensors by what is known of them when the push has failed.
        put_back: what the server serves after a failed push, where it was put back.
        unfit: why the server must not be used any more; ``None``: it may.
        peer_peak_bytes: the most that the peer held above what its imports hold, the bucket in
            it included; ``None`` where no peer was used, or it was ended.
    """

    route: str
    checkpoint: str
    outcome: Literal["good", "failed", "unproven"]
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
            f"push {self.outcome}: {self.tensors} tensors, {self.bytes / 1e6:.1f} MB by "
            f"'{self.route}' in {self.seconds:.2f} s ({self.gigabytes_per_second:.3f} GB/s; "
            f"ours {self.seconds_ours:.2f} s, the server's {self.seconds_server:.2f} s)",
            *([f"  {self.reason}"] if self.reason else []),
        ]
        for witness in (self.checksums, self.logprobs, self.label):
            lines.append(f"  {witness.name}: {witness.says} ({witness.how})")
            lines += [f"    {wrong}" for wrong in witness.wrong[:5]]
        if self.put_back:
            lines.append(f"  put back: {self.put_back}")
        if self.unfit:
            lines.append(f"  the server is unfit: {self.unfit}")
        return "\n".join(lines)

    def raise_unless_good(self) -> PushReport:
        """Itself.

        Raises:
            PushFailed: the push is not proven to be good.
        """
        if self.outcome != "good":
            raise PushFailed(self)
        return self


class PushFailed(HarnessError):
    """New weights did not arrive, or not as they should.

    Attributes:
        report: everything that is known of the push.
    """

    def __init__(self, report: PushReport) -> None:
        state = f" {report.put_back}." if report.put_back else ""
        unfit = f" The server is unfit: {report.unfit}." if report.unfit else ""
        super().__init__(
            f"The push of {report.checkpoint} by '{report.route}' is {report.outcome}: "
            f"{report.reason.rstrip('.')}.{state}{unfit}",
            advice="Start the server anew." if report.unfit else "",
        )
        self.report = report
