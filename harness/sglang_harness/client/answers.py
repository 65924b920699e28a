"""What the server's answers mean, as types."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Generation:
    """One answer of ``/generate``.

    Attributes:
        output_ids: the generated token ids, in order.
        logprobs: natural-log probability of each generated token, empty if not asked for.
        prompt_logprobs: the same for the prompt from ``logprob_start_len`` on; the first
            token of a sequence has none (``None``).
        finish: ``length``, ``stop`` or ``abort``.
        finish_detail: the rest of SGLang's ``finish_reason``, such as ``matched``.
        weight_spans: which tokens were generated under which label: the label, the first token,
            and the one behind the last; empty where the server does not state it.
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

    @classmethod
    def parse(cls, data: dict[str, Any], seconds: float) -> Generation:
        """Reads one element of the answer; raises ``KeyError`` where it lacks what it owes."""
        meta = data["meta_info"]
        finish = dict(meta["finish_reason"] or {})
        scored = meta.get("output_token_logprobs") or []
        prompt = meta.get("input_token_logprobs") or []
        return cls(
            text=data.get("text", ""),
            output_ids=tuple(int(i) for i in data["output_ids"]),
            logprobs=tuple(float(entry[0]) for entry in scored),
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
            weight_spans=tuple(
                (str(span["version"]), int(span["start"]), int(span["end"]))
                for span in meta.get("weight_versions") or ()
            ),
        )


@dataclass(frozen=True)
class Chunk:
    """One event of a stream: the text so far, the ids so far, and when it came."""

    text: str
    output_ids: tuple[int, ...]
    seconds: float
    """Since the request was sent."""
    data: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class ChatAnswer:
    """One choice of ``/v1/chat/completions`` or ``/v1/completions``."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    chunks: int = 0
    """How many events a stream had; 0 where the answer came whole."""


@dataclass(frozen=True)
class Update:
    """The server's word on a weight update. Not evidence that anything changed."""

    success: bool
    message: str
    seconds: float


@dataclass(frozen=True)
class Checksums:
    """Per-tensor checksums as ``/weights_checker`` answers them.

    Attributes:
        ranks: one mapping a rank, from the fused parameter name to 16 hexadecimal digits.
        engine: the checksum over everything.
    """

    ranks: tuple[dict[str, str], ...]
    engine: str

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Checksums:
        ranks = tuple(dict(rank["checksums"]) for rank in data["ranks"])
        if not ranks or not all(ranks):
            raise ValueError("no checksums in the answer")
        return cls(ranks, str(data.get("per_engine_checksum", "")))

    def changed_since(self, before: Checksums) -> list[str]:
        """Names that differ from ``before`` on any rank, ``rankN:`` put before all but rank 0."""
        changed = []
        for index, (then, now) in enumerate(zip(before.ranks, self.ranks, strict=True)):
            prefix = f"rank{index}:" if index else ""
            changed += [
                prefix + n for n in sorted(then.keys() | now.keys()) if then.get(n) != now.get(n)
            ]
        return changed
