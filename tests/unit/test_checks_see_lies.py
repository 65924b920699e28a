"""Does each check see a server that lies? Here ``observe`` asks a server, and ``run_check`` judges.

``test_judges.py`` alters evidence. That proves nothing where no ``observe`` could ever have seen
such evidence, so here it is the server that does one thing wrong; the same check passes on the
same server when it does everything right.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scripted_server import Answer, ScriptedServer

from sglang_harness import suite
from sglang_harness.server.readiness import wait_until_ready
from sglang_harness.suite import run_check
from sglang_harness.suite.checks import launch
from sglang_harness.suite.checks.memory.readings import least_bytes
from sglang_harness.suite.lib import streams
from sglang_harness.verdict import CheckResult, Outcome

pytest.importorskip("torch")
pytest.importorskip("transformers")

from model_server import ModelServer

from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.made.perturb import perturbed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    tiny.write(path, 0)
    return path


@pytest.fixture
def double(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setattr(launch, "STAYS_READY", 0.4)
    monkeypatch.setattr(streams, "ENDS_WITHIN", 8.0)
    with ModelServer(model) as double:
        yield double


def result_of(check_id: str, double: ModelServer, scratch: Path) -> CheckResult:
    return run_check(suite.registered()[check_id], double.context(scratch))[0]


Setup = Callable[[ModelServer], object]


class Lie(NamedTuple):
    check: str
    name: str
    """What the server does wrong."""
    tell: Setup
    piece: str
    """What the message has to say."""


def lie(**lies: Callable[[Any], Any]) -> Setup:
    """Values that go through the double are altered, by their name."""
    return lambda double: double.lies.update(lies)


def always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Sampling parameters that the server ignores."""
    return lambda sampling: {k: v for k, v in sampling.items() if k not in names}


def first_then(number: int, first: Any, then: Any) -> Callable[[Any], Any]:
    """``first`` the first ``number`` times, ``then`` for ever."""
    given = iter([first] * number)
    return lambda _: next(given, then)


def off(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(value + 0.01 for value in values)


def takes_back(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The sixth event has lost the text of those before it."""
    for number, each in enumerate(events):
        yield {**each, "text": each["text"][3:]} if number == 5 else each


def all_at_the_end(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield list(events)[-1]


def without_the_last(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from list(events)[:-1]


def by_prefix(_: Any) -> Callable[[str, set[str]], bool]:
    return lambda one, aborted: any(one.startswith(each) for each in aborted if each)


def never_aborted(_: Any) -> Callable[[str, set[str]], bool]:
    return lambda one, aborted: False


def keeps_its_weights(double: ModelServer) -> None:
    double.lies["loaded"] = always(double.first)


def does_not_go_back(double: ModelServer) -> None:
    double.lies["loaded"] = lambda path: double.folder if path == double.first else path


def dies_of_it(double: ModelServer) -> None:
    def attacked(_: Answer) -> Answer:
        double.mortal.die()
        return Answer(500, {"error": {"message": "scheduler"}})

    double.lies["attacked"] = attacked


def reads_another_process(double: ModelServer) -> None:
    double.server.memory.readings = [
        each.model_copy(update={"used_bytes": 500 << 20}) for each in double.server.memory.readings
    ]


def draws_its_own_seeds(double: ModelServer) -> None:
    seeds = count()
    double.lies["sampling"] = lambda sampling: {**sampling, "sampling_seed": next(seeds)}


def refuses_and_loads(double: ModelServer) -> None:
    other = perturbed(double.first, double.first.parent / "other", 1)

    def broken(refusal: Answer) -> Answer:
        double.folder = other
        return refusal

    double.lies["broken"] = broken


def refuses_and_relabels(double: ModelServer) -> None:
    def broken(refusal: Answer) -> Answer:
        double.version = "harness-refused"
        return refusal

    double.lies["broken"] = broken


def writes_while_it_is_used(double: ModelServer) -> None:
    double.log_lines = ["Traceback (most recent call last):"]


def cuts_the_end(text: str) -> str:
    return text[:-1]


LIES = [
    Lie(
        "launch/readiness",
        "takes it back a tenth of a second after the first look",
        lie(ready=first_then(3, 200, 503)),
        "/ready afterwards: expected 200 every time, got 200 x 3, 503 x ",
    ),
    Lie(
        "launch/log",
        "writes a traceback while it is used",
        writes_while_it_is_used,
        "log: expected no traceback, got Traceback",
    ),
    Lie(
        "generate/greedy-tokens",
        "one improbable token",
        lie(token=lambda token: (token + 1) % 300),
        "token 3: expected token",
    ),
    Lie(
        "generate/greedy-tokens",
        "miscounts",
        lie(completion_tokens=lambda n: n + 1),
        "completion_tokens 16, as many as came, got 17",
    ),
    Lie(
        "generate/greedy-tokens",
        "stops early",
        lie(sampling=lambda sampling: {**sampling, "max_new_tokens": 15}),
        "expected 16 tokens, got 15",
    ),
    Lie("generate/logprobs", "scores a hundredth off", lie(logprobs=off), "off by 0.01"),
    Lie(
        "generate/batch-equals-single",
        "swaps two answers of a batch",
        lie(batch=lambda ids: [ids[1], ids[0], *ids[2:]]),
        "The capital of France is, token 0",
    ),
    Lie(
        "generate/ids-equal-text",
        "puts a token before every text",
        lie(encoded=lambda ids: [0, *ids]),
        "The capital of France is, token 0",
    ),
    Lie(
        "generate/stream-equals-whole",
        "takes text back",
        lie(events=takes_back),
        "event 5: expected text that begins",
    ),
    Lie(
        "generate/stream-equals-whole",
        "holds everything back until the end",
        lie(events=all_at_the_end),
        "events: expected at least 3 for 24 tokens, got 1",
    ),
    Lie(
        "generate/stream-equals-whole",
        "loses the last event",
        lie(events=without_the_last),
        "finish reason: expected 'length', got ''",
    ),
    Lie(
        "generate/32-at-once",
        "one improbable token",
        lie(token=lambda token: (token + 1) % 300),
        "token 3: expected token",
    ),
    Lie(
        "sample/follows-oracle",
        "ignores the temperature",
        lie(sampling=lambda sampling: {**sampling, "temperature": 0.0}),
        "got 96",
    ),
    Lie("sample/follows-oracle", "ignores top_k", lie(sampling=without("top_k")), "top_k 1"),
    Lie(
        "sample/seed-repeats",
        "ignores the seed",
        draws_its_own_seeds,
        "the same seed again",
    ),
    Lie("stop/conditions", "ignores stop strings", lie(sampling=without("stop")), "stop string"),
    Lie(
        "stop/conditions",
        "ignores stop tokens",
        lie(sampling=without("stop_token_ids")),
        "stop token, finish: expected 'stop', got 'length'",
    ),
    Lie(
        "stop/conditions",
        "ends at an end of sequence that is to be ignored",
        lie(sampling=lambda sampling: {**sampling, "ignore_eos": False}),
        "ignored end of sequence",
    ),
    Lie("stop/abort", "aborts nothing", lie(aborts=never_aborted), "expected 'abort', got"),
    Lie(
        "stop/abort-whole-id",
        "aborts by what an id begins with",
        lie(aborts=by_prefix),
        "neighbour, finish reason: expected 'length', got 'abort'",
    ),
    Lie(
        "chat/equals-native",
        "applies the template twice",
        lie(rendered=lambda text: text + text),
        "prompt tokens: expected",
    ),
    Lie(
        "chat/equals-native",
        "loses the end of a stream",
        lie(deltas=lambda deltas: deltas[:-1]),
        "streamed text",
    ),
    Lie(
        "chat/completions-equal-native",
        "echoes the prompt",
        lie(completion=lambda text: "The capital of France is" + text),
        "text: expected",
    ),
    Lie("chat/json-schema", "is cut short", lie(bound=cuts_the_end), "answer: expected JSON"),
    Lie("control/pause", "goes on while paused", lie(pauses=always(False)), "events while paused"),
    Lie(
        "control/pause",
        "says ready while paused",
        lie(ready=always(200)),
        "/ready while paused: expected 503, got 200",
    ),
    Lie(
        "control/pause",
        "does not continue",
        lie(continues=always(False)),
        "finish reason: expected 'length', got 'still running'",
    ),
    Lie(
        "control/api-key",
        "needs no key",
        lie(allowed=always(True)),
        "POST /generate, without a key: expected 401, got 200",
    ),
    Lie("weights/disk", "says success and loads nothing", keeps_its_weights, "unchanged: lm_head"),
    Lie(
        "weights/disk",
        "refuses what it should load",
        lie(refuses=first_then(1, "a wrong shape", None)),
        "update: expected success, got 400 a wrong shape",
    ),
    Lie(
        "memory/colocated-order",
        "refuses the push",
        lie(refuses=first_then(1, "a wrong shape", None)),
        "push: expected success, got 400 a wrong shape",
    ),
    Lie(
        "memory/snapshots",
        "loads into another process",
        reads_another_process,
        "from 'started' to 'ready': expected at least",
    ),
    Lie(
        "weights/disk",
        "keeps the old label",
        lie(new_label=always("default")),
        "weight version in answers: expected 'harness-new', got 'default'",
    ),
    Lie("weights/disk-restore", "does not go back", does_not_go_back, "checksums after going back"),
    Lie(
        "weights/stale-prefix",
        "keeps the prefix cache",
        lie(flushes=always(False)),
        "cached tokens after the update: expected 0",
    ),
    Lie(
        "weights/disk-missing-path",
        "answers 200",
        lie(refusal=always(Answer(200, {"success": False, "message": "no such path"}))),
        "answer: expected a refusal (4xx), got 200",
    ),
    Lie(
        "memory/updates-do-not-grow",
        "keeps every checkpoint",
        lie(kept=always(64 << 20)),
        "memory after 8 pushes",
    ),
    Lie(
        "memory/release-without-saver",
        "frees memory all the same",
        lie(freed=always(200 << 20)),
        "200 MiB were freed",
    ),
    Lie(
        "hostile/out-of-vocabulary-ids",
        "answers such a request",
        lie(attacked=always(None)),
        "answer: expected a refusal (4xx), got 200",
    ),
    Lie(
        "hostile/weights-truncated-file",
        "answers success",
        lie(broken=always(Answer(body={"success": True, "message": ""}))),
        "answer: expected a refusal (4xx), got 200 success True",
    ),
    Lie(
        "hostile/weights-truncated-file",
        "refuses, and serves the half that it has read",
        refuses_and_loads,
        "checksums that changed: expected [], got ['lm_head.weight'",
    ),
    Lie(
        "hostile/weights-truncated-file",
        "refuses, and moves the label on",
        refuses_and_relabels,
        "weight version: expected 'default', got 'harness-refused'",
    ),
    Lie("hostile/out-of-vocabulary-ids", "dies of it", dies_of_it, "expected to stay up, got"),
]
#: Of tokens that are sent while something else is done to the server.
SLOW = {"stop/abort": 0.01, "stop/abort-whole-id": 0.01, "control/pause": 0.05}


@pytest.mark.parametrize("check_id", dict.fromkeys(each.check for each in LIES))
def test_a_right_server_passes(check_id: str, double: ModelServer, tmp_path: Path) -> None:
    double.step_seconds = SLOW.get(check_id, 0.0)
    result = result_of(check_id, double, tmp_path)
    assert result.outcome is Outcome.PASS, result.message


@pytest.mark.parametrize("told", LIES, ids=lambda told: f"{told.check}: {told.name}")
def test_a_server_that_lies_fails(told: Lie, double: ModelServer, tmp_path: Path) -> None:
    double.step_seconds = SLOW.get(told.check, 0.0)
    told.tell(double)
    result = result_of(told.check, double, tmp_path)
    assert result.outcome is Outcome.FAIL, result.message
    assert told.piece in result.message


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_log_is_read_when_the_other_checks_have_used_the_server(profile: str) -> None:
    """Read before, it held nothing but the start, and no server could fail."""
    chosen = [c for c in suite.select(profile, []) if not (c.own_server or c.after_stop)]
    ids = [check.id for check in chosen]
    assert ids[ids.index("launch/log") + 1 :] == ["weights/disk-missing-path"], (
        "only what asks for something wrong comes later"
    )


PROVOKED = [
    "[2026-11-28 00:30:02] check_weights see error: Torch not compiled with CUDA enabled",
    "Traceback (most recent call last):",
    '  File "weight_checker.py", line 125, in _compute_checksum',
    "AssertionError: Torch not compiled with CUDA enabled",
]


@pytest.mark.parametrize("more", [False, True], ids=["alone", "beside another"])
def test_the_traceback_of_the_harness_own_question_is_not_laid_at_the_servers_door(
    double: ModelServer, tmp_path: Path, more: bool
) -> None:
    """Whether checksums can be computed has to be tried (0.5.20 to 0.5.22 cannot on a CPU)."""
    double.log += PROVOKED
    if more:
        double.log += ["POST /generate", "Traceback (most recent call last):"]
    result = result_of("launch/log", double, tmp_path)
    assert result.outcome is (Outcome.FAIL if more else Outcome.PASS), result.message


# --- how a start is seen ----------------------------------------------------------------------

TOKENS = {
    "text": "a b",
    "output_ids": [5, 6],
    "meta_info": {
        "id": "1",
        "finish_reason": {"type": "length"},
        "prompt_tokens": 3,
        "completion_tokens": 2,
    },
}
#: A server that starts as SGLang 0.5.23 does.
STARTS: dict[str, Any] = {
    "GET /ready": [Answer(503, ""), Answer(200, "")],
    "POST /generate": Answer(body=TOKENS),
}


def started(double: ModelServer, script: dict[str, Any]) -> None:
    """The double has come up as ``script`` says."""
    with ScriptedServer({**STARTS, **script}) as server:
        double.server.report = wait_until_ready(
            server.url, api_key=None, watch=double.mortal.watch, limit=20.0
        )


def test_a_start_as_it_should_be_is_accepted(double: ModelServer, tmp_path: Path) -> None:
    started(double, {})
    for check in ("launch/readiness", "launch/phases"):
        result = result_of(check, double, tmp_path)
        assert result.outcome is Outcome.PASS, result.message


@pytest.mark.parametrize(
    ("check", "script", "piece"),
    [
        (
            "launch/readiness",
            {"GET /ready": Answer(200, "")},
            "/ready: expected a refusal before the first 200, got ['200']",
        ),
        (
            "launch/readiness",
            {"POST /generate": [Answer(503, {"error": "loading"}), Answer(body=TOKENS)]},
            "generation after /ready: expected an answer, got 503",
        ),
        (
            "launch/readiness",
            {"POST /generate": [Answer(ending="silence"), Answer(body=TOKENS)]},
            "generation after /ready: expected an answer, got refused",
        ),
        (
            "launch/phases",
            {"POST /generate": Answer(body={**TOKENS, "output_ids": [5]})},
            "tokens of the first generation: expected 2, got 1",
        ),
    ],
    ids=["never refused", "ready and refuses to generate", "hangs up", "a token too few"],
)
def test_a_start_that_is_not_is_refused(
    check: str, script: dict[str, Any], piece: str, double: ModelServer, tmp_path: Path
) -> None:
    started(double, script)
    result = result_of(check, double, tmp_path)
    assert result.outcome is Outcome.FAIL
    assert piece in result.message


@pytest.mark.parametrize(
    ("asked", "stated", "right"),
    [
        (".8", 0.8, True),
        ("1", 1.0, True),
        ("4096", 4096, True),
        (0.1, 0.1, True),
        ("bfloat16", "bfloat16", True),
        (True, True, True),
        ("True", True, True),
        ("q_proj", ["q_proj"], True),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"], True),
        (["1", "2.50"], [1, 2.5], True),
        ('{"a": 1}', {"a": 1}, True),
        ('{"a":1}', '{"a": 1}', True),
        (".8", 0.9, False),
        ("1", 2.0, False),
        ("x", 1.0, False),
        (True, False, False),
        ("false", True, False),
        (["q_proj"], ["q_proj", "v_proj"], False),
        ('{"a": 1}', {"a": 2}, False),
    ],
)
def test_a_flag_is_compared_by_what_it_means_and_not_as_text(
    model: Path, tmp_path: Path, asked: Any, stated: Any, right: bool
) -> None:
    with ModelServer(model, arguments={"the-flag": asked}, info={"the_flag": stated}) as double:
        result = result_of("launch/server-info", double, tmp_path)
    assert result.outcome is (Outcome.PASS if right else Outcome.FAIL), result.message


# --- the least memory of weights ------------------------------------------------------------------


def test_a_folder_with_the_weights_in_two_formats_holds_them_once(
    model: Path, tmp_path: Path
) -> None:
    size = (model / "model.safetensors").stat().st_size
    both = tmp_path / "both"
    shutil.copytree(model, both)
    (both / "pytorch_model.bin").write_bytes(bytes(size))
    with ModelServer(both) as double:
        result = result_of("memory/snapshots", double, tmp_path)
        assert result.outcome is Outcome.PASS, result.message
        assert 0.9 * size < result.evidence["weights_bytes"] <= size  # type: ignore[index]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "half"])
def test_a_float32_checkpoint_needs_half_in_a_server_of_16_bits(
    dtype: str, model: Path, tmp_path: Path
) -> None:
    with ModelServer(model, info={"dtype": dtype}) as double:
        whole = least_bytes(model, {"dtype": "float32"})
        double.server.memory.readings = [
            each.model_copy(update={"used_bytes": (whole // 2 if each.mark == "ready" else 0)})
            for each in double.server.memory.readings
        ]
        result = result_of("memory/snapshots", double, tmp_path)
        assert result.outcome is Outcome.PASS, result.message
        double.server.memory.readings = [
            each.model_copy(update={"used_bytes": (whole // 3 if each.mark == "ready" else 0)})
            for each in double.server.memory.readings
        ]
        assert result_of("memory/snapshots", double, tmp_path).outcome is Outcome.FAIL


def test_tied_embeddings_and_offloaded_weights_are_not_counted(tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    tiny.write(tied, 0, "qwen2")
    whole = least_bytes(tied, {"dtype": "float32"})
    assert whole == (tied / "model.safetensors").stat().st_size - _header(tied)
    assert least_bytes(tied, {"dtype": "float32", "quantization": "fp8"}) <= whole / 4
    assert least_bytes(tied, {"dtype": "float32", "cpu_offload_gb": 1}) == 0
    assert least_bytes(None, {}) == 0


def _header(folder: Path) -> int:
    with (folder / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# --- siblings: right servers that are started otherwise ------------------------------------------


def in_two_events(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    whole = list(events)
    yield from (whole[len(whole) // 2 - 1], whole[-1])


def test_a_server_that_is_told_to_stream_seldom_may(model: Path, tmp_path: Path) -> None:
    with ModelServer(model, info={"stream_interval": 12}) as double:
        double.lies["events"] = in_two_events
        result = result_of("generate/stream-equals-whole", double, tmp_path)
        assert result.outcome is Outcome.PASS, result.message


def test_a_cache_of_large_pages_is_asked_for_more_than_one_page(
    model: Path, tmp_path: Path
) -> None:
    with ModelServer(model, info={"page_size": 256}) as double:
        result = result_of("weights/stale-prefix", double, tmp_path)
        assert result.outcome is Outcome.PASS, result.message
        assert len(result.evidence["flushed"]["prompt_ids"]) >= 512  # type: ignore[index]
