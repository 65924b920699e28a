"""Do OpenAI's routes say the same as the native one?"""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.checks.generate import PROMPTS, greedy

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
TOKENS = 12

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


@register
class ChatEqualsNative(Check[ChatTexts]):
    id = "chat/equals-native"
    sentence = (
        "A chat completion is the native answer to the prompt that the model's own template "
        "makes, streamed or not."
    )
    observation = ChatTexts

    def observe(self, context: Context) -> ChatTexts:
        client, oracle = context.server.client, context.oracle
        rendered = oracle.render_chat(MESSAGES)
        ids = list(oracle.tokenizer.encode(rendered, add_special_tokens=False))
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
        native = client.generate(ids, sampling=greedy(TOKENS))
        whole = client.chat(MESSAGES, **options)
        streamed = client.chat_streamed(MESSAGES, **options)
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
        )

    def judge(self, seen: ChatTexts) -> list[Mismatch]:
        return [
            *expect("text", seen.native, seen.whole),
            *expect("streamed text", seen.native, seen.streamed),
            *expect("prompt tokens", seen.native_prompt_tokens, seen.whole_prompt_tokens),
            *expect("completion tokens", TOKENS, seen.whole_completion_tokens),
            *expect("finish reason", "length", seen.finish),
            *expect("finish reason of the stream", "length", seen.streamed_finish),
            *expect("more than two events in the stream", True, seen.streamed_chunks > 2),
        ]


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
        native = client.generate(prompt, sampling=greedy(TOKENS))
        completion = client.completions(prompt, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
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
    sentence = "An answer bound to a JSON schema is whole, and the schema accepts it."
    observation = BoundAnswer

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
