"""How a server ended, and how that is noticed at once."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from sglang_harness.errors import ServerDied, ServerLost

log = logging.getLogger(__name__)

#: Patterns in SGLang's log and what they mean, most specific first.
KNOWN_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"CUDA out of memory|torch\.OutOfMemoryError",
        "the GPU ran out of memory: lower --mem-fraction-static or use a larger GPU",
    ),
    (
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        "too little memory is left for the KV cache: raise --mem-fraction-static",
    ),
    (r"No space left on device", "a disk or /dev/shm is full: raise shm_size or free space"),
    (r"unrecognized arguments: (?P<detail>.*)", "this SGLang version does not know a flag"),
    (r"error: argument (?P<detail>.*)", "a flag has a value that SGLang does not take"),
    (
        r"NVIDIA driver|CUDA driver version is insufficient|no CUDA-capable device",
        "no usable NVIDIA driver: use device=cpu, or run on a host with a GPU",
    ),
    (
        r"Can't load the configuration of|does not appear to have a file named config\.json"
        r"|Unrecognized model in",
        "the model folder holds no model that SGLang can read",
    ),
    (
        r"Repository Not Found|is not a local folder and is not a valid model identifier",
        "the model is neither a folder nor a name on the hub",
    ),
    (
        r"SafetensorError|HeaderTooLarge|MetadataIncompleteBuffer|incomplete metadata",
        "a safetensors file is damaged or cut short",
    ),
    (
        r"No such file or directory(?:: ['\"]?(?P<detail>[^'\"\n]+))?",
        "a file is missing for the server's user (files of mode 0600 look missing to it)",
    ),
    (
        r"Address already in use|address already in use",
        "the server's port is taken inside its network namespace",
    ),
    (
        r"digest sent was rejected",
        "a tensor was sent by file descriptor from an unrelated process: share by file_system",
    ),
    (r"pin_memory=True requires a CUDA", "SGLang asked for pinned memory on a machine with no GPU"),
    (r"ModuleNotFoundError: (?P<detail>.*)", "the image lacks a Python module"),
)


@dataclass(frozen=True)
class Death:
    """How a server ended that was not asked to end.

    Exit codes alone mislead with SGLang: a crash of the scheduler ends the container with 0
    where the server is process 1, and with 137 under an init process, which looks like an
    out-of-memory kill (seen with 0.5.23). So the log and the out-of-memory flag decide.
    """

    exit_code: int | None
    out_of_memory: bool
    """The kernel killed it for memory (the engine's ``State.OOMKilled``)."""
    cause: str
    """A cause that is known from the log; empty when none was recognised."""
    exception: str
    """The last exception line of the log; empty when there is none."""
    last_words: tuple[str, ...]
    """The last lines of the log."""
    noticed_after: float | None = None
    """Seconds from the end (by the engine's clock) to its being noticed here."""

    def sentence(self) -> str:
        """One line: that it ended, how, and why as far as the log shows."""
        if self.out_of_memory:
            return "The server was killed by the kernel because it ran out of memory."
        code = "an unknown exit code" if self.exit_code is None else f"exit code {self.exit_code}"
        why = (self.cause or self.exception or "its log names no exception").rstrip(".")
        return f"The server ended ({code}): {why}."

    def advice(self) -> str:
        if self.out_of_memory:
            return "Raise the container's memory limit or use a smaller model."
        if not self.last_words:
            return "It wrote nothing to its log."
        return "Last output: " + " | ".join(self.last_words[-3:])


@dataclass(frozen=True)
class Unknown:
    """Whether a server still runs, or how it ended, cannot be observed: the engine does not
    answer, its container was removed from outside, the process that keeps it has gone. This says
    nothing about SGLang.

    Attributes:
        reason: what kept it from being observed, without a full stop.
    """

    reason: str

    def sentence(self) -> str:
        """One line, as :meth:`Death.sentence`."""
        return f"Whether the server still runs is not known: {self.reason.rstrip('.')}."

    def advice(self) -> str:
        return "This is not a failure of SGLang: check the machine and its engine, and run again."


#: A request that was answered: the server survived everything before it in the log. (The
#: request under which a server dies is logged too, as a 500.)
_ANSWERED = re.compile(r'HTTP/1\.\d" [1-4]\d\d')

#: What libraries print at any exit of a Python that crashed; not the server's own output.
_NOISE = re.compile(r"nanobind|^ - (leaked|\.\.\. skipped)|resource_tracker")


def read_death(exit_code: int | None, out_of_memory: bool, log: str) -> Death:
    """Finds the cause of death in a server's log. Pure: tested on recorded logs."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if not _NOISE.search(line)]
    answered = max((n for n, line in enumerate(lines) if _ANSWERED.search(line)), default=-1)
    end = lines[answered + 1 :]
    return Death(exit_code, out_of_memory, _cause(end), _exception(end), tuple(lines[-12:]))


def _cause(lines: list[str]) -> str:
    text = "\n".join(lines)
    for pattern, meaning in KNOWN_CAUSES:
        if found := re.search(pattern, text):
            detail = found.groupdict().get("detail")
            return f"{meaning} ({detail.strip()})" if detail else meaning
    return ""


def _exception(lines: list[str]) -> str:
    for line in reversed(lines):
        if re.match(r"^(\[[^\]]*\] )?[\w.]*(Error|Exception|Interrupt)\b.*", line):
            return line
    return ""


class DeathWatch:
    """Waits in a thread for a server to end, so that others need only ask.

    Args:
        wait: blocks until the server has ended and returns how, or :class:`Unknown` where that
            can no longer be observed. Called once, in a daemon thread; an exception from it
            counts as ``Unknown``.

    Attributes:
        expected: set before the server is stopped on purpose. From then on nothing is reported.
    """

    def __init__(self, wait: Callable[[], Death | Unknown]) -> None:
        self._over = threading.Event()
        self._ended: Death | Unknown | None = None
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self.expected = False
        threading.Thread(target=self._run, args=(wait,), name="death-watch", daemon=True).start()

    def _run(self, wait: Callable[[], Death | Unknown]) -> None:
        ended: Death | Unknown
        try:
            ended = wait()
        except BaseException as error:
            ended = Unknown(f"it can no longer be watched ({type(error).__name__}: {error})")
        with self._lock:
            self._ended = ended
            self._over.set()
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener()
            except Exception:
                log.exception("a listener for the end of a server failed")

    @property
    def ended(self) -> Death | Unknown | None:
        """How it ended, or why that is not known; ``None`` while it runs or when it was stopped
        on purpose."""
        return None if self.expected else self._ended

    @property
    def death(self) -> Death | None:
        """How it ended, where it is known that it did; see :attr:`ended` for the other case."""
        ended = self.ended
        return ended if isinstance(ended, Death) else None

    def wait(self, seconds: float) -> Death | None:
        """Sleeps ``seconds``, or less when the server ends meanwhile.

        Raises:
            ServerLost: whether it ended, or how, is not known and will not be known.
        """
        self._over.wait(seconds)
        ended = self.ended
        if isinstance(ended, Unknown):
            raise ServerLost(ended)
        return ended

    def raise_if_ended(self) -> None:
        """Raises :class:`ServerDied` or :class:`ServerLost`; nothing while the server runs."""
        if death := self.wait(0):
            raise ServerDied(death)

    def call_on_end(self, listener: Callable[[], None]) -> None:
        """Calls ``listener`` from the watching thread once :attr:`ended` is known."""
        with self._lock:
            if not self._over.is_set():
                self._listeners.append(listener)
                return
        listener()
