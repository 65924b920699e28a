"""A generation that runs while a check does something else to the server."""

from __future__ import annotations

import uuid
from contextlib import closing
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.client import Chunk, Client, calls
from sglang_harness.client.answers import logprobs_in, spans_in
from sglang_harness.client.calls import Prompt
from sglang_harness.errors import BadAnswer, HarnessError
from sglang_harness.traffic.base import Background


class StreamEnded(BaseModel):
    """How a streamed generation ended."""

    model_config = ConfigDict(extra="forbid")

    text: str
    tokens: int
    finish: str
    chunk_seconds: list[float]
    ids: list[int] = Field(default_factory=list)
    logprobs: list[float] = Field(default_factory=list)
    """In nats, one per token, where they were asked for."""
    weight_spans: list[tuple[str, int, int]] = Field(default_factory=list)
    """Label, first token and one past the last, where the server states them."""


class BackgroundStream(Background):
    """Streams one answer in a thread, from its construction on; each event shows that the request
    still runs.

    ::

        with BackgroundStream(client, "Once", sampling=greedy(400)) as stream:
            if not stream.wait_for(2, 30):
                raise HarnessError(...)
            ...
            ended = stream.end(90)

    Leaving the block aborts the request if it still runs.
    """

    def __init__(
        self,
        client: Client,
        prompt: Prompt,
        *,
        sampling: dict[str, Any],
        request_id: str | None = None,
        logprobs: bool = False,
    ) -> None:
        super().__init__(client, threads=1, name="stream")
        self._id = request_id or uuid.uuid4().hex
        self._call = calls.generate_stream(
            prompt, sampling=sampling, request_id=self._id, logprobs=logprobs
        )
        self._chunks: list[Chunk] = []
        self.start()

    def _work(self) -> None:
        with closing(self._client.events(self._call)) as events:
            for chunk in events:
                with self._news:
                    self._chunks.append(chunk)
                    self._news.notify_all()
                if self._stopping.is_set():
                    return

    def _under_way(self) -> list[str]:
        return [] if self.is_over else [self._id]

    @property
    def is_over(self) -> bool:
        """Whether the stream has ended, for whatever reason."""
        return self._working == 0

    @property
    def count(self) -> int:
        """How many events came so far."""
        return len(self._chunks)

    def wait_for(self, chunks: int, seconds: float) -> bool:
        """Whether ``chunks`` events came within ``seconds``; False at once if it ends before.

        Raises:
            Exception: what ended the stream before.
        """
        self._wait_for(lambda: self.is_over or self.count >= chunks, seconds)
        if self.count < chunks:
            self._raise_failure()
        return self.count >= chunks

    def wait_until_over(self, seconds: float) -> bool:
        """Whether it ended within ``seconds``, for whatever reason."""
        with self._news:
            return self._news.wait_for(lambda: self.is_over, seconds)

    def end(self, seconds: float) -> StreamEnded:
        """Waits for the end.

        Raises:
            HarnessError: it did not end within ``seconds``.
            Exception: what ended the stream in place of its last event.
        """
        if not self.wait_until_over(seconds):
            raise HarnessError(
                f"A streamed generation did not end within {seconds:g} s "
                f"({self.count} events came)."
            )
        self._raise_failure()
        if not self._chunks:
            return StreamEnded(text="", tokens=0, finish="", chunk_seconds=[])
        last = self._chunks[-1]
        try:
            meta = last.data["meta_info"]
            return StreamEnded(
                text=last.text,
                tokens=int(meta["completion_tokens"]),
                finish=str((meta["finish_reason"] or {}).get("type", "")),
                chunk_seconds=[c.seconds for c in self._chunks],
                ids=list(last.output_ids),
                logprobs=list(logprobs_in(meta)),
                weight_spans=list(spans_in(meta)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadAnswer(
                str(self._call), f"the last event of the stream cannot be read ({error!r})"
            ) from error
