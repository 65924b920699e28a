"""The client's methods have the calls' signatures: for mypy, for an IDE and for ``help``."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_harness
from sglang_harness.client import Chunk, Client, Generation, calls

PACKAGE = Path(sglang_harness.__file__).parent

#: Each line with a comment is refused by mypy with that code; each other one is accepted.
USES = """
from sglang_harness.client import Client
from sglang_harness.client.answers import ChatAnswer, Chunk, Generation, Update

def uses(client: Client) -> None:
    answer: Generation = client.generate("a", sampling={"max_new_tokens": 2}, logprobs=True)
    answers: list[Generation] = client.generate_batch(["a"], lora_path=["mine"])
    chunk: Chunk = next(client.stream([1, 2], request_id="mine"))
    chat: ChatAnswer = client.chat([{"role": "user", "content": "a"}], temperature=0.0)
    streamed: ChatAnswer = client.chat_streamed([], max_tokens=2, extra={"top_k": 1})
    text: ChatAnswer = client.completions("a", ignore_eos=True)
    update: Update = client.update_weights_from_disk("/a", weight_version="2", timeout=60)
    begun: Update = client.begin_weight_update(timeout=1.5)
    client.pause("in_place")
    client.flush_cache(wait=0)
    client.generate("a", samplings={})  # call-arg
    client.generate("a", logprobs="yes")  # arg-type
    client.generate(7)  # arg-type
    client.generate()  # call-arg
    client.generate_batch(["a"], prompt_logprobs_from=1)  # call-arg
    client.stream("a", lora_path="mine")  # call-arg
    client.chat([], temprature=0.0)  # call-arg
    client.chat_streamed([], max_tokens="2")  # arg-type
    client.completions("a", response_format={})  # call-arg
    client.update_weights_from_disk("/a", flush=True)  # call-arg
    client.begin_weight_update(timeout="1")  # arg-type
    client.pause("gently")  # arg-type
    wrong: Update = client.generate("a")  # assignment
"""


def test_a_wrong_keyword_or_type_is_refused_by_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    snippet = tmp_path / "uses.py"
    snippet.write_text(USES)
    # Only the client itself is read, else the whole package would be.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", f"--cache-dir={tmp_path / 'cache'}",
         "--follow-imports=skip", "--no-error-summary", "--hide-error-context",
         snippet, *sorted((PACKAGE / "client").glob("*.py"))],
        capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent, check=False,
    )  # fmt: skip
    got = {
        (int(line.split(":")[1]), line.rsplit("[", 1)[-1].rstrip("]"))
        for line in done.stdout.splitlines()
        if Path(line.split(":")[0]).name == snippet.name and ": error:" in line
    }
    lines = enumerate(USES.splitlines(), start=1)
    assert got == {(n, line.split("  # ")[1]) for n, line in lines if "  # " in line}, done.stdout


def test_every_keyword_is_shown_with_its_type_and_its_description() -> None:
    shown = inspect.signature(Client.generate)
    own = list(inspect.signature(calls.generate).parameters)
    assert list(shown.parameters) == ["self", *own]
    assert shown.parameters["timeout"].annotation == (float | None)
    assert shown.return_annotation is Generation
    assert Client.generate.__doc__ == calls.generate.__doc__
    bound = inspect.signature(Client.__new__(Client).stream)
    assert "self" not in bound.parameters
    assert Chunk in bound.return_annotation.__args__


def test_no_public_method_takes_options_without_names() -> None:
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        kinds = {p.kind for p in inspect.signature(method).parameters.values()}
        unnamed = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
        assert name.startswith("_") or not kinds & unnamed, name
