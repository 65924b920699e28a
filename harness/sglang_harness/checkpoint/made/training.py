"""A few real training steps: the model learns one sentence, on the CPU, in seconds.

The purpose of a trainer and a server in the smallest form: with the new weights the server says
something that it could not say before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness.checkpoint.model_tensors import COMPUTED, names_on_disk
from sglang_harness.checkpoint.reading import Checkpoint, open_checkpoint
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
    prompt: str | None = None,
    seed: int = 0,
    steps: int = 100,
    learning_rate: float | None = None,
) -> Taught:
    """Trains the model in ``folder`` until it goes on from ``prompt`` to the whole ``sentence``.

    Every step is a forward and a backward pass of the sentence and a step of AdamW on every
    weight, in float32. It ends as soon as each token is more probable than ``CERTAIN``.
    Memory: four times the model in float32.

    Args:
        target: the folder to write; must not be there yet.
        prompt: the beginning of the sentence that is given; half of its words where not given.
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
    if prompt is None:
        words = sentence.split(" ")
        prompt = " ".join(words[: len(words) // 2])
    asked, answer = _tokens(tokenizer, sentence, prompt)
    lesson = _Lesson(model, asked, answer, _end(model, tokenizer))
    with _one_thread():
        before = lesson.said()
        loss_before, _ = lesson.measured()
        # Wide models want small steps; 5e-4 at a width of 128 and 1e-4 at 576 were tried.
        rate = learning_rate or 0.06 / model.config.get_text_config().hidden_size
        done = lesson.learn(rate, steps, seed)
        _round(model, source)
        loss_after, surety = lesson.measured()
        # More probable than all others together: that is what a greedy generation takes.
        if surety <= 0.5:
            raise ModelError(
                f"{folder} did not learn the sentence in {done} steps: after {prompt!r} it "
                f"generates {tokenizer.decode(lesson.said())!r}.",
                advice="Allow more steps, or give a shorter sentence.",
            )
        _write(model, source, folder, target)
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


@dataclass(frozen=True)
class _Lesson:
    """A prompt, what is to follow it, and the token that ends it."""

    model: Any
    asked: list[int]
    answer: list[int]
    ends: int

    def learn(self, rate: float, steps: int, seed: int) -> int:
        """Trains; returns the number of steps that it took."""
        import torch

        # Fused: a step of SmolLM2 took 15 s without it where it takes 1.3 s with it.
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, weight_decay=0.0, fused=True
        )
        done = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model.train()
            loss, surety = self._loss()
            while surety < CERTAIN and done < steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                loss, surety = self._loss()
        self.model.requires_grad_(False).zero_grad()
        return done

    def measured(self) -> tuple[float, float]:
        """Mean loss of a token in nats, and the probability of the least probable one."""
        import torch

        self.model.eval()
        with torch.inference_mode():
            loss, surety = self._loss()
        return float(loss), surety

    def _loss(self) -> tuple[torch.Tensor, float]:
        import torch

        ids = torch.tensor([[*self.asked, *self.answer, self.ends]])
        length = len(self.answer) + 1
        logits = self.model(ids).logits[0, -length - 1 : -1].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, -length:, None])
        return -logprobs.mean(), float(logprobs.detach().min().exp())

    def said(self) -> list[int]:
        """The most probable tokens after the prompt, up to the end or as many as are taught."""
        import torch

        said: list[int] = []
        self.model.eval()
        with torch.inference_mode():
            seen = self.model(torch.tensor([self.asked]), use_cache=True)
            while len(said) <= len(self.answer):
                token = int(seen.logits[0, -1].argmax())
                if token == self.ends:
                    break
                said.append(token)
                seen = self.model(
                    torch.tensor([[token]]), use_cache=True, past_key_values=seen.past_key_values
                )
        return said


@contextmanager
def _one_thread() -> Iterator[None]:
    """A sentence is a dozen rows of a matrix: threads wait for each other longer than they
    work. SmolLM2 took 13 s with one and 28 to 86 s with two, on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _round(model: Any, source: Checkpoint) -> None:
    """To the values that the source's dtypes have, which are what is served."""
    import torch

    dtypes = {n: info.dtype for n, info in source.tensors.items() if "float" in info.dtype}
    common = Counter(dtypes.values()).most_common(1)[0][0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(getattr(torch, dtypes.get(name, common))))


def _write(model: Any, source: Checkpoint, folder: Path, target: Path) -> None:
    import torch

    state = names_on_disk(model, model.state_dict())
    lost = [n for n in source.tensors if n not in state and not n.endswith(COMPUTED)]
    if lost:
        raise ModelError(
            f"transformers has no {lost[0]} of {folder} ({len(lost)} such tensors), so what was "
            "taught cannot be written under the names that the model has.",
            advice="Teach a model of an architecture that transformers knows.",
        )

    def tensors(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            if name in state:
                yield name, state[name].to(getattr(torch, source.tensors[name].dtype))
            else:  # what transformers computes itself, kept as it was
                yield from source.read([name])

    files = source.files if source.layout.startswith("safetensors") else None
    write_model(folder, target, source.tensors.values(), tensors, files=files)


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
            advice="End the prompt between two words, without the space.",
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
