"""The server's answers as types. Each ``parse`` raises ``ValueError``, ``KeyError``,
``TypeError`` or ``IndexError`` for what is not a valid answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


def logprobs_in(meta: dict[str, Any]) -> tuple[float, ...]:
    """Log-probabilities of the generated tokens, in nats; NaN where the server answers null:
    JSON has no NaN, so a server with NaN in its weights writes null (0.5.23)."""
    scored = meta.get("output_token_logprobs") or ()
    return tuple(math.nan if entry[0] is None else float(entry[0]) for entry in scored)


def spans_in(meta: dict[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """Weight label, first token and one past the last, where the server states them."""
    return tuple(
        (str(span["version"]), int(span["start"]), int(span["end"]))
        for span in meta.get("weight_versions") or ()
    )


@dataclass(frozen=True)
class Generation:
    """One answer of ``/generate``.

    Attributes:
        output_ids: the generated token ids, in order.
        logprobs: log-probability of each generated token in nats, empty if not asked for.
        prompt_logprobs: the same for the prompt from ``logprob_start_len`` on; the first
            token of a sequence has none (``None``).
        finish: ``length``, ``stop`` or ``abort``.
        finish_detail: the rest of SGLang's ``finish_reason``, such as ``matched``.
        weight_spans: which tokens were generated under which label: the label, the first token,
            and one past the last; empty where the server does not state it.
        seconds: from the first byte sent to the last byte received.
    """

    text: str
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    logprob_ids: tuple[int, ...]
    prompt_logprobs: tuple[float | None, ...]
    finish: str
    finish_detail: dict[str, Any]
    request_id: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str | None
    seconds: float
    weight_spans: tuple[tuple[str, int, int], ...] = ()
    dp_rank: int | None = None
    """Which replica answered, where a data-parallel server states it."""

    @classmethod
    def parse(cls, data: dict[str, Any], seconds: float) -> Generation:
        meta = data["meta_info"]
        finish = dict(meta["finish_reason"] or {})
        scored = meta.get("output_token_logprobs") or []
        prompt = meta.get("input_token_logprobs") or []
        return cls(
            text=data.get("text", ""),
            output_ids=tuple(int(i) for i in data["output_ids"]),
            logprobs=logprobs_in(meta),
            logprob_ids=tuple(int(entry[1]) for entry in scored),
            prompt_logprobs=tuple(None if e[0] is None else float(e[0]) for e in prompt),
            finish=str(finish.pop("type", "")),
            finish_detail=finish,
            request_id=str(meta["id"]),
            prompt_tokens=int(meta["prompt_tokens"]),
            completion_tokens=int(meta["completion_tokens"]),
            cached_tokens=int(meta.get("cached_tokens") or 0),
            weight_version=meta.get("weight_version"),
            seconds=seconds,
            weight_spans=spans_in(meta),
            dp_rank=meta.get("dp_rank"),
        )


@dataclass(frozen=True)
class Chunk:
    """One event of a streamed generation.

    Attributes:
        text: all text so far.
        output_ids: all token ids so far, or only the new ones (SGLang 0.5.23 does both).
    """

    text: str
    output_ids: tuple[int, ...]
    seconds: float
    """Since the request was sent."""
    data: dict[str, Any] = field(repr=False)
    """The whole event; ``meta_info`` has the counts and the finish reason."""

    @classmethod
    def parse(cls, data: dict[str, Any], seconds: float) -> Chunk:
        ids = tuple(int(i) for i in data.get("output_ids") or ())
        return cls(data.get("text", ""), ids, seconds, data)


@dataclass(frozen=True)
class ChatAnswer:
    """One choice of ``/v1/chat/completions`` or ``/v1/completions``."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    chunks: int = 0
    """How many events the stream had; 0 for an answer that was not streamed."""

    @classmethod
    def parse(cls, data: dict[str, Any], text: str) -> ChatAnswer:
        finish, usage = data["choices"][0]["finish_reason"], data["usage"]
        return cls(text, finish, usage["prompt_tokens"], usage["completion_tokens"])

    @classmethod
    def joined(cls, chunks: Iterable[ChatChunk]) -> ChatAnswer:
        """The answer that the events of one stream add up to."""
        text, finish, prompt_tokens, completion_tokens, count = "", "", 0, 0, 0
        for chunk in chunks:
            count += 1
            text += chunk.text
            finish = chunk.finish or finish
            prompt_tokens = chunk.prompt_tokens or prompt_tokens
            completion_tokens = chunk.completion_tokens or completion_tokens
        return cls(text, finish, prompt_tokens, completion_tokens, count)


@dataclass(frozen=True)
class ChatChunk:
    """One event of a streamed chat completion: the new text only, unlike :class:`Chunk`.

    Attributes:
        finish: empty before the last text.
        prompt_tokens: 0 before the last event, which alone has the counts; so too
            ``completion_tokens``.
    """

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def parse(cls, data: dict[str, Any]) -> ChatChunk:
        choices, usage = data.get("choices") or (), data.get("usage") or {}
        return cls(
            "".join(choice["delta"].get("content") or "" for choice in choices),
            next(
                (choice["finish_reason"] for choice in choices if choice.get("finish_reason")), ""
            ),
            usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", 0),
        )


@dataclass(frozen=True)
class Update:
    """The server's answer to a weight update. Not evidence that anything changed."""

    success: bool
    message: str
    seconds: float


@dataclass(frozen=True)
class AdapterUpdate:
    """The server's answer about a LoRA adapter. Not evidence that it is applied.

    Attributes:
        loaded: names of the adapters that the server lists as loaded.
    """

    success: bool
    message: str
    loaded: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Checksums:
    """Per-tensor checksums as ``/weights_checker`` answers them.

    Attributes:
        ranks: one mapping per rank, from the fused parameter name to 16 hexadecimal digits; in the
            order of replica, stage and tensor-parallel rank, as far as the server states them.
        engine: the checksum over everything.
        places: position of each of ``ranks``: ``tp_rank``, ``dp_rank``, ``pp_rank`` and their
            sizes, as far as the server states them.
    """

    ranks: tuple[dict[str, str], ...]
    engine: str
    places: tuple[dict[str, int], ...] = ()

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Checksums:
        found = [(_place(r.get("parallelism_info")), dict(r["checksums"])) for r in data["ranks"]]
        if not found or not all(sums for _, sums in found):
            raise ValueError("no checksums in the answer")
        # Replicas come in the order in which they answered.
        found.sort(key=lambda rank: [rank[0].get(n, 0) for n in ("dp_rank", "pp_rank", "tp_rank")])
        return cls(
            ranks=tuple(sums for _, sums in found),
            engine=str(data.get("per_engine_checksum", "")),
            places=tuple(place for place, _ in found),
        )

    def names(self) -> list[str]:
        """Every tensor of every rank; ``rankN:`` precedes all but those of rank 0."""
        return [_on(index) + n for index, rank in enumerate(self.ranks) for n in sorted(rank)]

    def changed_since(self, before: Checksums) -> list[str]:
        """Those of :meth:`names` that differ from ``before``, or are only in one of the two."""
        changed = []
        for index, (then, now) in enumerate(zip(before.ranks, self.ranks, strict=True)):
            differing = (n for n in sorted(then.keys() | now.keys()) if then.get(n) != now.get(n))
            changed += [_on(index) + n for n in differing]
        return changed


def _on(rank: int) -> str:
    return f"rank{rank}:" if rank else ""


def _place(info: Any) -> dict[str, int]:
    """Position of a rank; newer servers list one per role, the target's first."""
    place = info[0] if isinstance(info, list) and info else info
    if not isinstance(place, dict):
        return {}
    return {name: value for name, value in place.items() if isinstance(value, int)}
