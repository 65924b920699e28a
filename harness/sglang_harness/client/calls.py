"""Every call of SGLang's HTTP API, each a small frozen record.

The one place where a call's parameters are written: the methods of
:class:`sglang_harness.client.Client` take their signatures from here. Facts about the endpoints
are from SGLang 0.5.23 (docs/sglang.md marks those that were observed on a running server).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec

from sglang_harness.client.answers import (
    AdapterUpdate,
    ChatAnswer,
    ChatChunk,
    Checksums,
    Chunk,
    Generation,
    Update,
)
from sglang_harness.client.call import Call, Content, Reply
from sglang_harness.client.methods import described_as

P = ParamSpec("P")

Prompt = str | Sequence[int]

#: What a pause does with running requests.
PauseMode = Literal["abort", "retract", "in_place"]


def _nothing(_: Reply) -> None:
    return None


def _object(reply: Reply) -> dict[str, Any]:
    data = reply.json()
    if not isinstance(data, dict):
        raise TypeError(f"expected a JSON object, got {type(data).__name__}")
    return data


def _is_text(prompt: Prompt) -> bool:
    return isinstance(prompt, str)


# --- is it up? -------------------------------------------------------------------------


def ready() -> Call[None]:
    """200 when the server accepts requests. Answers at once. Exists from 0.5.20 on (404
    before)."""
    return Call("GET", "/ready", _nothing, timeout=5.0)


def health() -> Call[None]:
    """200 after a one-token generation inside the server: takes at least 1 s, and at most 20 s
    before it answers 503 (``SGLANG_HEALTH_CHECK_TIMEOUT``)."""
    return Call("GET", "/health", _nothing, timeout=25.0)


def routes() -> Call[frozenset[tuple[str, str]]]:
    """Methods and paths that the server lists in its ``/openapi.json``. A server that was started
    with ``DISABLE_OPENAPI_DOC=1``, SGLang's embedded Rust server and most proxies answer 404."""

    def read(reply: Reply) -> frozenset[tuple[str, str]]:
        paths = _object(reply)["paths"]
        if not isinstance(paths, dict) or not paths:
            # A server without a single route has not answered this: a proxy has.
            raise TypeError("'paths' lists no route")
        return frozenset((method.upper(), path) for path, ms in paths.items() for method in ms)

    return Call("GET", "/openapi.json", read)


def model_info() -> Call[dict[str, Any]]:
    """The served model as it is now: path, name, weight version, architecture."""
    return Call("GET", "/model_info", _object)


def server_info() -> Call[dict[str, Any]]:
    """Launch configuration and live scheduler state. Contains the API key (0.5.23): redact it
    before writing it anywhere. Hangs when the scheduler is stuck."""
    return Call("GET", "/server_info", _object, timeout=30.0)


def models() -> Call[list[str]]:
    """Names of the served models. Answers 200 before the server can generate."""
    return Call("GET", "/v1/models", lambda r: [m["id"] for m in r.json()["data"]])


# --- generate --------------------------------------------------------------------------


def generate(
    prompt: Prompt,
    *,
    sampling: dict[str, Any] | None = None,
    logprobs: bool = False,
    prompt_logprobs_from: int | None = None,
    request_id: str | None = None,
    lora_path: str | None = None,
    routed_dp_rank: int | None = None,
    timeout: float | None = None,
) -> Call[Generation]:
    """One prompt, as text or as token ids.

    Args:
        sampling: SGLang's ``sampling_params``, as they are.
        logprobs: ask for the log-probability of each generated token.
        prompt_logprobs_from: also those of the prompt, from this token position on.
        request_id: SGLang's ``rid``, by which the request can be aborted.
        lora_path: name of a loaded LoRA adapter (the field is SGLang's); ``None``: the base model.
        routed_dp_rank: which replica of a data-parallel server answers; ``None``: any.
        timeout: seconds for the answer; ``None``: the client's.
    """
    body = _generate_body(prompt, sampling, logprobs, prompt_logprobs_from)
    if lora_path is not None:
        body["lora_path"] = lora_path
    if routed_dp_rank is not None:
        body["routed_dp_rank"] = routed_dp_rank
    if request_id is not None:
        body["rid"] = request_id

    def read(reply: Reply) -> Generation:
        return Generation.parse(_object(reply), reply.seconds)

    return Call("POST", "/generate", read, body, timeout=timeout)


def generate_batch(
    prompts: Sequence[Prompt],
    *,
    sampling: dict[str, Any] | None = None,
    logprobs: bool = False,
    lora_path: Sequence[str | None] | None = None,
) -> Call[list[Generation]]:
    """Several prompts in one request; answers in the order of the prompts.

    Args:
        sampling: SGLang's ``sampling_params``, the same for all.
        lora_path: a LoRA adapter's name for each prompt, ``None`` for the base model.

    Raises:
        ValueError: no prompts, or another number of adapters than of prompts.
    """
    if not prompts:
        raise ValueError("a batch needs at least one prompt")
    body = _generate_body(prompts[0], sampling, logprobs, None)
    if lora_path is not None:
        if len(lora_path) != len(prompts):
            raise ValueError(f"{len(lora_path)} adapters for {len(prompts)} prompts")
        body["lora_path"] = list(lora_path)
    kind = "text" if _is_text(prompts[0]) else "input_ids"
    body[kind] = [p if _is_text(p) else list(p) for p in prompts]

    def read(reply: Reply) -> list[Generation]:
        answers = [Generation.parse(item, reply.seconds) for item in reply.json()]
        if len(answers) != len(prompts):
            raise ValueError(f"{len(answers)} answers to {len(prompts)} prompts")
        return answers

    return Call("POST", "/generate", read, body)


def generate_samples(
    prompt: Prompt, count: int, *, sampling: dict[str, Any]
) -> Call[list[Generation]]:
    """``count`` independent samples of one prompt (SGLang's ``n``)."""
    body = _generate_body(prompt, {**sampling, "n": count}, False, None)

    def read(reply: Reply) -> list[Generation]:
        return [Generation.parse(item, reply.seconds) for item in reply.json()]

    return Call("POST", "/generate", read, body)


def generate_stream(
    prompt: Prompt,
    *,
    sampling: dict[str, Any] | None = None,
    logprobs: bool = False,
    request_id: str | None = None,
) -> Call[Chunk]:
    """A generation as a stream of events; see :class:`Chunk` for what is cumulative."""
    body = {**_generate_body(prompt, sampling, logprobs, None), "stream": True}
    if request_id is not None:
        body["rid"] = request_id

    def read(reply: Reply) -> Chunk:
        return Chunk.parse(_object(reply), reply.seconds)

    return Call("POST", "/generate", read, body)


def _generate_body(
    prompt: Prompt,
    sampling: dict[str, Any] | None,
    logprobs: bool,
    prompt_logprobs_from: int | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {"text": prompt} if _is_text(prompt) else {"input_ids": list(prompt)}
    body["sampling_params"] = dict(sampling or {})
    if logprobs or prompt_logprobs_from is not None:
        body["return_logprob"] = True
        body["logprob_start_len"] = -1 if prompt_logprobs_from is None else prompt_logprobs_from
    return body


def chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    model: str = "default",
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    frequency_penalty: float | None = None,
    response_format: Mapping[str, Any] | None = None,
    repetition_penalty: float | None = None,
    ignore_eos: bool | None = None,
    extra: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> Call[ChatAnswer]:
    """OpenAI's chat completion. What is ``None`` is not sent, so the server's default holds.

    Args:
        messages: such as ``[{"role": "user", "content": "Hello"}]``.
        max_tokens: of the answer.
        response_format: such as ``{"type": "json_schema", "json_schema": {...}}``.
        repetition_penalty: SGLang's own field; without it that of the model's
            ``generation_config.json`` holds on this route (0.5.23).
        ignore_eos: go on after an end-of-sequence token (SGLang's own field).
        extra: further fields of the request body, sent as they are.
        timeout: seconds for the answer; ``None``: the client's.
    """
    body = _openai_body(
        extra,
        model=model,
        messages=[dict(message) for message in messages],
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        frequency_penalty=frequency_penalty,
        response_format=response_format,
        repetition_penalty=repetition_penalty,
        ignore_eos=ignore_eos,
    )

    def read(reply: Reply) -> ChatAnswer:
        data = _object(reply)
        return ChatAnswer.parse(data, data["choices"][0]["message"]["content"] or "")

    return Call("POST", "/v1/chat/completions", read, body, timeout=timeout)


def _as_events(whole: Callable[P, Call[ChatAnswer]]) -> Callable[P, Call[ChatChunk]]:
    """The same request, answered as a stream of events."""

    def streamed(*args: P.args, **kwargs: P.kwargs) -> Call[ChatChunk]:
        call = whole(*args, **kwargs)
        # Without include_usage SGLang counts nothing.
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        body = {**(call.body or {}), **streaming}
        return Call(call.method, call.path, _chat_chunk, body, timeout=call.timeout)

    return described_as(streamed, whole, returns=Call[ChatChunk])


def _chat_chunk(reply: Reply) -> ChatChunk:
    return ChatChunk.parse(_object(reply))


chat_stream = _as_events(chat)


def completions(
    prompt: str,
    *,
    model: str = "default",
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    repetition_penalty: float | None = None,
    ignore_eos: bool | None = None,
    extra: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> Call[ChatAnswer]:
    """OpenAI's text completion. What is ``None`` is not sent, so the server's default holds.

    Args:
        max_tokens: of the answer; SGLang's default is 16 (0.5.23).
        repetition_penalty: SGLang's own field; without it that of the model's
            ``generation_config.json`` holds on this route (0.5.23).
        ignore_eos: go on after an end-of-sequence token (SGLang's own field).
        extra: further fields of the request body, sent as they are.
        timeout: seconds for the answer; ``None``: the client's.
    """
    body = _openai_body(
        extra,
        model=model,
        prompt=prompt,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        repetition_penalty=repetition_penalty,
        ignore_eos=ignore_eos,
    )

    def read(reply: Reply) -> ChatAnswer:
        data = _object(reply)
        return ChatAnswer.parse(data, data["choices"][0]["text"])

    return Call("POST", "/v1/completions", read, body, timeout=timeout)


def _openai_body(extra: Mapping[str, Any] | None, **fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None} | dict(extra or {})


def abort(request_id: str) -> Call[None]:
    """Ends a running request. Answers 200 for an unknown id too; SGLang 0.5.23 also ends every
    request whose id begins with this one."""
    return Call("POST", "/abort_request", _nothing, {"rid": request_id})


def abort_all() -> Call[None]:
    """Ends every running request, including those of other clients."""
    return Call("POST", "/abort_request", _nothing, {"abort_all": True}, changes=True)


# --- weights ---------------------------------------------------------------------------


def update_weights_from_disk(
    path: str,
    *,
    weight_version: str | None = None,
    flush_cache: bool = True,
    abort_all_requests: bool = False,
    timeout: float | None = None,
) -> Call[Update]:
    """Loads a checkpoint folder. The answer is not evidence that the weights changed.

    Also changes ``model_path`` and the served name (0.5.23).

    Args:
        path: as the server sees it.
        weight_version: the new label; ``None``: the label stays what it was.
        flush_cache: empty the prefix cache, which holds results of the old weights.
        abort_all_requests: end running requests first.
        timeout: seconds for the answer; ``None``: the client's.
    """
    body: dict[str, Any] = {
        "model_path": path,
        "flush_cache": flush_cache,
        "abort_all_requests": abort_all_requests,
    }
    if weight_version is not None:
        body["weight_version"] = weight_version
    return Call("POST", "/update_weights_from_disk", _update, body, timeout=timeout, changes=True)


def checksums() -> Call[Checksums]:
    """A checksum for every tensor of every rank, computed by the server from what it holds
    now."""

    def read(reply: Reply) -> Checksums:
        return Checksums.parse(_object(reply))

    return Call("POST", "/weights_checker", read, {"action": "checksum"})


def begin_weight_update(*, timeout: float | None = None) -> Call[Update]:
    """Opens a weight-update session (0.5.21 and later), without which pushes of tensors are
    refused. 400 if one is open already."""
    return Call("POST", "/begin_weight_update", _update, {}, timeout=timeout, changes=True)


def end_weight_update(*, timeout: float | None = None) -> Call[Update]:
    """Closes the weight-update session. 400 if none is open."""
    return Call("POST", "/end_weight_update", _update, {}, timeout=timeout, changes=True)


def update_weights_from_tensor(content: Content, *, timeout: float | None = None) -> Call[Update]:
    """Tensors, or handles to them, in the body. A wrong shape or a payload that cannot be
    unpickled kills the scheduler (0.5.23).

    Args:
        content: the whole body; see :class:`sglang_harness.weights.routes.packing.TensorBody`.
    """
    return Call(
        "POST",
        "/update_weights_from_tensor",
        _update,
        timeout=timeout,
        changes=True,
        content=content,
    )


def init_weights_update_group(
    *,
    master_address: str,
    master_port: int,
    rank_offset: int,
    world_size: int,
    group_name: str,
    backend: str,
    timeout: float | None = None,
) -> Call[Update]:
    """Joins a process group whose rank 0 is the trainer. The scheduler answers nothing else
    until every rank has joined: a peer that never joins blocks the whole server (0.5.23)."""
    body = {
        "master_address": master_address,
        "master_port": master_port,
        "rank_offset": rank_offset,
        "world_size": world_size,
        "group_name": group_name,
        "backend": backend,
    }
    return Call("POST", "/init_weights_update_group", _update, body, timeout=timeout, changes=True)


def destroy_weights_update_group(group_name: str, *, timeout: float | None = None) -> Call[Update]:
    """Leaves the process group. 400 if there is no such group."""
    body = {"group_name": group_name}
    return Call(
        "POST", "/destroy_weights_update_group", _update, body, timeout=timeout, changes=True
    )


def update_weights_from_distributed(
    *,
    names: Sequence[str],
    dtypes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    group_name: str,
    weight_version: str | None = None,
    flush_cache: bool = False,
    abort_all_requests: bool = False,
    timeout: float | None = None,
) -> Call[Update]:
    """Receives one broadcast per tensor from rank 0, in this order. Blocks until all have been
    sent."""
    body: dict[str, Any] = {
        "names": list(names),
        "dtypes": list(dtypes),
        "shapes": [list(shape) for shape in shapes],
        "group_name": group_name,
        "flush_cache": flush_cache,
        "abort_all_requests": abort_all_requests,
    }
    if weight_version is not None:
        body["weight_version"] = weight_version
    return Call(
        "POST", "/update_weights_from_distributed", _update, body, timeout=timeout, changes=True
    )


def update_weight_version(version: str) -> Call[Update]:
    """Changes only the label. SGLang's default would abort every request; here none is aborted."""
    body = {"new_version": version, "abort_all_requests": False}
    return Call("POST", "/update_weight_version", _update, body, changes=True)


def check_weights(action: Literal["snapshot", "reset_tensors", "compare"]) -> Call[Update]:
    """The other actions of ``/weights_checker``. ``reset_tensors`` fills every parameter with
    noise; ``compare`` needs CUDA (0.5.23), answers 400 for tensors that differ from the snapshot,
    and discards the snapshot."""
    return Call("POST", "/weights_checker", _update, {"action": action}, changes=True)


def _update(reply: Reply) -> Update:
    data = _object(reply)
    return Update(bool(data["success"]), str(data.get("message", "")), reply.seconds)


# --- LoRA adapters -----------------------------------------------------------------------


def load_lora_adapter(name: str, path: str, *, pinned: bool = False) -> Call[AdapterUpdate]:
    """Loads an adapter folder (PEFT's layout). Needs ``--enable-lora``. The answer is not evidence
    that the adapter is applied.

    Args:
        path: as the server sees it.
        pinned: other adapters may not evict it from memory.
    """
    body = {"lora_name": name, "lora_path": path, "pinned": pinned}
    return Call("POST", "/load_lora_adapter", _adapter_update, body, changes=True)


def load_lora_adapter_from_tensors(
    name: str, config: dict[str, Any], tensors: Sequence[str], *, pinned: bool = False
) -> Call[AdapterUpdate]:
    """Loads an adapter whose weights are in the request. The answer is not evidence that the
    adapter is applied.

    Args:
        config: PEFT's ``adapter_config.json``.
        tensors: for each tensor-parallel rank a base64 pickle of ``{name: tensor}`` with PEFT's
            names and whole, unsharded CPU tensors: each rank reads its own copy (0.5.23).
        pinned: other adapters may not evict it from memory.
    """
    body = {
        "lora_name": name,
        "config_dict": config,
        "serialized_named_tensors": list(tensors),
        "pinned": pinned,
    }
    return Call("POST", "/load_lora_adapter_from_tensors", _adapter_update, body, changes=True)


def unload_lora_adapter(name: str) -> Call[AdapterUpdate]:
    """Unloads an adapter, after the requests that use it have ended (0.5.23)."""
    body = {"lora_name": name}
    return Call("POST", "/unload_lora_adapter", _adapter_update, body, changes=True)


def _adapter_update(reply: Reply) -> AdapterUpdate:
    data = _object(reply)
    return AdapterUpdate(
        bool(data["success"]),
        str(data.get("error_message") or ""),
        tuple(sorted(data.get("loaded_adapters") or ())),
        reply.seconds,
    )


# --- control and memory ----------------------------------------------------------------


def flush_cache(wait: float = 5.0) -> Call[None]:
    """Empties the prefix cache. 400 while requests run.

    Args:
        wait: seconds that the server waits for running requests to end: for some milliseconds
            after an answer its request still counts as running (0.5.23). With 0 it answers at
            once, which a server that was paused with ``retract`` needs: its requests cannot end,
            so waiting for them would fail (0.5.23).
    """
    query = (("timeout", f"{wait:g}"),) if wait else ()
    return Call("POST", "/flush_cache", _nothing, query=query, changes=True)


def pause(mode: PauseMode = "abort") -> Call[None]:
    """Stops generating. ``abort`` ends running requests, ``retract`` and ``in_place`` keep
    them for ``resume``. While paused, a new request hangs instead of failing (0.5.23)."""
    return Call("POST", "/pause_generation", _nothing, {"mode": mode}, changes=True)


def resume() -> Call[None]:
    """Continues after a pause (SGLang's ``/continue_generation``)."""
    # The server requires a body.
    return Call("POST", "/continue_generation", _nothing, {}, changes=True)


def release_memory(tags: Sequence[str] | None = None) -> Call[None]:
    """Releases GPU memory. Without ``--enable-memory-saver`` it frees nothing and still answers
    200. A second release of the same tag can kill the server (0.5.23).

    Args:
        tags: such as ``["weights", "kv_cache"]``; ``None``: all.
    """
    body = {"tags": list(tags)} if tags is not None else {}
    return Call("POST", "/release_memory_occupation", _nothing, body, changes=True)


def resume_memory(tags: Sequence[str] | None = None) -> Call[None]:
    """Allocates released memory again. Without a release before it the server dies (0.5.23).

    Args:
        tags: such as ``["weights", "kv_cache"]``; ``None``: all.
    """
    body = {"tags": list(tags)} if tags is not None else {}
    return Call("POST", "/resume_memory_occupation", _nothing, body, changes=True)
