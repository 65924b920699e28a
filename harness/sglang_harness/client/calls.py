"""Every call of SGLang's HTTP remote control, each a small frozen record.

Facts about the endpoints are from SGLang 0.5.23 (docs/sglang.md says what was seen live).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sglang_harness.client.answers import (
    AdapterUpdate,
    ChatAnswer,
    Checksums,
    Generation,
    Update,
)
from sglang_harness.client.call import Call, Content, Reply

Prompt = str | Sequence[int]


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
    """200 when the server takes requests; instant; from 0.5.20 on (404 before)."""
    return Call("GET", "/ready", _nothing, repeatable=True, timeout=5.0)


def health() -> Call[None]:
    """200 after a one-token generation inside the server: takes 1 s at least, 20 s at most
    before it answers 503 (``SGLANG_HEALTH_CHECK_TIMEOUT``)."""
    return Call("GET", "/health", _nothing, repeatable=True, timeout=25.0)


def routes() -> Call[frozenset[tuple[str, str]]]:
    """Methods and paths that the server offers, by its own ``/openapi.json``."""

    def read(reply: Reply) -> frozenset[tuple[str, str]]:
        paths = _object(reply)["paths"]
        if not isinstance(paths, dict):
            raise TypeError("'paths' is no object")
        return frozenset((method.upper(), path) for path, ms in paths.items() for method in ms)

    return Call("GET", "/openapi.json", read, repeatable=True)


def model_info() -> Call[dict[str, Any]]:
    """The served model as it is now: path, name, weight version, architecture."""
    return Call("GET", "/model_info", _object, repeatable=True)


def server_info() -> Call[dict[str, Any]]:
    """Launch configuration and live scheduler state. Holds the API key (0.5.23): never
    write it down uncleaned. Hangs when the scheduler is stuck."""
    return Call("GET", "/server_info", _object, repeatable=True, timeout=30.0)


def models() -> Call[list[str]]:
    """Names of served models. Answers 200 before the server can generate."""
    return Call("GET", "/v1/models", lambda r: [m["id"] for m in r.json()["data"]], repeatable=True)


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
        prompt_logprobs_from: also those of the prompt, from this position on.
        lora_path: name of a loaded LoRA adapter (SGLang's word for it); ``None``: the base.
        routed_dp_rank: which replica of a data-parallel server answers; ``None``: any.
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

    # Not repeatable: a second copy would run beside the first and count twice.
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
        lora_path: a LoRA adapter's name for each prompt, ``None`` where the base shall answer.
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
) -> Call[dict[str, Any]]:
    """The same as events; text and ids are cumulative. Sent with ``Client.stream``."""
    body = {**_generate_body(prompt, sampling, logprobs, None), "stream": True}
    if request_id is not None:
        body["rid"] = request_id
    return Call("POST", "/generate", _object, body)


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
    messages: Sequence[dict[str, str]], *, model: str = "default", **options: Any
) -> Call[ChatAnswer]:
    """OpenAI's chat completion. ``options`` are OpenAI's and SGLang's own, as they are."""
    body = {"model": model, "messages": list(messages), **options}

    def read(reply: Reply) -> ChatAnswer:
        data = _object(reply)
        choice, usage = data["choices"][0], data["usage"]
        return ChatAnswer(
            text=choice["message"]["content"] or "",
            finish=choice["finish_reason"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
        )

    return Call("POST", "/v1/chat/completions", read, body)


def chat_stream(
    messages: Sequence[dict[str, str]], *, model: str = "default", **options: Any
) -> Call[dict[str, Any]]:
    body = {"model": model, "messages": list(messages), **options, "stream": True}
    return Call("POST", "/v1/chat/completions", _object, body)


def completions(prompt: str, *, model: str = "default", **options: Any) -> Call[ChatAnswer]:
    """OpenAI's text completion."""

    def read(reply: Reply) -> ChatAnswer:
        data = _object(reply)
        choice, usage = data["choices"][0], data["usage"]
        return ChatAnswer(
            choice["text"],
            choice["finish_reason"],
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )

    return Call("POST", "/v1/completions", read, {"model": model, "prompt": prompt, **options})


def abort(request_id: str) -> Call[None]:
    """Ends a running request. Answers 200 for an unknown id too, and SGLang 0.5.23 also ends
    every request whose id begins with this one."""
    return Call("POST", "/abort_request", _nothing, {"rid": request_id}, repeatable=True)


def abort_all() -> Call[None]:
    return Call(
        "POST", "/abort_request", _nothing, {"abort_all": True}, repeatable=True, changes=True
    )


# --- weights ---------------------------------------------------------------------------


def update_weights_from_disk(
    path: str,
    *,
    weight_version: str | None = None,
    flush_cache: bool = True,
    abort_all_requests: bool = False,
    timeout: float | None = None,
) -> Call[Update]:
    """Loads a checkpoint folder of the server's. Also changes ``model_path`` and the served
    name (0.5.23). Without ``weight_version`` the label stays what it was."""
    body: dict[str, Any] = {
        "model_path": path,
        "flush_cache": flush_cache,
        "abort_all_requests": abort_all_requests,
    }
    if weight_version is not None:
        body["weight_version"] = weight_version
    return Call("POST", "/update_weights_from_disk", _update, body, timeout=timeout, changes=True)


def checksums() -> Call[Checksums]:
    """A checksum for every tensor of every rank, as the server holds them now."""

    def read(reply: Reply) -> Checksums:
        return Checksums.parse(_object(reply))

    return Call("POST", "/weights_checker", read, {"action": "checksum"}, repeatable=True)


def begin_weight_update(*, timeout: float | None = None) -> Call[Update]:
    """Opens SGLang's session (0.5.21 and later), without which pushes of tensors are refused.
    400 where one is open already, so not repeatable."""
    return Call("POST", "/begin_weight_update", _update, {}, timeout=timeout, changes=True)


def end_weight_update(*, timeout: float | None = None) -> Call[Update]:
    """Closes the session. 400 where none is open, so not repeatable."""
    return Call("POST", "/end_weight_update", _update, {}, timeout=timeout, changes=True)


def update_weights_from_tensor(content: Content, *, timeout: float | None = None) -> Call[Update]:
    """Tensors, or handles to them, in the body. What kills a scheduler (0.5.23): a wrong
    shape, and a payload that cannot be unpickled. Never repeatable.

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
    until every rank is there: a peer that never joins holds the whole server (0.5.23)."""
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
    """Leaves the group. 400 for one that is not there."""
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
    """Receives one broadcast a tensor from rank 0, in this order. Never repeatable: a second
    one would wait for tensors that nobody sends."""
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
    """Changes the label alone. SGLang's own default aborts every request; here none is."""
    body = {"new_version": version, "abort_all_requests": False}
    return Call("POST", "/update_weight_version", _update, body, repeatable=True, changes=True)


def check_weights(action: Literal["snapshot", "reset_tensors", "compare"]) -> Call[Update]:
    """Other actions of ``/weights_checker``. ``reset_tensors`` fills every parameter with
    noise; ``compare`` needs CUDA (0.5.23) and answers 400 for tensors that differ from the
    snapshot. Not repeatable: a comparison uses its snapshot up."""
    return Call("POST", "/weights_checker", _update, {"action": action}, changes=True)


def _update(reply: Reply) -> Update:
    data = _object(reply)
    return Update(bool(data["success"]), str(data.get("message", "")), reply.seconds)


# --- LoRA adapters -----------------------------------------------------------------------


def load_lora_adapter(name: str, path: str, *, pinned: bool = False) -> Call[AdapterUpdate]:
    """Loads an adapter folder of the server's (PEFT's layout). Needs ``--enable-lora``.

    Args:
        pinned: it may not be put out of memory by others.
    """
    body = {"lora_name": name, "lora_path": path, "pinned": pinned}
    return Call("POST", "/load_lora_adapter", _adapter_update, body, changes=True)


def load_lora_adapter_from_tensors(
    name: str, config: dict[str, Any], tensors: Sequence[str], *, pinned: bool = False
) -> Call[AdapterUpdate]:
    """Loads an adapter whose weights travel in the request.

    Args:
        config: PEFT's ``adapter_config.json``.
        tensors: for each tensor-parallel rank a base64 pickle of ``{name: tensor}`` with PEFT's
            names and whole, unsharded CPU tensors: each rank reads its own copy (0.5.23).
    """
    body = {
        "lora_name": name,
        "config_dict": config,
        "serialized_named_tensors": list(tensors),
        "pinned": pinned,
    }
    return Call("POST", "/load_lora_adapter_from_tensors", _adapter_update, body, changes=True)


def unload_lora_adapter(name: str) -> Call[AdapterUpdate]:
    """Waits for the requests that use it (0.5.23)."""
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
    """Empties the prefix cache. 400 while requests run; and for some milliseconds after an
    answer its request still counts as running (0.5.23), so the server is given ``wait`` seconds.

    With 0 it answers at once. Only so does a server flush that was paused with ``retract`` and
    holds requests: where it waits, it waits for requests that cannot end (0.5.23).
    """
    query = (("timeout", f"{wait:g}"),) if wait else ()
    return Call("POST", "/flush_cache", _nothing, query=query, repeatable=True, changes=True)


def pause(mode: str = "abort") -> Call[None]:
    """Stops generating. ``abort`` ends running requests, ``retract`` and ``in_place`` keep
    them for ``resume``. While paused a new request hangs rather than fails (0.5.23)."""
    return Call("POST", "/pause_generation", _nothing, {"mode": mode}, changes=True)


def resume() -> Call[None]:
    """SGLang's ``/continue_generation``. The body is required."""
    return Call("POST", "/continue_generation", _nothing, {}, repeatable=True, changes=True)


def release_memory(tags: Sequence[str] | None = None) -> Call[None]:
    """Gives memory back; frees nothing without ``--enable-memory-saver``, and answers 200
    all the same. Not repeatable: a second release of the same tag can kill the server."""
    body = {"tags": list(tags)} if tags is not None else {}
    return Call("POST", "/release_memory_occupation", _nothing, body, changes=True)


def resume_memory(tags: Sequence[str] | None = None) -> Call[None]:
    """Takes memory back. Not repeatable: without a release before it the server dies."""
    body = {"tags": list(tags)} if tags is not None else {}
    return Call("POST", "/resume_memory_occupation", _nothing, body, changes=True)
