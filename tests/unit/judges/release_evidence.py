"""What the checks of releases see of right servers, written by hand: no GPU was at hand to record
one. Beside it lies, each one thing that a broken server would do, as values at places."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

MIB = 1 << 20
GIB = 1 << 30
MB = 1_000_000

#: A server with 2 GiB of weights and 20 GiB of KV cache on each of two GPUs.
HELD = {"weights": 2 * GIB, "kv_cache": 20 * GIB}


def _gpus(gib: float, more: int = 0) -> dict[str, int]:
    return {"GPU-1": int(gib * GIB) + more, "GPU-2": int(gib * GIB)}


def _released(tags: list[str]) -> dict[str, Any]:
    said = sum(HELD[tag] for tag in tags)
    return {
        "tags": tags,
        "said": said,
        "before": _gpus(23.5),
        "released": _gpus(23.5 - said / GIB),
        "resumed": _gpus(23.5, 2 * MIB),
        "seconds_to_free": 0.2,
    }


def evidence(recorded: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Good evidence by check; answers are taken from a recorded run."""
    answers = recorded["weights/disk"]["answers"]
    tokens = recorded["hostile/out-of-vocabulary-ids"]["before"]
    misuse = {
        "status": 400,
        "reason": "nothing was released",
        "death": "",
        "before": tokens,
        "after": tokens,
        "tolerance": 0.0005,
    }
    quiet = [1_530_000_000 + n % 3 * 4096 for n in range(20)]
    # By way of text, so that nothing is shared between places.
    return json.loads(
        json.dumps(
            {
                "memory/explained": {
                    "used": _gpus(23.5),
                    "weights": HELD["weights"],
                    "kv_cache": HELD["kv_cache"],
                    "graphs": GIB // 2,
                },
                "memory/release-by-tag": {
                    "devices": ["GPU-1", "GPU-2"],
                    "releases": [
                        _released(tags)
                        for tags in (["kv_cache"], ["weights"], ["kv_cache", "weights"])
                    ],
                    "differing_checksums": [],
                    "answers": answers,
                },
                "memory/release-without-saver": {
                    "source": "container",
                    "before": 1500 * MIB,
                    "after": 1501 * MIB,
                    "before_answer": tokens,
                    "after_answer": tokens,
                    "tolerance": 0.0005,
                },
                "memory/colocated-order": {
                    "source": "nvml",
                    "saver": True,
                    "devices": ["GPU-1", "GPU-2"],
                    "weights": HELD["weights"],
                    "kv_cache": HELD["kv_cache"],
                    "steps": {
                        "before": _gpus(23.5),
                        "released": _gpus(1.5),
                        "weights resumed": _gpus(3.5),
                        "pushed": _gpus(3.5, 8 * MIB),
                        "all resumed": _gpus(23.5, 8 * MIB),
                    },
                    "success": True,
                    "message": "",
                    "unchanged": ["model.layers.0.self_attn.rotary_emb.cos_sin_cache"],
                    "version": "harness-new",
                    "cached_tokens": 0,
                    "answers": answers,
                },
                "memory/cycles": {
                    "saver": True,
                    "used_bytes": {"GPU GPU-1": [23 * GIB] * 20, "container": quiet},
                    "seconds": [0.5] * 22,
                },
                "memory/release-twice": {**misuse, "status": 200, "reason": ""},
                "memory/resume-without-release": misuse,
                "memory/release-under-load": misuse,
            }
        )
    )


class Told(NamedTuple):
    check: str
    name: str
    values: dict[str, Any]
    """By places such as ``answers.0.finish``."""
    piece: str = ""
    """What the message has to say; empty where a right server may do this, too."""


DEAD = "The server ended (exit code 137): KeyError: 'kv_cache'."

LIES = [
    Told(
        "memory/explained",
        "it says it holds more than the GPU shows",
        {"kv_cache": 40 * GIB},
        "GPU GPU-1: expected at least the 43520 MiB that the server says it holds, got 24064 MiB",
    ),
    Told(
        "memory/explained",
        "it is on a GPU that was not looked at",
        {"used": {}},
        "GPUs that the server is on: expected some, got none",
    ),
    Told(
        "memory/explained",
        "it says it holds nothing",
        {"weights": 0, "kv_cache": 0, "graphs": 0},
        "what the server says it holds: expected something, got nothing",
    ),
    Told(
        "memory/release-by-tag",
        "a release that releases nothing",
        {f"releases.{n}.released": _gpus(23.5) for n in range(3)},
        "release of weights, GPU GPU-1: expected at least 1970 MiB less in use, got 0 MiB less",
    ),
    Told(
        "memory/release-by-tag",
        "only the KV cache is released",
        {"releases.1.released": _gpus(23.5), "releases.2.released": _gpus(3.5)},
        "release of kv_cache+weights, GPU GPU-2",
    ),
    Told(
        "memory/release-by-tag",
        "one of two GPUs keeps half of it",
        {"releases.0.released.GPU-2": 13 * GIB},
        "release of kv_cache, GPU GPU-2: expected at least",
    ),
    Told(
        "memory/release-by-tag",
        "a resume that takes nothing",
        {"releases.2.resumed": _gpus(1.5)},
        "resume of kv_cache+weights, GPU GPU-1: expected 24064 MiB as before",
    ),
    Told(
        "memory/release-by-tag",
        "a resume takes more than was given",
        {"releases.1.resumed": _gpus(25.5)},
        "(+2048 MiB)",
    ),
    Told(
        "memory/release-by-tag",
        "a GPU that is out of sight after the release",
        {"releases.0.released": {"GPU-1": int(3.5 * GIB)}},
        "release of kv_cache, GPU GPU-2",
    ),
    Told(
        "memory/release-by-tag",
        "weights that stay garbage",
        {"differing_checksums": ["lm_head.weight"]},
        "checksums with the weights pushed again: expected [], got ['lm_head.weight']",
    ),
    Told(
        "memory/release-by-tag",
        "answers of other weights",
        {"answers.0.served.3": -9.5},
        "afterwards, ",
    ),
    Told(
        "memory/release-by-tag",
        "it says it holds nothing, so nothing has to be released",
        {f"releases.{n}.said": 0 for n in range(3)},
        "expected enough to see whether it is released",
    ),
    Told(
        "memory/release-by-tag",
        "no GPU to look at",
        {"devices": []},
        "GPUs that the server is on: expected some, got none",
    ),
    Told(
        "memory/release-without-saver",
        "it frees memory all the same",
        {"after": 400 * MIB},
        "1100 MiB were freed: the other checks of releases hold here",
    ),
    Told(
        "memory/release-without-saver",
        "it answers otherwise afterwards",
        {"after_answer.ids.1": 5, "after_answer.logprobs.1": -0.25},
        "answer after it, token 1",
    ),
    Told(
        "memory/release-without-saver",
        "it never answers anything",
        {
            f"{which}.{what}": value
            for which in ("before_answer", "after_answer")
            for what, value in (("ids", []), ("logprobs", []), ("text", ""))
        },
        "answer before: expected tokens, got none",
    ),
    Told(
        "memory/colocated-order",
        "nothing is released",
        {"steps.released": _gpus(23.5)},
        "released, GPU GPU-1: expected at least",
    ),
    Told(
        "memory/colocated-order",
        "the KV cache comes back with the weights",
        {"steps.weights resumed": _gpus(23.5), "steps.pushed": _gpus(23.5)},
        "weights resumed, GPU GPU-1: expected at least",
    ),
    Told(
        "memory/colocated-order",
        "the push takes the KV cache's place",
        {"steps.pushed.GPU-2": 13 * GIB},
        "pushed, GPU GPU-2: expected at least",
    ),
    Told(
        "memory/colocated-order",
        "the KV cache does not come back",
        {"steps.all resumed": _gpus(3.5)},
        "all resumed, GPU GPU-1: expected 24064 MiB as before",
    ),
    Told(
        "memory/colocated-order",
        "the push is refused",
        {"success": False, "message": "no"},
        "push: expected success, got no",
    ),
    Told(
        "memory/colocated-order",
        "a parameter keeps its old weights",
        {"unchanged": ["model.norm.weight"]},
        "parameters that stayed as they were: expected [], got ['model.norm.weight']",
    ),
    Told(
        "memory/colocated-order",
        "an answer from before the push",
        {"cached_tokens": 7},
        "cached tokens of the first answer: expected 0, got 7",
    ),
    Told(
        "memory/colocated-order",
        "the label of other weights",
        {"version": "default"},
        "weight version in answers: expected 'harness-new', got 'default'",
    ),
    Told(
        "memory/colocated-order",
        "answers of other weights",
        {"answers.1.served.2": -9.5},
        "with the new weights, ",
    ),
    Told(
        "memory/colocated-order",
        "no GPU to look at",
        {"devices": []},
        "GPUs that the server is on: expected some, got none",
    ),
    Told(
        "memory/cycles",
        "2 MB are kept each cycle",
        {"used_bytes.container": [1_530 * MB + n * 2 * MB for n in range(20)]},
        "container memory over cycles: expected a slope of zero, got +2.00 MB a cycle",
    ),
    Told(
        "memory/cycles",
        "a GPU keeps pages",
        {"used_bytes.GPU GPU-1": [23 * GIB + n // 2 * 4 * MIB for n in range(20)]},
        "GPU GPU-1 memory over cycles: expected a slope of zero, got +2.",
    ),
    Told(
        "memory/cycles",
        "nothing was measured",
        {"used_bytes": {}},
        "sources of memory: expected some, got none",
    ),
]

for _misuse, _words in (
    ("memory/release-twice", "release of the same tags"),
    ("memory/resume-without-release", "resume"),
    ("memory/release-under-load", "release"),
):
    LIES += [
        Told(_misuse, f"the {_words} ends the server", {"death": DEAD, "after": None}, DEAD),
        Told(
            _misuse,
            "the server's own fault",
            {"status": 500, "reason": "Internal Server Error"},
            "answer: expected 200 or a refusal (4xx), got 500 Internal Server Error",
        ),
        Told(_misuse, "no answer at all", {"status": None, "reason": "no answer in 20 s"}, "None"),
        Told(
            _misuse,
            "it lives, and answers otherwise",
            {"after.ids.2": 1, "after.logprobs.2": -0.5},
            "answer afterwards, token 2",
        ),
        Told(
            _misuse,
            "it lives, and answers nothing more",
            {"after": None, "reason": "POST /generate: no answer"},
            "answer afterwards: expected one, got none POST /generate: no answer",
        ),
    ]

HARMLESS = [
    Told("memory/explained", "a rounding more than there is", {"used": _gpus(22.5, -10 * MIB)}),
    Told(
        "memory/release-by-tag",
        "a little is kept of each",
        {f"releases.{n}.released.GPU-1": r for n, r in enumerate((3630 * MIB, 22060 * MIB))},
    ),
    Told(
        "memory/release-by-tag",
        "weights too small to be seen beside the KV cache",
        {
            "releases.1.said": 3 * MIB,
            "releases.1.released": _gpus(23.5),
            "releases.2.said": 20 * GIB,
        },
    ),
    Told("memory/release-without-saver", "a pool is trimmed", {"after": 1450 * MIB}),
    Told(
        "memory/colocated-order",
        "no memory saver: only the order and the weights are judged",
        {"saver": False, "devices": [], "source": "container", "steps.released": _gpus(23.5)},
    ),
    Told(
        "memory/cycles",
        "a buffer grows once",
        {"used_bytes.container": [1_530 * MB + (n > 6) * 90 * MB for n in range(20)]},
    ),
    Told(
        "memory/cycles",
        "memory is given back over time",
        {"used_bytes.container": [1_530 * MB - n * 2 * MB for n in range(20)]},
    ),
    Told("memory/release-twice", "the second one is refused", {"status": 400, "reason": "no"}),
    Told("memory/resume-without-release", "nothing is done", {"status": 200, "reason": ""}),
    Told("memory/release-under-load", "it waits for the request", {"status": 200, "reason": ""}),
]
