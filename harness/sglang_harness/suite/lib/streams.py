"""How a streamed answer ended, or that it did not: a stream that hangs is the server's failure, and
not one of the harness."""

from __future__ import annotations

from sglang_harness.traffic.background import BackgroundStream, StreamEnded

#: Seconds for a stream to end once nothing holds it.
ENDS_WITHIN = 90.0

RUNNING = "still running"


def ended(stream: BackgroundStream, seconds: float | None = None) -> StreamEnded:
    """Waits for the end of ``stream``, by default for :data:`ENDS_WITHIN`. Of one that does not
    come to an end the finish is :data:`RUNNING`, with as many tokens as events came.

    Raises:
        HarnessError: what the stream raised.
    """
    if stream.wait_until_over(ENDS_WITHIN if seconds is None else seconds):
        return stream.end(0)
    return StreamEnded(text="", tokens=stream.count, finish=RUNNING, chunk_seconds=[])
