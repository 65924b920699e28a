"""What can go wrong, as types. Every message says what happened, what was expected and
what to do; a person sees the message alone, never a stack trace."""

from __future__ import annotations

from typing import Protocol


class Ending(Protocol):
    """How a server ended, or why that is not known. Both kinds are in
    :mod:`sglang_harness.runtime.death`."""

    def sentence(self) -> str:
        """What happened, in one line."""

    def advice(self) -> str:
        """What to do about it."""


class HowItDied(Ending, Protocol):
    """What is known of a server that ended although nobody asked it to."""

    @property
    def exit_code(self) -> int | None: ...

    @property
    def out_of_memory(self) -> bool:
        """The kernel killed it for memory."""

    @property
    def cause(self) -> str:
        """A known cause found in its log; may be empty."""

    @property
    def exception(self) -> str:
        """The last exception line of its log; may be empty."""

    @property
    def last_words(self) -> tuple[str, ...]:
        """The last lines of its log."""

    @property
    def noticed_after(self) -> float | None:
        """Seconds from its end to its being noticed here."""


class HarnessError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        advice: what the reader can do about it, one sentence; may be empty.
        log: the output of a server whose start failed and that is gone by now, without secrets;
            empty where none was started.
    """

    def __init__(self, message: str, *, advice: str = "", log: str = "") -> None:
        super().__init__(message)
        self.advice = advice
        self.log = log

    @property
    def message(self) -> str:
        """What happened, without the advice."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".strip()


class SpecError(HarnessError):
    """What was asked for makes no sense: a bad field, a bad file, a contradiction."""


class EngineError(HarnessError):
    """No Docker engine, or one that cannot do what is needed."""


class ImageError(HarnessError):
    """The image is not there, cannot be pulled or cannot be built."""


class AttachError(HarnessError):
    """What a URL points at is not an SGLang server that this run can attach to."""


class Unresponsive(AttachError):
    """What answers there is an SGLang server, and it does not generate: the server's fault, not
    that of the address."""


class ReadOnly(HarnessError):
    """A call would change a server that is only to be looked at. It was not sent."""

    def __init__(self, call: str) -> None:
        super().__init__(
            f"{call} was not sent: it modifies a server that this run did not start.",
            advice="Use --allow-changes to permit changes that are restored afterwards.",
        )


class ModelError(HarnessError):
    """The model is not there, or is not a checkpoint that can be served or read."""


class UnsafeCheckpoint(ModelError):
    """A pickle names something other than tensors. It was not run, and neither was the rest.

    Attributes:
        loads: what it tried to load, such as ``os.system``.
    """

    def __init__(self, message: str, loads: str, *, advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.loads = loads


class ShardedCheckpoint(ModelError):
    """The file holds what one rank had of a model; the advice says what to convert it to."""


class BrokenCheckpoint(ModelError):
    """Cut short, or not what its format says it has to be."""


class CheckpointMismatch(ModelError):
    """A checkpoint does not fit the model. Nothing was sent.

    Attributes:
        names: every tensor that does not fit.
    """

    def __init__(self, message: str, names: tuple[str, ...], *, advice: str = "") -> None:
        super().__init__(message, advice=advice)
        self.names = names


class NotEnoughRoom(ModelError):
    """The memory or the disk of this machine does not suffice for the model. Nothing was loaded,
    copied or written."""


class TelemetryError(HarnessError):
    """A GPU or its driver does not say what was asked. Never answered with a zero in its place.

    Attributes:
        code: NVML's own number of the error; ``None`` where there is none, as for a driver that
            did not answer in time.
    """

    def __init__(self, message: str, *, advice: str = "", code: int | None = None) -> None:
        super().__init__(message, advice=advice)
        self.code = code


class DeviceNotIdle(HarnessError):
    """A GPU holds memory that it should not hold: nothing is started on it."""


class MissingExtra(HarnessError):
    """A part of the package is needed that was not installed with it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed.",
            advice=f"Install them with: pip install 'sglang-harness[{extra}]'",
        )


class KitError(HarnessError):
    """A kit for a host without network cannot be built, or is not what it should be."""


class NotProvided(HarnessError):
    """The harness cannot provide what a check needs: the check is ``not-run``, and the run is
    not a pass."""


class ServerDied(HarnessError):
    """The server ended although nobody asked it to.

    Attributes:
        death: how it ended, as far as could be seen.
    """

    def __init__(self, death: HowItDied) -> None:
        super().__init__(death.sentence(), advice=death.advice())
        self.death = death


class ServerLost(EngineError):
    """Whether the server still runs, or how it ended, cannot be observed any more.

    Attributes:
        unknown: why.
    """

    def __init__(self, unknown: Ending) -> None:
        super().__init__(unknown.sentence(), advice=unknown.advice())
        self.unknown = unknown


class StartTimeout(HarnessError):
    """The server runs but did not generate a token, within ``limits.start`` seconds or at all."""


class DidNotComeUp(HarnessError):
    """A server that a check started for itself died at its start, or never answered."""


class RequestFailed(HarnessError):
    """A call got no usable answer. The common base of the four ways in which that happens.

    Attributes:
        call: method and path, such as ``POST /generate``.
    """

    def __init__(self, call: str, message: str, *, advice: str = "") -> None:
        super().__init__(f"{call}: {message}", advice=advice)
        self.call = call


class Unreachable(RequestFailed):
    """No connection, or one that broke before the answer was complete."""


class NoAnswerInTime(RequestFailed):
    """The server took the request and did not answer within the read time-out."""


class TimeIsOver(NoAnswerInTime):
    """The caller's own bound ended the wait (``client.within``), not that of the request: whether
    the server hangs or was only slow is not known from this."""


class Refused(RequestFailed):
    """The server answered with an error, in whichever of its three shapes.

    Attributes:
        status: the HTTP status code; 200 when a stream failed after it began.
        reason: the server's own words.
        kind: the server's own type of error, where it names one.
    """

    def __init__(self, call: str, status: int, reason: str, kind: str = "") -> None:
        super().__init__(call, f"the server answered {status}: {reason}")
        self.status = status
        self.reason = reason
        self.kind = kind


class BadAnswer(RequestFailed):
    """The server answered 200 with something that this call cannot mean."""


class PeerFailed(HarnessError):
    """What was put beside the server did not do its part of a push."""

    def __init__(self, reason: str, words: str = "") -> None:
        last = [line for line in words.splitlines() if line.strip()][-1:]
        said = f" It said: {last[0].strip()[:300]}" if last else ""
        super().__init__(f"The peer failed: {reason}.{said}")


class Interrupted(BaseException):
    """The run was ended from outside, by Ctrl-C or SIGTERM. Nothing that handles errors
    handles this.

    Attributes:
        signal_number: 2 (SIGINT) or 15 (SIGTERM); the exit code is 128 plus it.
        log: as of :class:`HarnessError`.
    """

    def __init__(self, signal_number: int) -> None:
        name = {2: "Ctrl-C (SIGINT)", 15: "SIGTERM"}.get(signal_number, f"signal {signal_number}")
        super().__init__(f"interrupted by {name}")
        self.signal_number = signal_number
        self.log = ""
