"""What NVML shows of GPUs around one event, at 200 readings a second: a release answers before the
memory is free, and a process that was killed holds its memory for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sglang_harness.memory import WatchedSource
from sglang_harness.memory.sampler import Sampler
from sglang_harness.memory.timeline import Sample, Timeline

MIB = 1 << 20

#: Readings a second that are asked for.
RATE = 200.0
#: Readings of one event that are written down at most.
WRITTEN = 80


class DeviceTimeline:
    """Samples ``source`` for as long as the ``with`` block runs. Times are ``time.monotonic()``.

    Attributes:
        line: the samples so far.
    """

    def __init__(self, source: WatchedSource, *, rate: float = RATE) -> None:
        self.line = Timeline()
        self._sampler = Sampler(source.read_partly, self.line.add, rate=rate)
        self._began = self._ended = time.monotonic()

    def __enter__(self) -> DeviceTimeline:
        self._began = time.monotonic()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sampler.stop()
        self._ended = time.monotonic()

    @property
    def readings_per_second(self) -> float:
        """What was reached of the rate that was asked for."""
        return self._sampler.taken / max(self._ended - self._began, 1e-9)

    @property
    def gaps(self) -> dict[str, int]:
        """Why readings are missing, and how many."""
        return dict(self._sampler.gaps)


@dataclass(frozen=True)
class Change:
    """The memory of GPUs around one call. Bytes by UUID.

    Attributes:
        before: at rest before the call.
        at_answer: the first reading after the answer.
        settled: at rest afterwards, or when the wait for it was over.
        answered_after: seconds from the call to its answer.
        settled_after: seconds from the answer to the first reading from which on every GPU stayed
            where it settled; 0.0: it was there at the answer.
        readings_per_second: what was reached.
        line: seconds from the answer, and MiB in use on all of the GPUs.
    """

    before: dict[str, int]
    at_answer: dict[str, int]
    settled: dict[str, int]
    answered_after: float
    settled_after: float
    readings_per_second: float
    line: list[tuple[float, float]] = field(default_factory=list)

    def told(self) -> dict[str, object]:
        """For the results: MiB over all GPUs."""
        return {
            "before_mib": in_mib(self.before),
            "at_answer_mib": in_mib(self.at_answer),
            "settled_mib": in_mib(self.settled),
            "call_seconds": round(self.answered_after, 3),
            "answer_to_settled_seconds": round(self.settled_after, 3),
            "readings_per_second": round(self.readings_per_second, 1),
            "line": self.line,
        }


def change(
    timeline: DeviceTimeline,
    *,
    before: Mapping[str, int],
    settled: Mapping[str, int],
    called: float,
    answered: float,
    within: int,
) -> Change:
    """What a timeline shows of one call.

    Args:
        called, answered: ``time.monotonic()`` around the call.
        within: bytes by which a GPU may be off and count as settled.
    """
    samples = timeline.line.samples
    after = [s for s in samples if s.seconds >= answered]

    def there(parts: Mapping[str, int]) -> bool:
        return all(abs(parts.get(u, 0) - used) <= within for u, used in settled.items())

    stays = seconds_until_it_stays(after, since=answered, there=there)
    return Change(
        before=dict(before),
        at_answer=dict(after[0].parts if after else settled),
        settled=dict(settled),
        answered_after=answered - called,
        settled_after=stays if stays is not None else max(0.0, _last(samples) - answered),
        readings_per_second=timeline.readings_per_second,
        line=thinned(samples, origin=answered),
    )


def seconds_until_it_stays(
    samples: Sequence[Sample], *, since: float, there: Callable[[Mapping[str, int]], bool]
) -> float | None:
    """Seconds from ``since`` to the first sample from which on all are ``there``; 0.0 where all
    are, ``None`` where the last one is not or there is none."""
    first: float | None = None
    for number, sample in enumerate(samples):
        if not there(sample.parts):
            first = None
        elif first is None:
            first = 0.0 if number == 0 else max(0.0, sample.seconds - since)
    return first


def thinned(
    samples: Sequence[Sample], *, origin: float, most: int = WRITTEN
) -> list[tuple[float, float]]:
    """Seconds from ``origin`` and MiB: the readings at which the memory changed, with the ones
    before them, evenly fewer where these are more than ``most``."""
    kept: list[Sample] = []
    for number, sample in enumerate(samples):
        ends = number in (0, len(samples) - 1)
        moved = number > 0 and sample.used != samples[number - 1].used
        moves = number + 1 < len(samples) and samples[number + 1].used != sample.used
        if ends or moved or moves:
            kept.append(sample)
    if len(kept) > most:
        every = (len(kept) - 1) / (most - 1)
        kept = [kept[round(n * every)] for n in range(most)]
    return [(round(s.seconds - origin, 3), round(s.used / MIB, 1)) for s in kept]


def in_mib(parts: Mapping[str, int] | Iterable[int]) -> float:
    """Bytes over all GPUs, in MiB."""
    values = parts.values() if isinstance(parts, Mapping) else parts
    return round(sum(values) / MIB, 1)


def _last(samples: Sequence[Sample]) -> float:
    return samples[-1].seconds if samples else 0.0
