"""A generation that runs while a check does something else to the server."""

from __future__ import annotations

import threading
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sglang_harness.client import Chunk, Client
from sglang_harness.client.answers import logprobs_in, spans_in
from sglang_harness.client.calls import Prompt
from sglang_harness.errors import HarnessError


class Ended(BaseModel):
    """How a streamed generation ended."""

    model_config = ConfigDict(extra="forbid")

    text: str
    tokens: int
    finish: str
    chunk_seconds: list[float]
    ids: list[int] = Field(default_factory=list)
    logprobs: list[float] = Field(default_factory=list)
    """In nats, one a token, where they were asked for."""
    weight_spans: list[tuple[str, int, int]] = Field(default_factory=list)
    """Label, first token and the one behind the last, where the server states them."""


class BackgroundStream:
    """Streams one answer in a thread; each event is the sign that the request still runs."""

    def __init__(
        self,
        client: Client,
        prompt: Prompt,
        *,
        sampling: dict[str, Any],
        request_id: str | None = None,
        logprobs: bool = False,
    ) -> None:
        self._chunks: list[Chunk] = []
        self._news = threading.Condition()
        self._over = False
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=(client, prompt, sampling, request_id, logprobs), daemon=True
        )
        self._thread.start()

    def _run(
        self,
        client: Client,
        prompt: Prompt,
        sampling: dict[str, Any],
        request_id: str | None,
        logprobs: bool,
    ) -> None:
        try:
            for chunk in client.stream(
                prompt, sampling=sampling, request_id=request_id, logprobs=logprobs
            ):
                with self._news:
                    self._chunks.append(chunk)
                    self._news.notify_all()
        except Exception as error:
            self._error = error
        finally:
            with self._news:
                self._over = True
                self._news.notify_all()

    @property
    def is_over(self) -> bool:
        return self._over

    @property
    def count(self) -> int:
        return len(self._chunks)

    def wait_for(self, chunks: int, seconds: float) -> bool:
        """Whether ``chunks`` events came within ``seconds``; False at once if it ends before."""
        with self._news:
            self._news.wait_for(lambda: self._over or len(self._chunks) >= chunks, seconds)
            return len(self._chunks) >= chunks

    def wait_until_over(self, seconds: float) -> bool:
        with self._news:
            return self._news.wait_for(lambda: self._over, seconds)

    def end(self, seconds: float) -> Ended:
        """Waits for the end.

        Raises:
            HarnessError: it did not end within ``seconds``; or what the stream raised.
        """
        if not self.wait_until_over(seconds):
            raise HarnessError(
                f"A streamed generation did not end within {seconds:g} s "
                f"({self.count} events came)."
            )
        if self._error is not None:
            raise self._error
        if not self._chunks:
            return Ended(text="", tokens=0, finish="", chunk_seconds=[])
        last = self._chunks[-1]
        meta = last.data["meta_info"]
        return Ended(
            text=last.text,
            tokens=int(meta["completion_tokens"]),
            finish=str((meta["finish_reason"] or {}).get("type", "")),
            chunk_seconds=[c.seconds for c in self._chunks],
            ids=list(last.output_ids),
            logprobs=list(logprobs_in(meta)),
            weight_spans=list(spans_in(meta)),
        )
