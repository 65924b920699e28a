"""Do the OpenAI routes answer as the native one does?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema

from sglang_harness.server import Server
from sglang_harness.suite.check import Check, Context, Mismatch, Need, Observation, expect, register
from sglang_harness.suite.checks.generate import events_of, stream_interval
from sglang_harness.suite.lib.prompts import PROMPTS, greedy

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
TOKENS = 12

#: Greedy, and without the model's own defaults from ``generation_config.json`` (a penalty, say),
#: which SGLang applies on these routes alone.
OPTIONS: dict[str, Any] = {
    "temperature": 0.0,
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "repetition_penalty": 1.0,
}

#: Bounded everywhere, so that even a random model comes to an end.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "Berlin"]},
        "certain": {"type": "boolean"},
        "stars": {"type": "integer", "enum": [1, 2, 3]},
    },
    "required": ["city", "certain", "stars"],
    "additionalProperties": False,
}


def _no_template(server: Server) -> str | None:
    if server.model is None:
        return None
    if any(server.model.glob("chat_template*")):
        return None
    try:
        config = json.loads((server.model / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return None if config.get("chat_template") else "the model has no chat template of its own"


TEMPLATE = Need("a model with a chat template", _no_template)


def _no_grammar(server: Server) -> str | None:
    if server.client.server_info().get("grammar_backend") == "none":
        return "the server was started with --grammar-backend none"
    return None


GRAMMAR = Need("a grammar backend", _no_grammar)


class ChatTexts(Observation):
    rendered: str
    native: str
    native_prompt_tokens: int
    whole: str
    whole_prompt_tokens: int
    whole_completion_tokens: int
    streamed: str
    streamed_chunks: int
    finish: str
    streamed_finish: str
    interval: int = 1
    """Tokens an event has at least, by the server's ``--stream-interval``."""


@register
class ChatEqualsNative(Check[ChatTexts]):
    id = "chat/equals-native"
    sentence = (
        "A chat completion is the native answer to the prompt that the model's own template "
        "makes, streamed or not."
    )
    observation = ChatTexts
    needs = (TEMPLATE,)

    def observe(self, context: Context) -> ChatTexts:
        client, oracle = context.server.client, context.oracle
        rendered = oracle.render_chat(MESSAGES)
        ids = list(oracle.tokenizer.encode(rendered, add_special_tokens=False))
        context.empty_prefix_cache()
        native = client.generate(ids, sampling=greedy(TOKENS))
        context.empty_prefix_cache()
        whole = client.chat(MESSAGES, **OPTIONS)
        context.empty_prefix_cache()
        streamed = client.chat_streamed(MESSAGES, **OPTIONS)
        return ChatTexts(
            rendered=rendered,
            native=native.text,
            native_prompt_tokens=native.prompt_tokens,
            whole=whole.text,
            whole_prompt_tokens=whole.prompt_tokens,
            whole_completion_tokens=whole.completion_tokens,
            streamed=streamed.text,
            streamed_chunks=streamed.chunks,
            finish=whole.finish,
            streamed_finish=streamed.finish,
            interval=stream_interval(context),
        )

    def judge(self, seen: ChatTexts) -> list[Mismatch]:
        return [
            *expect("text", seen.native, seen.whole),
            *expect("streamed text", seen.native, seen.streamed),
            *expect("prompt tokens", seen.native_prompt_tokens, seen.whole_prompt_tokens),
            *expect("completion tokens", TOKENS, seen.whole_completion_tokens),
            *expect("finish reason", "length", seen.finish),
            *expect("finish reason of the stream", "length", seen.streamed_finish),
            *self._held_back(seen),
        ]

    @staticmethod
    def _held_back(seen: ChatTexts) -> Iterator[Mismatch]:
        fewest = events_of(TOKENS, seen.interval)
        if seen.streamed_chunks < fewest:
            expected = f"at least {fewest} for {TOKENS} tokens"
            yield Mismatch("events of the stream", expected, str(seen.streamed_chunks))


class CompletionTexts(Observation):
    native: str
    completion: str
    native_prompt_tokens: int
    completion_prompt_tokens: int


@register
class CompletionsEqualNative(Check[CompletionTexts]):
    id = "chat/completions-equal-native"
    sentence = "A text completion is the native answer to the same prompt."
    observation = CompletionTexts

    def observe(self, context: Context) -> CompletionTexts:
        client, prompt = context.server.client, PROMPTS[0]
        context.empty_prefix_cache()
        native = client.generate(prompt, sampling=greedy(TOKENS))
        context.empty_prefix_cache()
        completion = client.completions(prompt, **OPTIONS)
        return CompletionTexts(
            native=native.text,
            completion=completion.text,
            native_prompt_tokens=native.prompt_tokens,
            completion_prompt_tokens=completion.prompt_tokens,
        )

    def judge(self, seen: CompletionTexts) -> list[Mismatch]:
        return [
            *expect("text", seen.native, seen.completion),
            *expect("prompt tokens", seen.native_prompt_tokens, seen.completion_prompt_tokens),
        ]


class BoundAnswer(Observation):
    json_schema: dict[str, Any]
    text: str
    finish: str


@register
class JsonSchemaHolds(Check[BoundAnswer]):
    id = "chat/json-schema"
    sentence = "An answer bound to a JSON schema is complete, and the schema accepts it."
    observation = BoundAnswer
    needs = (GRAMMAR,)

    def observe(self, context: Context) -> BoundAnswer:
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
        # JSON allows white space without end between its parts; the penalty makes a model
        # that likes it (a random one does) go on.
        answer = context.server.client.chat(
            MESSAGES,
            temperature=0.0,
            max_tokens=256,
            frequency_penalty=1.0,
            response_format=wanted,
        )
        return BoundAnswer(json_schema=SCHEMA, text=answer.text, finish=answer.finish)

    def judge(self, seen: BoundAnswer) -> list[Mismatch]:
        wrong = list(expect("finish reason", "stop", seen.finish))
        try:
            jsonschema.validate(json.loads(seen.text), seen.json_schema)
        except ValueError as error:
            wrong.append(Mismatch("answer", "JSON", repr(seen.text), str(error)))
        except jsonschema.ValidationError as error:
            wrong.append(
                Mismatch("answer", "one that the schema accepts", seen.text, error.message)
            )
        return wrong
