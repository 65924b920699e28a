"""Does every judge accept a right server and refuse each of the lies that it is there for?

The right servers are recorded: the evidence of a whole run against SGLang 0.5.23 on a CPU. A
lie is that evidence with one thing changed the way a broken server would have changed it. So
nothing here starts a server, and a judge that refuses nothing does not get through.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import lies_of_own_servers as own_servers
import push_evidence
import pytest
import release_evidence
from pydantic import ValidationError

from sglang_harness import suite
from sglang_harness.suite.check import Check, Mismatch, Observation
from sglang_harness.suite.checks.memory.readings import MIB
from sglang_harness.verdict import Outcome, Verdict, writable

RECORDED = Verdict.read(Path(__file__).parent / "data" / "recorded-full-tiny-0.5.23.json")
CHECKS: dict[str, Check[Any]] = suite.registered()
EVIDENCE = {c.id: c.evidence for c in RECORDED.checks if c.evidence is not None}
EVIDENCE |= own_servers.RECORDED
KNOWN = [c.id for c in RECORDED.checks if c.outcome is Outcome.KNOWN]

# What was not recorded as it has to be: the recorded server was started without
# deterministic inference and on a machine with no GPU, and it has the two defects of the
# registry.
BY_HAND: dict[str, dict[str, Any]] = {
    "sample/seed-repeats": {
        "first": [237, 12, 90, 301],
        "again": [237, 12, 90, 301],
        "in_company": [237, 12, 90, 301],
        "other_seeds": [[5, 6, 7, 8], [237, 12, 90, 301], [44, 3, 2, 1]],
    },
    "memory/device-given-back": {
        "before": {"GPU-1": 600 * MIB, "GPU-2": 0},
        "after": {"GPU-1": 610 * MIB, "GPU-2": 0},
        "waited_seconds": 0.4,
    },
    **release_evidence.evidence(EVIDENCE),
    **push_evidence.evidence(),
    "stop/abort-whole-id": EVIDENCE["stop/abort"],
    "hostile/out-of-vocabulary-ids": {
        **EVIDENCE["hostile/out-of-vocabulary-ids"],
        "status": 400,
        "reason": "token id 10000000 is out of the vocabulary",
        "death": "",
        "after": copy.deepcopy(EVIDENCE["hostile/out-of-vocabulary-ids"]["before"]),
    },
}

# Recorded on the same server by itself, after the whole run.
ROUTES = ("weights/tensor", "weights/tensor-bucket", "weights/shared-memory", "weights/distributed")
BY_HAND |= json.loads(
    (Path(__file__).parent / "data" / "weights-routes-tiny-0.5.23.json").read_text("utf-8")
)


def good(check_id: str) -> dict[str, Any]:
    """What a right server is seen to do; the caller's own copy."""
    return copy.deepcopy(BY_HAND.get(check_id) or EVIDENCE[check_id])


def observed(check_id: str, evidence: dict[str, Any]) -> Observation:
    return CHECKS[check_id].observation.model_validate(evidence)


def judged(check_id: str, evidence: dict[str, Any]) -> list[Mismatch]:
    return CHECKS[check_id].judge(observed(check_id, evidence))


# --- how evidence is altered ------------------------------------------------------------------


class Alteration(NamedTuple):
    check: str
    name: str
    """What is wrong with the server, or what is odd about it and still right."""
    alter: Callable[[dict[str, Any]], object]
    """Changes good evidence in place."""
    piece: str = ""
    """What the message has to say."""

    def altered(self) -> dict[str, Any]:
        evidence = good(self.check)
        self.alter(evidence)
        return evidence


def named(alterations: list[Alteration]) -> list[Any]:
    return [pytest.param(a, id=f"{a.check}: {a.name}") for a in alterations]


def put(changes: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    """Puts values at places such as ``answers.0.finish``."""

    def alter(evidence: dict[str, Any]) -> None:
        for place, value in changes.items():
            *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
            inner: Any = evidence
            for step in way:
                inner = inner[step]
            inner[last] = copy.deepcopy(value)

    return alter


def at(*way: str | int, do: Callable[[Any], object]) -> Callable[[dict[str, Any]], object]:
    """Alters what is at one place, by a function that changes it in place."""

    def alter(evidence: dict[str, Any]) -> None:
        inner: Any = evidence
        for step in way:
            inner = inner[step]
        do(inner)

    return alter


def off_by(amount: float, *way: str | int) -> Callable[[dict[str, Any]], object]:
    *before, last = way
    return at(*before, do=lambda inner: inner.__setitem__(last, inner[last] + amount))


def swap(first: Any, second: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        first[key], second[key] = second[key], first[key]


def shift(values: list[Any]) -> None:
    """Every value stands one place too far left."""
    values.append(values.pop(0))


def other_tokens(answer: dict[str, Any]) -> None:
    """An answer of improbable tokens that are scored as such, for example by q and k swapped."""
    answer["output_ids"] = [i + 1 for i in answer["output_ids"]]
    answer["oracle"] = [best - 4.0 for best in answer["best"]]
    if answer["served"]:
        answer["served_ids"] = list(answer["output_ids"])
        answer["served"] = list(answer["oracle"])


PER_TOKEN = ("output_ids", "served", "served_ids", "oracle", "best_ids", "best")


def cut(answer: dict[str, Any], tokens: int) -> None:
    """An answer that ends early and counts right."""
    for key in PER_TOKEN:
        del answer[key][tokens:]
    answer["completion_tokens"] = tokens


def swap_neighbours(evidence: dict[str, Any]) -> None:
    """Two requests that ran together get each other's answer."""
    first, second = evidence["answers"][:2]
    swap(first, second, ("output_ids", "served", "served_ids", "text"))
    # To each oracle the other's tokens come as a surprise.
    for answer in (first, second):
        answer["oracle"] = [best - 4.0 for best in answer["best"]]


def as_increments(evidence: dict[str, Any]) -> None:
    """The stream of a server whose events carry only what is new."""
    ids = evidence["whole"]["ids"]
    evidence["chunk_ids"] = [ids[:2], *([i] for i in ids[2:])]


def lose_an_increment(evidence: dict[str, Any]) -> None:
    as_increments(evidence)
    del evidence["chunk_ids"][7]


def repeat_an_increment(evidence: dict[str, Any]) -> None:
    as_increments(evidence)
    evidence["chunk_ids"].insert(7, evidence["chunk_ids"][7])


def lose_text(evidence: dict[str, Any]) -> None:
    """The pieces of one event are missing in every text after it."""
    texts = evidence["chunk_texts"]
    evidence["chunk_texts"] = [*texts[:2], *(t.replace("ick", "", 1) for t in texts[2:])]


def repeat_text(evidence: dict[str, Any]) -> None:
    """A piece is sent twice, so every text after it holds it twice."""
    texts = evidence["chunk_texts"]
    evidence["chunk_texts"] = [*texts[:5], *(t.replace("ick", "ickick", 1) for t in texts[5:])]


def evenly_sampled(evidence: dict[str, Any]) -> None:
    """Of 373 tokens that are as likely as one another, four of 96 are among the right fifteen."""
    likely = evidence["likely_ids"]
    evidence["sampled"] = [i for i in range(300) if i not in likely][:92] + likely[:4]


def in_events(number: int) -> Callable[[dict[str, Any]], object]:
    """The stream is held back, and comes in a few events at its end."""

    def alter(evidence: dict[str, Any]) -> None:
        for key in ("chunk_texts", "chunk_ids", "chunk_seconds"):
            evidence[key] = evidence[key][-number:]

    return alter


def no_events(evidence: dict[str, Any]) -> None:
    put({"chunk_texts": [], "chunk_ids": [], "chunk_seconds": []})(evidence)
    put({"completion_tokens": 0, "finish": ""})(evidence)


def forget(mark: str) -> Callable[[dict[str, Any]], object]:
    """Memory that was not read at a mark."""

    def alter(evidence: dict[str, Any]) -> None:
        evidence["readings"] = [r for r in evidence["readings"] if r["mark"] != mark]

    return alter


def read_as(used: dict[str, int]) -> Callable[[dict[str, Any]], object]:
    """Other figures at given marks."""

    def alter(evidence: dict[str, Any]) -> None:
        for reading in evidence["readings"]:
            reading["used_bytes"] = used.get(reading["mark"], reading["used_bytes"])

    return alter


def too_many_kept(evidence: dict[str, Any]) -> None:
    """A server that keeps every checkpoint it was given."""
    before, weights = evidence["used_bytes"][0], 4 * 1024 * MIB
    evidence["weights_bytes"] = weights
    evidence["used_bytes"] = [before + n * weights for n in range(9)]


def half_kept(evidence: dict[str, Any]) -> None:
    """A tenth of the checkpoint stays behind in each push: slow, and still a leak."""
    too_many_kept(evidence)
    before, weights = evidence["used_bytes"][0], evidence["weights_bytes"]
    evidence["used_bytes"] = [before + n * weights // 10 for n in range(9)]


def stale(evidence: dict[str, Any]) -> None:
    """After the update that flushes, what the server says is still the old weights' word."""
    evidence["flushed"] = copy.deepcopy(evidence["unflushed"])


def control_unseen(evidence: dict[str, Any]) -> None:
    """The stale answer agrees with the new weights: then staleness could not be seen at all."""
    unflushed = evidence["unflushed"]
    unflushed["oracle"] = list(unflushed["served"])


def nothing_changed(evidence: dict[str, Any]) -> None:
    """The server says success, and serves the old weights under the new label."""
    evidence["unchanged"] = list(evidence["parameters"])
    evidence["old_oracle_error"] = 3e-6
    for answer in evidence["answers"]:
        other_tokens(answer)


def half_changed(evidence: dict[str, Any]) -> None:
    evidence["unchanged"] = [p for p in evidence["parameters"] if "layers.1" in p]


def not_a_number(evidence: dict[str, Any]) -> None:
    for answer in evidence["answers"]:
        answer["served"] = [math.nan] * len(answer["served"])


# --- the lies ---------------------------------------------------------------------------------

LIES = [
    # launch
    Alteration(
        "launch/phases",
        "the first generation gave no token",
        put({"first_tokens": 0}),
        "tokens of the first generation: expected 2, got 0",
    ),
    Alteration(
        "launch/phases",
        "the first generation went on past its end",
        put({"first_tokens": 3}),
        "tokens of the first generation: expected 2, got 3",
    ),
    Alteration(
        "launch/readiness",
        "/ready takes it back and says it again",
        put({"afterwards": {"200": 30, "503": 9}}),
        "/ready afterwards: expected 200 every time, got 200 x 30, 503 x 9",
    ),
    Alteration(
        "launch/readiness",
        "/ready is not answered any more",
        put({"afterwards": {"no answer": 1}}),
        "/ready afterwards: expected 200 every time, got no answer x 1",
    ),
    Alteration(
        "launch/readiness",
        "ready when it was first asked",
        at("sightings", do=lambda s: s.__setitem__(slice(None), s[-1:])),
        "/ready: expected a refusal before the first 200, got ['200']",
    ),
    Alteration(
        "launch/readiness",
        "ready, and the first generation is refused",
        at("sightings", do=lambda s: s.append({**s[-1], "route": "/generate", "answer": "503"})),
        "generation after /ready: expected an answer, got 503",
    ),
    Alteration(
        "launch/server-info",
        "a share of memory that was not asked for",
        put({"info.mem-fraction-static": 0.9}),
        "--mem-fraction-static: expected 0.1, got 0.9",
    ),
    Alteration(
        "launch/server-info",
        "a switch that was not turned",
        put({"info.disable-overlap-schedule": False}),
        "--disable-overlap-schedule: expected True, got False",
    ),
    Alteration(
        "launch/server-info",
        "another dtype than asked for",
        put({"info.dtype": "bfloat16"}),
        "--dtype: expected float32, got bfloat16",
    ),
    Alteration(
        "launch/server-info",
        "another model than asked for",
        put({"info_model_path": "/models/tiny-2-seed1"}),
        "model_path: expected '/models/tiny-2-seed0', got '/models/tiny-2-seed1'",
    ),
    Alteration(
        "launch/server-info",
        "a GPU server that fell back to the CPU",
        put({"device": "cuda"}),
        "device: expected 'cuda', got 'cpu'",
    ),
    Alteration(
        "launch/server-info",
        "no version",
        put({"version": "unknown"}),
        "version: expected a version, got 'unknown'",
    ),
    Alteration(
        "launch/log",
        "a traceback",
        at("alarming", do=lambda lines: lines.append("Traceback (most recent call last):")),
        "log: expected no traceback, got Traceback (most recent call last):",
    ),
    Alteration("launch/log", "nothing in the log", put({"lines": 0}), "at least one line"),
    # generate
    Alteration(
        "generate/greedy-tokens",
        "q and k swapped",
        at("answers", do=lambda answers: [other_tokens(a) for a in answers]),
        "'The capital of France is', token 0: expected token 366",
    ),
    Alteration(
        "generate/greedy-tokens",
        "one wrong token in the last answer",
        put({"answers.3.output_ids.9": 7, "answers.3.oracle.9": -9.5}),
        "'Water boils at', token 9:",
    ),
    Alteration(
        "generate/greedy-tokens",
        "one token too few",
        at("answers", 1, do=lambda a: cut(a, 15)),
        "expected 16 tokens, got 15 tokens",
    ),
    Alteration(
        "generate/greedy-tokens",
        "no token at all",
        at("answers", 1, do=lambda a: cut(a, 0)),
        "expected 16 tokens, got 0 tokens",
    ),
    Alteration(
        "generate/greedy-tokens",
        "completion_tokens lies",
        put({"answers.2.completion_tokens": 17}),
        "expected completion_tokens 16, as many as came, got 17",
    ),
    Alteration(
        "generate/greedy-tokens",
        "a beginning-of-sequence token put before the prompt",
        put({"answers.0.prompt_tokens": 19}),
        "expected prompt_tokens 18, got 19",
    ),
    Alteration(
        "generate/greedy-tokens",
        "ended at an ignored end-of-sequence token",
        put({"answers.0.finish": "stop"}),
        "finish reason: expected 'length', got 'stop'",
    ),
    Alteration(
        "generate/logprobs",
        "a log-probability off by a hundredth",
        off_by(0.01, "sampled", "served", 5),
        "sampled, token 5 (",
    ),
    Alteration(
        "generate/logprobs",
        "every log-probability belongs to the next token",
        at("sampled", "served", do=shift),
        "sampled, token 0 (",
    ),
    Alteration(
        "generate/logprobs",
        "log-probabilities of other tokens than were sent",
        at("sampled", "served_ids", do=shift),
        "sampled: expected log-probabilities of the tokens [",
    ),
    Alteration(
        "generate/logprobs",
        "log-probabilities left out",
        put({"sampled.served": [], "sampled.served_ids": []}),
        "got of []",
    ),
    Alteration(
        "generate/logprobs",
        "a log-probability that is no number",
        put({"sampled.served.3": math.nan}),
        "sampled, token 3 (",
    ),
    Alteration(
        "generate/logprobs",
        "logarithms to the base of two",
        at("sampled", do=lambda s: s.update(served=[v / math.log(2) for v in s["served"]])),
        "sampled, token 15 (",
    ),
    Alteration(
        "generate/logprobs",
        "the prompt's log-probabilities stand one place too early",
        at("prompt_served", do=shift),
        "prompt token 1: expected log-probability -6.519",
    ),
    Alteration(
        "generate/logprobs",
        "the prompt's first log-probability left out, the rest moved up",
        at("prompt_served", do=lambda values: values.pop(0)),
        "prompt: expected 42 log-probabilities, the first empty, got 41",
    ),
    Alteration(
        "generate/logprobs",
        "a prompt token without a log-probability",
        put({"prompt_served.8": None}),
        "got None",
    ),
    Alteration(
        "generate/logprobs",
        "a prompt token with one that is no number",
        put({"prompt_served.41": math.nan}),
        "prompt token 41: ",
    ),
    Alteration(
        "generate/logprobs",
        "fewer tokens than asked for",
        at("sampled", do=lambda a: cut(a, 4)),
        "sampled: expected 16 tokens, got 4 tokens",
    ),
    Alteration(
        "generate/batch-equals-single",
        "two answers of a batch swapped",
        at("got", do=lambda got: got.insert(0, got.pop(1))),
        "The capital of France is, token 0: expected token 366, got token 237",
    ),
    Alteration(
        "generate/batch-equals-single",
        "padding leaks into a log-probability",
        off_by(-0.01, "got", 2, "logprobs", 6),
        "def fibonacci(n):, token 6 (367): expected log-probability",
    ),
    Alteration(
        "generate/batch-equals-single",
        "a log-probability in a batch is no number",
        put({"got.1.logprobs.7": math.nan}),
        "off by nan",
    ),
    Alteration(
        "generate/batch-equals-single",
        "the right ids and another's text",
        at("got", do=lambda got: swap(got[0], got[1], ("text",))),
        "The capital of France is: expected text ' three",
    ),
    Alteration(
        "generate/ids-equal-text",
        "a beginning-of-sequence token put before ids",
        put({"got.0.ids.0": 12, "got.0.logprobs.0": -1.25}),
        "token 0: expected token 366, got token 12",
    ),
    Alteration(
        "generate/ids-equal-text",
        "a log-probability off by a hundredth",
        off_by(0.01, "got", 0, "logprobs", 4),
        "off by 0.010",
    ),
    Alteration(
        "generate/ids-equal-text",
        "the last token lost",
        at("got", 0, do=lambda t: (t["ids"].pop(), t["logprobs"].pop())),
        "expected 8 tokens, got 7 tokens",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "an event's text lost",
        lose_text,
        "last text: expected",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "an event's text sent twice",
        repeat_text,
        "event 5: expected text that begins",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "an event's ids lost",
        lose_an_increment,
        "ids of the whole stream: expected [237, 301, 312,",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "an event's ids sent twice",
        repeat_an_increment,
        "ids of the whole stream: expected [237, 301, 312,",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "the last event is lost",
        at(do=lambda e: [e[k].pop() for k in ("chunk_texts", "chunk_ids", "chunk_seconds")]),
        "last text: expected",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "completion_tokens lies",
        put({"completion_tokens": 23}),
        "completion_tokens: expected 24, got 23",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "ends without a reason",
        put({"finish": ""}),
        "finish reason: expected 'length', got ''",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "held back and sent in two events",
        in_events(2),
        "events: expected at least 3 for 24 tokens, got 2",
    ),
    Alteration(
        "generate/stream-equals-whole",
        "a stream of nothing",
        no_events,
        "stream: expected at least one event, got none",
    ),
    Alteration(
        "generate/32-at-once",
        "two requests get each other's answer",
        swap_neighbours,
        "'Item number 723 in the list, counted from 722, is', token 0: expected token 347",
    ),
    Alteration(
        "generate/32-at-once",
        "two requests get each other's log-probabilities",
        at("answers", do=lambda a: swap(a[3], a[4], ("served",))),
        "token 0 (",
    ),
    Alteration(
        "generate/32-at-once",
        "one answer is cut short",
        at("answers", 30, do=lambda a: cut(a, 2)),
        "expected 4 tokens, got 2 tokens",
    ),
    Alteration(
        "generate/32-at-once",
        "one log-probability of a hundred and twenty-eight is no number",
        put({"answers.31.served.3": math.nan}),
        "got nan",
    ),
    # sample
    Alteration(
        "sample/seed-repeats",
        "the seed is ignored",
        put({"again": [4, 5, 6, 7]}),
        "the same seed again: expected [237, 12, 90, 301], got [4, 5, 6, 7]",
    ),
    Alteration(
        "sample/seed-repeats",
        "company changes the answer",
        put({"in_company.3": 9}),
        "the same seed in a batch: expected [237, 12, 90, 301], got [237, 12, 90, 9]",
    ),
    Alteration(
        "sample/seed-repeats",
        "every seed is the same one",
        put({"other_seeds": [[237, 12, 90, 301]] * 3}),
        "other seeds: expected other tokens",
    ),
    Alteration(
        "sample/follows-oracle",
        "temperature is ignored: always the likeliest token",
        put({"sampled": [166] * 96}),
        "samples among the 15 likeliest tokens: expected 40 of 96, give or take 25, got 96",
    ),
    Alteration(
        "sample/follows-oracle",
        "every token is as likely as another",
        evenly_sampled,
        "give or take 25, got 4",
    ),
    Alteration(
        "sample/follows-oracle",
        "samples are missing",
        at("sampled", do=lambda s: s.__delitem__(slice(90, None))),
        "number of samples: expected 96, got 90",
    ),
    Alteration(
        "sample/follows-oracle",
        "no sample at all",
        put({"sampled": []}),
        "number of samples: expected 96, got 0",
    ),
    Alteration(
        "sample/follows-oracle",
        "top_k is ignored",
        put({"top_k_1_ids.2": 3}),
        "top_k 1: expected [166, 143, 181",
    ),
    # stop
    Alteration(
        "stop/conditions",
        "the stop string is ignored",
        at(do=lambda e: e["at_string"].update(answer=copy.deepcopy(e["whole"]), detail={})),
        "stop string, finish: expected 'stop', got 'length'",
    ),
    Alteration(
        "stop/conditions",
        "the stop string is left in the text",
        at("at_string", "answer", do=lambda a: a.update(text=a["text"] + "ive")),
        "stop string, text: expected",
    ),
    Alteration(
        "stop/conditions",
        "another stop string is named",
        put({"at_string.detail.matched": "iv"}),
        "stop string, matched: expected 'ive', got 'iv'",
    ),
    Alteration(
        "stop/conditions",
        "the stop token is ignored",
        at(do=lambda e: e["at_id"].update(answer=copy.deepcopy(e["whole"]), detail={})),
        "stop token, finish: expected 'stop', got 'length'",
    ),
    Alteration(
        "stop/conditions",
        "goes on for a token past the stop token",
        at("at_id", "answer", "ids", do=lambda ids: ids.append(181)),
        "stop token, ids: expected [237, 301, 312, 167], got [237, 301, 312, 167, 298, 181]",
    ),
    Alteration(
        "stop/conditions",
        "the stop token is not named",
        put({"at_id.detail": {}}),
        "stop token, matched: expected 298, got None",
    ),
    Alteration(
        "stop/conditions",
        "goes on past the end of the sequence",
        put({"at_eos.answer.ids": [1, 1, 1], "at_eos.answer.finish": "length"}),
        "end of sequence, tokens at most: expected True, got False",
    ),
    Alteration(
        "stop/conditions",
        "ends at the end of the sequence and calls it length",
        put({"at_eos.answer.finish": "length"}),
        "end of sequence, finish: expected 'stop', got 'length'",
    ),
    Alteration(
        "stop/conditions",
        "ignores the end of the sequence and names it all the same",
        put({"past_eos.answer.finish": "stop"}),
        "ignored end of sequence, finish: expected 'length', got 'stop'",
    ),
    Alteration(
        "stop/conditions",
        "ends at an ignored end of sequence",
        put({"past_eos.answer.ids": [1], "past_eos.answer.finish": "stop"}),
        "ignored end of sequence, tokens: expected 3, got 1",
    ),
    Alteration(
        "stop/conditions",
        "one token more than asked for",
        at("at_length", "answer", "ids", do=lambda ids: ids.append(181)),
        "length, ids: expected [237, 301, 312, 167, 298], got [237, 301, 312, 167, 298, 181]",
    ),
    Alteration(
        "stop/conditions",
        "the wrong reason for an end by length",
        put({"at_length.answer.finish": "stop"}),
        "length, finish: expected 'length', got 'stop'",
    ),
    *[
        lie
        for check in ("stop/abort", "stop/abort-whole-id")
        for lie in (
            Alteration(
                check,
                "the abort does nothing",
                put({"aborted.finish": "length", "aborted.tokens": 400}),
                "aborted request: expected fewer than 400 tokens, got 400",
            ),
            Alteration(
                check,
                "the abort ends its neighbour too",
                put({"neighbour.finish": "abort", "neighbour.tokens": 3}),
                "neighbour, finish reason: expected 'length', got 'abort'",
            ),
            Alteration(
                check,
                "the neighbour loses tokens and says nothing",
                put({"neighbour.tokens": 21}),
                "neighbour, tokens: expected 24, got 21",
            ),
            Alteration(
                check,
                "the abort is called a stop",
                put({"aborted.finish": "stop"}),
                "aborted request, finish reason: expected 'abort', got 'stop'",
            ),
            Alteration(
                check,
                "the abort takes half a minute",
                put({"seconds_to_end": 30.2}),
                "aborted request: expected an end within 10 s, got 30.2 s",
            ),
            Alteration(
                check,
                "the aborted request ends without a word",
                put({"aborted": {"text": "", "tokens": 0, "finish": "", "chunk_seconds": []}}),
                "aborted request, finish reason: expected 'abort', got ''",
            ),
        )
    ],
    # chat
    Alteration(
        "chat/equals-native",
        "the template is applied twice",
        put({"whole": " quick", "whole_prompt_tokens": 61}),
        "prompt tokens: expected 42, got 61",
    ),
    Alteration(
        "chat/equals-native",
        "another answer than the native one",
        put({"whole": " quick"}),
        "text: expected ' fob-",
    ),
    Alteration(
        "chat/equals-native",
        "the stream loses its last piece",
        at(do=lambda e: e.update(streamed=e["streamed"][:-1])),
        "streamed text: expected ' fob-",
    ),
    Alteration(
        "chat/equals-native",
        "completion_tokens lies",
        put({"whole_completion_tokens": 13}),
        "completion tokens: expected 12, got 13",
    ),
    Alteration(
        "chat/equals-native",
        "the wrong finish reason",
        put({"finish": "stop"}),
        "finish reason: expected 'length', got 'stop'",
    ),
    Alteration(
        "chat/equals-native",
        "a stream that never says why it ends",
        put({"streamed_finish": ""}),
        "finish reason of the stream: expected 'length', got ''",
    ),
    Alteration(
        "chat/equals-native",
        "a stream of two events",
        put({"streamed_chunks": 2}),
        "events of the stream: expected at least 3 for 12 tokens, got 2",
    ),
    Alteration(
        "chat/completions-equal-native",
        "the prompt is echoed",
        at(do=lambda e: e.update(completion="The capital of France is" + e["completion"])),
        "got 'The capital of France is three",
    ),
    Alteration(
        "chat/completions-equal-native",
        "the prompt is taken for a chat",
        put({"completion_prompt_tokens": 37}),
        "prompt tokens: expected 18, got 37",
    ),
    Alteration(
        "chat/json-schema",
        "cut in the middle",
        at(do=lambda e: e.update(text=e["text"][:-4], finish="length")),
        "answer: expected JSON, got",
    ),
    Alteration(
        "chat/json-schema",
        "words around the JSON",
        at(do=lambda e: e.update(text="Here it is: " + e["text"])),
        "answer: expected JSON, got 'Here it is",
    ),
    Alteration(
        "chat/json-schema",
        "a value that the schema does not list",
        put({"text": '{"city": "Oslo", "certain": true, "stars": 2}'}),
        "'Oslo' is not one of ['Paris', 'Rome', 'Berlin']",
    ),
    Alteration(
        "chat/json-schema",
        "a field that is not there",
        put({"text": '{"city": "Rome", "certain": true}'}),
        "'stars' is a required property",
    ),
    Alteration(
        "chat/json-schema",
        "a field too many",
        put({"text": '{"city": "Rome", "certain": true, "stars": 2, "and": 1}'}),
        "Additional properties are not allowed",
    ),
    Alteration(
        "chat/json-schema",
        "whole, and said to be cut",
        put({"finish": "length"}),
        "finish reason: expected 'stop', got 'length'",
    ),
    Alteration("chat/json-schema", "no answer", put({"text": ""}), "expected JSON, got ''"),
    # control
    Alteration(
        "control/pause",
        "the generation goes on while paused",
        put({"chunks_at_pause": 3, "chunks_at_resume": 31}),
        "events while paused: expected 0, got 28",
    ),
    Alteration(
        "control/pause",
        "the paused generation is ended",
        put({"paused.finish": "abort", "paused.tokens": 4}),
        "tokens after continue: expected 48, got 4",
    ),
    Alteration(
        "control/pause",
        "the answer is another one after continue",
        at("paused", do=lambda p: p.update(text=p["text"].replace("ten", "two", 1))),
        "text after continue: expected",
    ),
    Alteration(
        "control/pause",
        "the right answer for the wrong reason",
        put({"paused.finish": "stop"}),
        "finish reason: expected 'length', got 'stop'",
    ),
    Alteration(
        "control/pause",
        "says ready while paused",
        put({"ready_while_paused": 200}),
        "/ready while paused: expected 503, got 200",
    ),
    Alteration(
        "control/pause",
        "is never ready again",
        put({"ready_after": 503}),
        "/ready after continue: expected 200, got 503",
    ),
    Alteration(
        "control/pause",
        "waits for the end instead of pausing",
        put({"chunks_at_pause": 48, "chunks_at_resume": 48}),
        "running when it was paused: expected True, got False",
    ),
    Alteration(
        "control/api-key",
        "no key is asked for",
        put({"without_key.POST /generate": 200}),
        "POST /generate, without a key: expected 401, got 200",
    ),
    Alteration(
        "control/api-key",
        "any key will do",
        put({"wrong_key.GET /model_info": 200}),
        "GET /model_info, wrong key: expected 401, got 200",
    ),
    Alteration(
        "control/api-key",
        "the right key is refused",
        put({"with_key": 401}),
        "with the key: expected 200, got 401",
    ),
    # weights
    Alteration(
        "weights/disk",
        "success, and nothing changed",
        nothing_changed,
        "checksums: expected all of 15 parameters changed, got unchanged: lm_head.weight",
    ),
    Alteration(
        "weights/disk",
        "success, and half of the tensors changed",
        half_changed,
        "got unchanged: model.layers.1.input_layernorm.weight",
    ),
    Alteration(
        "weights/disk",
        "the checksums changed, the old weights are served",
        put({"old_oracle_error": 2e-5}),
        "distance to the old reference model: expected more than 0.005",
    ),
    Alteration(
        "weights/disk",
        "a tensor loaded in a wrong layout",
        at("answers", 1, do=other_tokens),
        "new weights, 'Once upon a time, in a small village by the sea, there lived', token 0",
    ),
    Alteration(
        "weights/disk",
        "a log-probability off by a hundredth",
        off_by(0.01, "answers", 0, "served", 11),
        "new weights, 'The capital of France is', token 11 (",
    ),
    Alteration("weights/disk", "NaN was loaded", not_a_number, "got nan (off by nan"),
    Alteration(
        "weights/disk",
        "the update failed",
        put({"success": False}),
        "update: expected success, got ",
    ),
    Alteration(
        "weights/disk",
        "/model_info keeps the old label",
        put({"info_version": "default"}),
        "weight version in /model_info: expected 'harness-new', got 'default'",
    ),
    Alteration(
        "weights/disk",
        "answers carry the old label",
        put({"answer_version": "default"}),
        "weight version in answers: expected 'harness-new', got 'default'",
    ),
    Alteration(
        "weights/disk-restore",
        "one checksum is another after going back",
        put({"differing_checksums": ["model.norm.weight"]}),
        "checksums after going back: expected [], got ['model.norm.weight']",
    ),
    Alteration(
        "weights/disk-restore",
        "the update between changed nothing",
        put({"changed_by_update": 0}),
        "checksums after the update: expected changed ones, got none",
    ),
    Alteration(
        "weights/disk-restore",
        "a log-probability off by a hundredth after going back",
        off_by(0.01, "after", 1, "logprobs", 3),
        "answer 1, token 3 (167): expected log-probability",
    ),
    Alteration(
        "weights/disk-restore",
        "another answer than before",
        put({"after.0.ids.7": 5, "after.0.logprobs.7": -0.5}),
        "answer 0, token 7: expected token 253, got token 5",
    ),
    Alteration(
        "weights/disk-restore",
        "the label of the new weights stays",
        put({"info_after.weight_version": "harness-new"}),
        "weight_version: expected 'default', got 'harness-new'",
    ),
    Alteration(
        "weights/disk-restore",
        "the served name is the variant's",
        put({"info_after.served_model_name": "/exchange/variant"}),
        "served_model_name: expected '/models/tiny-2-seed0', got '/exchange/variant'",
    ),
    Alteration(
        "weights/stale-prefix",
        "the old prefix is served after the update",
        stale,
        "cached tokens after the update: expected 0, got 87",
    ),
    Alteration(
        "weights/stale-prefix",
        "the old prefix is served, and not counted as cached",
        at(do=lambda e: (stale(e), e["flushed"].update(cached_tokens=0))),
        "after the update, token 0: expected token 359",
    ),
    Alteration(
        "weights/stale-prefix",
        "only the log-probabilities are stale",
        off_by(0.01, "flushed", "served", 0),
        "after the update, token 0 (359): expected log-probability",
    ),
    Alteration(
        "weights/stale-prefix",
        "nothing was ever cached",
        put({"warmed_cached_tokens": 0}),
        "the same prompt again: expected cached tokens, got none",
    ),
    Alteration(
        "weights/stale-prefix",
        "a control that gives nothing away",
        control_unseen,
        "the control, answered from a stale prefix",
    ),
    Alteration(
        "weights/disk-missing-path",
        "a missing path is answered 200",
        put({"status": 200, "reason": "success False: no such folder"}),
        "answer: expected a refusal (4xx), got 200 success False: no such folder",
    ),
    Alteration(
        "weights/disk-missing-path",
        "a missing path is called the server's own fault",
        put({"status": 500, "reason": "Internal Server Error"}),
        "answer: expected a refusal (4xx), got 500 Internal Server Error",
    ),
    Alteration(
        "weights/disk-missing-path",
        "refused, and half loaded",
        put({"differing_checksums": ["lm_head.weight"]}),
        "checksums: expected [], got ['lm_head.weight']",
    ),
    Alteration(
        "weights/disk-missing-path",
        "refused, and the missing path is the model's from now on",
        put({"model_path_after": "/exchange/there-is-no-such-folder"}),
        "model_path: expected '/models/tiny-2-seed0', got '/exchange/there-is-no-such-folder'",
    ),
    Alteration(
        "weights/disk-missing-path",
        "refused, and answers differ",
        put({"after.ids.2": 1, "after.logprobs.2": -0.5}),
        "answer afterwards, token 2: expected token 166, got token 1",
    ),
    Alteration(
        "weights/disk-missing-path",
        "refused, and a log-probability is off by a hundredth",
        off_by(0.01, "after", "logprobs", 7),
        "answer afterwards, token 7 (253): expected log-probability",
    ),
    # memory
    Alteration(
        "memory/snapshots",
        "reads another process, where nothing is loaded",
        read_as({"ready": 40 * MIB, "started": 40 * MIB}),
        "expected at least the weights more, 2 MiB, got 0 MiB more",
    ),
    Alteration(
        "memory/snapshots",
        "nothing is read at all",
        put({"sources": [], "readings": []}),
        "expected at least the weights more",
    ),
    Alteration(
        "memory/updates-do-not-grow",
        "every checkpoint is kept",
        too_many_kept,
        "container memory after 8 pushes: expected at most 1024 MiB more",
    ),
    Alteration(
        "memory/updates-do-not-grow",
        "a tenth of every checkpoint is kept",
        half_kept,
        "(+2048 MiB)",
    ),
    Alteration(
        "memory/device-given-back",
        "a GPU keeps the weights",
        put({"after.GPU-2": 9000 * MIB}),
        "GPU GPU-2: expected at most 64 MiB within 30 s, got 9000 MiB",
    ),
    Alteration(
        "memory/device-given-back",
        "a context stays on one of two GPUs",
        put({"after.GPU-1": 1020 * MIB}),
        "GPU GPU-1: expected at most 664 MiB within 30 s, got 1020 MiB",
    ),
    # hostile
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the request kills the server",
        put({"death": "The server ended (exit code 137).", "status": None, "after": None}),
        "the server: expected to stay up, got The server ended (exit code 137).",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the request is answered as if it were right",
        put({"status": 200, "reason": ""}),
        "answer: expected a refusal (4xx), got 200",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the request is never answered",
        put({"status": None, "reason": "no answer within 20 s"}),
        "answer: expected a refusal (4xx), got None no answer within 20 s",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the server lives on and answers other tokens",
        put({"after.ids.0": 3, "after.logprobs.0": -0.5}),
        "answer afterwards, token 0: expected token 177, got token 3",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the server lives on and scores otherwise",
        off_by(0.01, "after", "logprobs", 5),
        "answer afterwards, token 5 (154): expected log-probability",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the server lives on and answers nothing any more",
        put({"after": None}),
        "answer afterwards: expected one, got none",
    ),
    Alteration(
        "hostile/out-of-vocabulary-ids",
        "the server lives on and its answers are cut short",
        at("after", do=lambda t: (t["ids"].pop(), t["logprobs"].pop())),
        "answer afterwards: expected 6 tokens, got 5 tokens",
    ),
    # the end
    Alteration(
        "launch/stop",
        "killed in the end",
        put({"exit_code": 137}),
        "exit code: expected 0, got 137",
    ),
    Alteration(
        "launch/stop",
        "shared memory left behind",
        put({"left_behind": ["/dev/shm/psm_1f2e"]}),
        "left behind: expected [], got ['/dev/shm/psm_1f2e']",
    ),
    Alteration(
        "launch/stop",
        "later than the limit",
        put({"seconds": 31.0}),
        "end: expected within 30 s, got 31.0 s",
    ),
]

LIES += [Alteration(*lie) for lie in own_servers.LIES]

# --- what a right server may also do ----------------------------------------------------------


def near_tie(evidence: dict[str, Any]) -> None:
    """Another token than the oracle's, as probable as it within the tolerance."""
    answer = evidence["answers"][0]
    answer["output_ids"][4] += 1
    answer["oracle"][4] = answer["best"][4] - 1.5 * answer["tolerance"]


def tie_turned_by_the_batch(evidence: dict[str, Any]) -> None:
    """Equally probable tokens change places, and from there on the answers go apart."""
    got = evidence["got"][1]
    got["ids"][5:] = [9, 8, 7]
    got["logprobs"][5] += 4e-4
    got["logprobs"][6:] = [-0.1, -7.0]
    got["text"] = "another end"


def half_a_character(evidence: dict[str, Any]) -> None:
    """An event ends within a character of several bytes; the next one completes it."""
    texts = evidence["chunk_texts"]
    whole = texts[-1]
    put({"whole.text": whole + "é", "chunk_texts": [*texts[:-1], whole + "\ufffd", whole + "é"]})(
        evidence
    )


def leaves_out_the_stop_token(evidence: dict[str, Any]) -> None:
    evidence["at_id"]["answer"]["ids"].pop()


def noisy_allocator(evidence: dict[str, Any]) -> None:
    evidence["used_bytes"] = [n + (i % 3) * 9 * MIB for i, n in enumerate(evidence["used_bytes"])]


def settles_then_stays(evidence: dict[str, Any]) -> None:
    """The first push allocates a buffer as large as the weights, once."""
    before, weights = evidence["used_bytes"][0], 4 * 1024 * MIB
    put({"weights_bytes": weights, "used_bytes": [before, *[before + weights] * 8]})(evidence)


HARMLESS = [
    # A bound that is met exactly is kept.
    Alteration("launch/stop", "the last moment", put({"seconds": 30.0, "limit": 30.0})),
    Alteration("stop/abort", "the last moment", put({"seconds_to_end": 10.0})),
    Alteration("memory/device-given-back", "as much as is allowed", put({"after.GPU-2": 64 * MIB})),
    Alteration(
        "memory/updates-do-not-grow",
        "as much as is allowed",
        put({"used_bytes": [500 * MIB] * 6 + [532 * MIB] * 3}),
    ),
    Alteration("generate/greedy-tokens", "a near tie goes the other way", near_tie),
    Alteration("generate/batch-equals-single", "a near tie turns", tie_turned_by_the_batch),
    Alteration("generate/stream-equals-whole", "events carry only what is new", as_increments),
    Alteration("generate/stream-equals-whole", "half of a character", half_a_character),
    Alteration("generate/stream-equals-whole", "few events", in_events(3)),
    Alteration("generate/32-at-once", "a prefix was cached", put({"answers.0.cached_tokens": 30})),
    Alteration("stop/conditions", "the stop token is left out", leaves_out_the_stop_token),
    Alteration(
        "stop/conditions", "the end of sequence is left out", put({"at_eos.answer.ids": []})
    ),
    Alteration(
        "weights/disk",
        "a computed buffer stays as it is",
        at(
            do=lambda e: [
                e[k].append("model.layers.0.self_attn.rotary_emb.cos_sin_cache")
                for k in ("parameters", "unchanged")
            ]
        ),
    ),
    Alteration(
        "launch/server-info",
        "a flag without a field of its own",
        put({"asked.tp": 1, "info.tp": None}),
    ),
    Alteration("launch/server-info", "a number as a text", put({"info.max-total-tokens": "4096"})),
    Alteration("launch/readiness", "it stays ready", put({"afterwards": {"200": 39}})),
    Alteration(
        "launch/readiness",
        "an older server without /ready",
        at(
            do=lambda e: (
                e.update(ready_by="/health"),
                [s.update(route="/health") for s in e["sightings"] if s["answer"] != "refused"],
            )
        ),
    ),
    Alteration(
        "launch/server-info", "a number as it was typed", put({"asked.mem-fraction-static": ".1"})
    ),
    Alteration("memory/updates-do-not-grow", "noise of an allocator", noisy_allocator),
    Alteration(
        "memory/device-given-back",
        "less is in use than before, and a GPU is new",
        put({"after": {"GPU-1": 0, "GPU-2": 0, "GPU-3": 800 * MIB}}),
    ),
    Alteration("memory/updates-do-not-grow", "one buffer that is kept", settles_then_stays),
    Alteration(
        "memory/snapshots",
        "host memory beside the GPU's, and smaller than the weights",
        at(
            do=lambda e: (
                e["sources"].append("host"),
                e["readings"].extend(
                    {**r, "source": "host", "used_bytes": 1} for r in [*e["readings"]]
                ),
            )
        ),
    ),
]

for route in ROUTES:
    LIES += [
        Alteration(
            route,
            "the way there failed",
            put({"there.outcome": "failed", "there.reason": "bucket 1: no memory", "back": None}),
            "the way there: expected a good push, got failed: bucket 1: no memory",
        ),
        Alteration(
            route,
            "one witness of two said nothing",
            put({"back.outcome": "unproven", "back.reason": "checksums: not known"}),
            "the way back: expected a good push, got unproven",
        ),
        Alteration(
            route, "nothing changed", put({"changed": 0}), "the way there: expected changed"
        ),
        Alteration(
            route,
            "one parameter is not what disk makes of it",
            put({"unlike_disk": ["model.norm.weight"]}),
            "checksums unlike those from disk: expected [], got ['model.norm.weight']",
        ),
        Alteration(
            route,
            "one parameter does not come back",
            put({"unlike_before": ["lm_head.weight"]}),
            "checksums after the way back: expected [], got ['lm_head.weight']",
        ),
        Alteration(
            route,
            "another answer than before",
            off_by(0.01, "after", 1, "logprobs", 3),
            "answer 1, token 3",
        ),
    ]


HARMLESS += [Alteration(*oddity) for oddity in own_servers.HARMLESS]
for told in (release_evidence, push_evidence):
    LIES += [Alteration(t.check, t.name, put(t.values), t.piece) for t in told.LIES]
    HARMLESS += [Alteration(t.check, t.name, put(t.values)) for t in told.HARMLESS]


# --- the tests --------------------------------------------------------------------------------


def test_the_recorded_run_answers_every_check_that_its_server_could_be_asked():
    # Where there is no evidence there has to be an observation by hand.
    assert set(CHECKS) - set(EVIDENCE) <= set(BY_HAND)
    assert set(EVIDENCE) <= set(CHECKS)
    assert sorted(KNOWN) == ["hostile/out-of-vocabulary-ids", "stop/abort-whole-id"]


@pytest.mark.parametrize("check_id", CHECKS)
def test_what_a_right_server_does_is_accepted(check_id):
    assert judged(check_id, good(check_id)) == []


@pytest.mark.parametrize("check_id", KNOWN)
def test_a_recorded_defect_is_refused_with_what_was_recorded_of_it(check_id):
    recorded = next(c for c in RECORDED.checks if c.id == check_id)
    assert recorded.evidence is not None
    message = "; ".join(map(str, judged(check_id, EVIDENCE[check_id])))
    assert message
    # The wording may change; how the server ended is a fact.
    assert str(recorded.evidence.get("death", "")) in message


@pytest.mark.parametrize("lie", named(LIES))
def test_a_lie_is_refused_and_the_message_says_what_it_is(lie):
    messages = [str(m) for m in judged(lie.check, lie.altered())]
    assert any(lie.piece in message for message in messages), messages


@pytest.mark.parametrize("oddity", named(HARMLESS))
def test_what_a_right_server_may_also_do_is_accepted(oddity):
    altered = oddity.altered()
    assert altered != good(oddity.check)
    assert judged(oddity.check, altered) == []


@pytest.mark.parametrize("check_id", CHECKS)
def test_every_check_is_shown_at_least_two_lies(check_id):
    # A check that can't fail is a defect: whoever adds a check adds what it must refuse.
    assert len([lie for lie in LIES if lie.check == check_id]) >= 2


def test_no_two_lies_are_the_same():
    told = [(lie.check, lie.name) for lie in LIES + HARMLESS]
    assert len(set(told)) == len(told)
    seen = [(lie.check, repr(lie.altered())) for lie in LIES + HARMLESS]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("check_id", CHECKS)
def test_judging_is_pure(check_id):
    lies = [lie.altered() for lie in LIES if lie.check == check_id]
    for evidence in [good(check_id), *lies]:
        seen = observed(check_id, evidence)
        before = repr(seen)
        first = CHECKS[check_id].judge(seen)
        assert repr(seen) == before
        assert CHECKS[check_id].judge(seen) == first


@pytest.mark.parametrize("check_id", CHECKS)
def test_what_is_written_down_is_judged_as_what_was_seen(check_id):
    # A file holds no NaN and no halves of characters; what it holds must be judged alike.
    for evidence in [good(check_id), *(x.altered() for x in LIES if x.check == check_id)]:
        seen = observed(check_id, evidence)
        written = json.dumps(writable(seen.model_dump()), allow_nan=False)
        read = observed(check_id, json.loads(written))
        assert CHECKS[check_id].judge(read) == CHECKS[check_id].judge(seen)


@pytest.mark.parametrize("check_id", CHECKS)
def test_figures_of_a_right_server_are_numbers(check_id):
    seen = observed(check_id, good(check_id))
    for figure in CHECKS[check_id].figures(seen):
        assert math.isfinite(figure.value)
        assert figure.value >= 0


# --- odd observations -------------------------------------------------------------------------

ODD: tuple[Any, ...] = (0, -1, 10**9, 0.5, math.nan, math.inf, True, "", "other", None, [], {})

#: Lists that hold one value a token, or one entry an answer, beside other such lists. ``observe``
#: makes them equally long; emptied alone they mean nothing. Together they are, further down.
PARALLEL = {*PER_TOKEN, "logprobs", "labels", "before", "after"}

#: Places that hold what the check asked, not what the server said: ``observe`` makes them fit.
OWN_QUESTION = {
    "sample/follows-oracle": ("likely_probability",),
    "stop/conditions": ("stop_string", "stop_id", "whole.text", "whole.ids"),
    "chat/json-schema": ("json_schema*",),
    "weights/disk": ("answers",),
    "memory/updates-do-not-grow": ("used_bytes", "push_seconds"),
}


def is_own_question(check_id: str, way: tuple[str | int, ...]) -> bool:
    place = ".".join(map(str, way))
    return any(fnmatch(place, pattern) for pattern in OWN_QUESTION.get(check_id, ()))


def places(value: Any, way: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place within evidence; of a list the first and the last stand for all."""
    if way:
        yield way
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*way, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from places(value[index], (*way, index))


@pytest.mark.parametrize("check_id", CHECKS)
def test_no_odd_value_anywhere_makes_a_judge_raise(check_id):
    check, asked = CHECKS[check_id], 0
    for way in places(good(check_id)):
        if is_own_question(check_id, way):
            continue
        for odd in ODD:
            if odd == [] and way[-1] in PARALLEL:
                continue
            evidence = good(check_id)
            at(*way[:-1], do=lambda inner, w=way, o=odd: inner.__setitem__(w[-1], o))(evidence)
            try:
                seen = observed(check_id, evidence)
            except ValidationError:
                continue
            asked += 1
            check.judge(seen)
            check.figures(seen)
    assert asked


def without_tokens(value: Any) -> Iterator[dict[str, Any]]:
    """Every answer in evidence, to be emptied of its tokens."""
    if isinstance(value, dict):
        if "output_ids" in value or {"ids", "logprobs"} <= value.keys():
            yield value
        for inner in value.values():
            yield from without_tokens(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from without_tokens(inner)


def empty(answer: dict[str, Any]) -> None:
    for key in (*PER_TOKEN, "ids", "logprobs"):
        if key in answer:
            answer[key] = []


WITH_ANSWERS = [i for i in CHECKS if i != "stop/conditions" and any(without_tokens(good(i)))]


@pytest.mark.parametrize("check_id", WITH_ANSWERS)
def test_an_answer_without_a_token_makes_no_judge_raise(check_id):
    check = CHECKS[check_id]
    for number in range(len(list(without_tokens(good(check_id))))):
        evidence = good(check_id)
        empty(list(without_tokens(evidence))[number])
        check.judge(observed(check_id, evidence))
    evidence = good(check_id)
    for answer in without_tokens(evidence):
        empty(answer)
    check.figures(observed(check_id, evidence))
    check.judge(observed(check_id, evidence))
