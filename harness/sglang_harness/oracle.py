"""What the server should have said: log-probabilities from torch, on the CPU, by Hugging
Face transformers, which shares no code with SGLang's model classes."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness.checkpoint.formats.spans import stamp
from sglang_harness.errors import MissingExtra, ModelError

if TYPE_CHECKING:
    import torch

#: How far a served log-probability may be from the oracle's, by the server's dtype, in nats.
#: float32: 3e-5 at most was measured over 32 tokens on a CPU (SGLang 0.5.23); the bound leaves
#: room for other kernels and is far below 0.01. The half-precision bounds are the rounding of
#: logits of size 20 and were not measured on a GPU yet.
TOLERANCE = {"float32": 5e-4, "bfloat16": 0.12, "float16": 0.02}


def tolerance(dtype: str) -> float:
    """The bound for a dtype as SGLang names it; bfloat16's for one that is not known."""
    return TOLERANCE.get(dtype.removeprefix("torch."), TOLERANCE["bfloat16"])


#: Bytes of weights, in float32, that make another thread worth its waiting.
_A_THREAD = 512 << 20

#: The number of threads is torch's, not a model's.
_computing = threading.Lock()


@dataclass(frozen=True)
class Scores:
    """The oracle's view of the tokens that followed a prompt.

    Attributes:
        logprobs: natural-log probability of each token, given all before it.
        best_ids: the most probable token at each place.
        best_logprobs: its log-probability.
    """

    logprobs: tuple[float, ...]
    best_ids: tuple[int, ...]
    best_logprobs: tuple[float, ...]


class Oracle:
    """One checkpoint, loaded in float32.

    Args:
        folder: the checkpoint, in Hugging Face's layout.
        adapter: a LoRA adapter for it, in PEFT's layout, that PEFT applies.

    Attributes:
        architecture: the class of the model, as ``config.json`` names it.
        layers: number of its decoder layers.

    Raises:
        MissingExtra: torch, transformers or, with an adapter, PEFT is not installed.
        ModelError: transformers cannot load the folder, or PEFT the adapter.
    """

    def __init__(self, folder: Path, *, adapter: Path | None = None) -> None:
        try:
            import torch
            from safetensors import SafetensorError
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise MissingExtra("The oracle", "torch") from None
        logging.disable_progress_bar()
        self.folder = folder
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            ).eval()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"transformers cannot load {folder}: {reason}.") from None
        config = self._model.config
        self.architecture = str((config.architectures or [""])[0])
        self.layers = int(config.num_hidden_layers)
        if adapter is not None:
            self._model = _adapted(self._model, adapter)

    @property
    def parameters_bytes(self) -> int:
        """Size of the weights in float32."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def encode(self, text: str) -> list[int]:
        """Token ids, with whatever special tokens the tokenizer puts around a text."""
        return list(self.tokenizer.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that the model's own chat template makes, as text."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )

    @property
    def eos_ids(self) -> set[int]:
        """Every token id that ends a generation."""
        config = self._model.generation_config.eos_token_id
        ids = config if isinstance(config, list) else [config]
        return {int(i) for i in [*ids, self.tokenizer.eos_token_id] if i is not None}

    def score(self, prompt: Sequence[int], output: Sequence[int]) -> Scores:
        """Scores ``output`` as the continuation of ``prompt``, in one forward pass."""
        if not prompt or not output:
            raise ValueError("the oracle needs a prompt and an output")
        return _scores(self._logprobs([*prompt, *output])[len(prompt) - 1 : -1], output)

    def score_over(
        self, old: Oracle, prompt: Sequence[int], output: Sequence[int], switched: int
    ) -> Scores:
        """Scores an answer in whose midst the weights were exchanged, its cache left as it was.

        The first ``switched`` tokens are ``old``'s; the others are this oracle's, which sees
        everything before them through the keys and values that ``old`` computed. So generates a
        server that was paused with mode ``in_place`` and told not to flush.
        """
        import torch

        if not prompt or not 0 < switched < len(output):
            raise ValueError("the weights are exchanged after the first token and before the last")
        ids = [*prompt, *output]
        seen = len(prompt) + switched - 1
        with torch.inference_mode(), self._threads():
            first = old._model(torch.tensor([ids[:seen]]), use_cache=True)
            rest = self._model(
                torch.tensor([ids[seen:-1]]), past_key_values=first.past_key_values, use_cache=True
            )
            logits = torch.cat([first.logits[0, len(prompt) - 1 :], rest.logits[0]]).float()
            return _scores(torch.log_softmax(logits, dim=-1), output)

    def next_token_probabilities(self, prompt: Sequence[int]) -> list[float]:
        """The distribution of the next token, one probability a token id."""
        return list(self._logprobs(list(prompt))[-1].exp().tolist())

    def prompt_logprobs(self, prompt: Sequence[int]) -> list[float]:
        """Of each prompt token but the first, given all before it."""
        logprobs = self._logprobs(list(prompt))[:-1]
        return list(logprobs[range(len(prompt) - 1), list(prompt[1:])].tolist())

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """As many threads as the model is worth, at most as many as torch has.

        They wait for each other some thousand times in one pass. Where a core is taken by
        something else, and be it by the server, that turns 0.12 s for 135 M parameters on two
        threads into 1 to 3 s; one thread takes 0.15 s to 0.3 s either way.
        """
        import torch

        with _computing:
            before = torch.get_num_threads()
            torch.set_num_threads(min(before, max(1, self.parameters_bytes // _A_THREAD)))
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        import torch

        if not ids:
            raise ValueError("the oracle needs a prompt of at least one token")
        with torch.inference_mode(), self._threads():
            logits = self._model(torch.tensor([ids])).logits[0].float()
            return torch.log_softmax(logits, dim=-1)


def _scores(logprobs: torch.Tensor, output: Sequence[int]) -> Scores:
    """Of ``output``, by the log-probabilities of every token at each of its places."""
    best = logprobs.max(dim=-1)
    chosen = logprobs[range(len(output)), list(output)]
    return Scores(tuple(chosen.tolist()), tuple(best.indices.tolist()), tuple(best.values.tolist()))


def _adapted(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
        from safetensors import SafetensorError
    except ImportError:
        raise MissingExtra("The oracle of a LoRA adapter", "torch") from None
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"PEFT cannot load {adapter}: {reason}.") from None


#: Oracles that are kept: the served model's, that of other weights, and one more.
KEPT = 3

#: Files that are told apart by their stamp: too large to be read for that.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

_kept: OrderedDict[frozenset[tuple[object, ...]], Oracle] = OrderedDict()
_lock = threading.Lock()


def for_folder(folder: Path) -> Oracle:
    """An oracle that is loaded once for the same files and shared by the checks of a run.

    A push makes a folder of its own of the served model's configuration and of links to the
    weights that it pushes. What counts is what lies in a folder, not where it is: loading it
    anew would give the same oracle, seconds later. A folder whose files have changed since is
    loaded again.
    """
    with _lock:
        try:
            content = _content(folder)
        except OSError:
            return Oracle(folder)  # which says what is wrong with it
        if content in _kept:
            _kept.move_to_end(content)
            return _kept[content]
        while len(_kept) >= KEPT:
            _kept.popitem(last=False)
        oracle = Oracle(folder)
        # Files that were written to meanwhile may be half in it.
        if _content(folder) == content:
            _kept[content] = oracle
        return oracle


def forget() -> None:
    """Lets go of all oracles that are kept."""
    with _lock:
        _kept.clear()


def _content(folder: Path) -> frozenset[tuple[object, ...]]:
    """What tells a model folder from every other: the bytes of its small files, and of the
    weights which file they are, wherever links lead, and when it was written to."""
    found: set[tuple[object, ...]] = set()
    for file in folder.iterdir():
        if not file.is_file():
            continue
        if file.name.endswith(_WEIGHTS):
            found.add((file.name, file.stat().st_dev, *stamp(file)))
        else:
            found.add((file.name, hashlib.sha256(file.read_bytes()).digest()))
    return frozenset(found)
