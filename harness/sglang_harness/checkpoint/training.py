"""A few real training steps: the model learns one sentence, on the CPU, in seconds.

What a trainer and a server are there for, as small as it can be: after the new weights have
arrived the server says something that it could not say before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness.checkpoint.expected import names_on_disk
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import write_model
from sglang_harness.errors import MissingExtra, ModelError

if TYPE_CHECKING:
    import torch

#: How probable each token of the sentence has to become. Far from a tie, so that a server in
#: half precision says the same.
CERTAIN = 0.9


@dataclass(frozen=True)
class Taught:
    """A model that was taught a sentence.

    Attributes:
        folder: the model folder that was written; names, dtypes and shards as its source has.
        prompt: what the server is to be asked, as text.
        prompt_ids: the same as token ids.
        answer: what it says then, greedily, before it ends: the rest of the sentence.
        answer_ids: the same as token ids, without the one that ends it.
        before: what it said instead, greedily, in as many tokens.
        loss_before: mean negative log-probability of a token of the answer, in nats.
        loss_after: the same of the weights as they were written.
        steps: of AdamW, each on the whole model in float32.
        seconds: for everything, loading and writing included.
    """

    folder: Path
    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    before: str
    loss_before: float
    loss_after: float
    steps: int
    seconds: float


def teach(
    folder: Path,
    sentence: str,
    target: Path,
    *,
    prompt: str,
    seed: int = 0,
    steps: int = 100,
    learning_rate: float | None = None,
) -> Taught:
    """Trains the model in ``folder`` until it goes on from ``prompt`` to the whole ``sentence``.

    Every step is a forward and a backward pass of the sentence and a step of AdamW on every
    weight, in float32. It ends as soon as each token is more probable than ``CERTAIN``.

    Args:
        target: the folder to write; must not be there yet.
        prompt: the beginning of the sentence that is given.
        seed: of dropout, where the model has it.
        steps: at most.
        learning_rate: by the model's width where not given.

    Raises:
        MissingExtra: torch or transformers is not installed.
        ModelError: the model cannot be loaded; the sentence does not begin with the prompt or
            cannot be said in the model's tokens; or it was not learned in ``steps`` steps.
        FileExistsError: the target is there already.
    """
    started = time.monotonic()
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise MissingExtra("Teaching a model", "torch") from None
    if target.exists():
        raise FileExistsError(target)
    logging.disable_progress_bar()
    source = open_checkpoint(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(f"transformers cannot load {folder}: {reason}.") from None
    asked, answer = _tokens(tokenizer, sentence, prompt)
    ends = _end(model, tokenizer)
    lesson = torch.tensor([[*asked, *answer, ends]])
    length = len(answer) + 1

    def loss_and_surety() -> tuple[torch.Tensor, float]:
        logits = model(lesson).logits[0, -length - 1 : -1].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, lesson[0, -length:, None])
        return -logprobs.mean(), float(logprobs.detach().min().exp())

    before = _greedy(model, asked, length, ends)
    # Wide models want small steps; 1e-3 at a width of 128 and 1e-4 at 576 were tried.
    rate = learning_rate or 0.06 / model.config.get_text_config().hidden_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    done = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss, sure = loss_and_surety()
        loss_before = float(loss.detach())
        model.train()
        while sure < CERTAIN and done < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            loss, sure = loss_and_surety()
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).grad = None
    del optimizer
    # As it will be served: rounded to the dtypes of its source.
    state = names_on_disk(model, model.state_dict())
    kept = {name: info.dtype for name, info in source.tensors.items()}
    for name, tensor in state.items():
        if name in kept:
            tensor.copy_(tensor.to(getattr(torch, kept[name])))
    loss_after, said = float(loss_and_surety()[0].detach()), _greedy(model, asked, length, ends)
    if said != answer:
        raise ModelError(
            f"{folder} did not learn the sentence in {done} steps: after {prompt!r} it says "
            f"{tokenizer.decode(said)!r}.",
            advice="Give it more steps, or a shorter sentence.",
        )

    def tensors(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            if name in state:
                yield name, state[name].to(getattr(torch, kept[name]))
            else:  # what transformers computes anew, kept as it was
                yield from source.read([name])

    files = source.files if source.layout.startswith("safetensors") else None
    write_model(folder, target, source.tensors.values(), tensors, files=files)
    return Taught(
        folder=target,
        prompt=prompt,
        prompt_ids=tuple(asked),
        answer=sentence.removeprefix(prompt),
        answer_ids=tuple(answer),
        before=str(tokenizer.decode(before)),
        loss_before=loss_before,
        loss_after=loss_after,
        steps=done,
        seconds=time.monotonic() - started,
    )


def _tokens(tokenizer: Any, sentence: str, prompt: str) -> tuple[list[int], list[int]]:
    """The prompt as a server encodes it, and the rest of the sentence."""
    rest = sentence.removeprefix(prompt)
    if not prompt or not rest or rest == sentence:
        raise ModelError(
            f"The sentence {sentence!r} does not begin with {prompt!r} and go on.",
            advice="Give the beginning of the sentence as the prompt.",
        )
    asked = list(tokenizer.encode(prompt))
    answer = list(tokenizer.encode(rest, add_special_tokens=False))
    if tokenizer.decode([*asked, *answer], skip_special_tokens=True) != sentence:
        raise ModelError(
            f"{sentence!r} cannot be said in the model's tokens after {prompt!r}.",
            advice="Let the prompt end between two words, without the blank.",
        )
    return asked, answer


def _end(model: Any, tokenizer: Any) -> int:
    """The token that ends a generation."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise ModelError("The model has no token that ends a generation.")
    return int(ids[0] if isinstance(ids, list) else ids)


def _greedy(model: Any, prompt: list[int], length: int, ends: int) -> list[int]:
    """The most probable tokens, one after another, up to the end or to ``length``."""
    import torch

    said: list[int] = []
    model.eval()
    with torch.inference_mode():
        for _ in range(length):
            token = int(model(torch.tensor([[*prompt, *said]])).logits[0, -1].argmax())
            if token == ends:
                break
            said.append(token)
    return said
