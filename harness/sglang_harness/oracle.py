"""The reference model: what a server should have answered, as log-probabilities from torch on the
CPU, by Hugging Face transformers, which shares no code with SGLang's model classes.

Everything is computed in float32, whatever the checkpoint is saved in. The weights are held in
float32 where half of the available memory suffices; otherwise they are read from the checkpoint
layer by layer for every answer (``checkpoint/streaming.py``), with the same results. Where there
is no memory for that either, other reference models are released, and then the model is refused
by a sentence."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sglang_harness._base import headroom
from sglang_harness.checkpoint import streaming
from sglang_harness.checkpoint.footprint import RoomNeeded, Size, reference_model, require
from sglang_harness.checkpoint.formats.spans import stamp
from sglang_harness.checkpoint.streaming import NotStreamable
from sglang_harness.errors import BrokenCheckpoint, MissingExtra, ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Bound:
    """How far a served log-probability may be from the reference model's.

    Attributes:
        nats: the distance.
        why: where the figure comes from.
        device: on which it was measured; empty for one that follows from reasoning alone.
        date: of the measurement, ISO 8601.
        largest: distance that was measured, in nats.
    """

    nats: float
    why: str
    device: str = ""
    date: str = ""
    largest: float | None = None


#: By the server's dtype. ``gpu-check --part tolerances`` measures and proposes: its figures go in
#: here, with device and date, and everything that judges log-probabilities follows.
BOUNDS = {
    "float32": Bound(
        5e-4,
        "3e-5 at most over 32 tokens (SGLang 0.5.23), with room for other kernels",
        device="a CPU",
        largest=3e-5,
    ),
    # Plain torch in half precision, over 200 to 1150 tokens of each model. 0.12 and 0.02, which
    # followed from the rounding of logits of size 20, were too small. Not measured on a GPU.
    "bfloat16": Bound(
        0.3,
        "1.2 B parameters: 0.26 at most for tokens of prompts, 0.14 for the most probable ones; "
        "0.5 M saved in float32: 0.21",
        device="a CPU",
        date="2026-11-28",
        largest=0.2621,
    ),
    "float16": Bound(
        0.05,
        "0.5 M parameters saved in float32, as the tiny models are: 0.036 at most",
        device="a CPU",
        date="2026-11-28",
        largest=0.0357,
    ),
}

#: Nats by dtype.
TOLERANCE = {dtype: bound.nats for dtype, bound in BOUNDS.items()}


def tolerance(dtype: str) -> float:
    """The bound for a dtype as SGLang names it; bfloat16's for one that is not known."""
    return TOLERANCE.get(dtype.removeprefix("torch."), TOLERANCE["bfloat16"])


#: Bytes of weights, in float32, for which a further thread pays.
_A_THREAD = 512 << 20

#: Held while a model is loaded, released or computes. The number of threads is torch's, not a
#: model's; and no model is released while it computes.
_computing = threading.RLock()


@dataclass(frozen=True)
class Scores:
    """The reference model's view of the tokens that followed a prompt.

    Attributes:
        logprobs: natural-log probability of each token, given all before it.
        best_ids: the most probable token at each place.
        best_logprobs: its log-probability.
    """

    logprobs: tuple[float, ...]
    best_ids: tuple[int, ...]
    best_logprobs: tuple[float, ...]


class Oracle:
    """The reference model of one checkpoint, computed in float32.

    Args:
        folder: the checkpoint, in Hugging Face's layout.
        adapter: a LoRA adapter for it, in PEFT's layout, applied by PEFT. Then the weights are
            held: PEFT cannot change a model that is read layer by layer.

    Attributes:
        architecture: the class of the model, as ``config.json`` names it.
        layers: number of its decoder layers.

    Raises:
        MissingExtra: torch, transformers or, with an adapter, PEFT is not installed.
        NotEnoughRoom: the available memory does not suffice.
        ModelError: transformers cannot load the folder, or PEFT the adapter.
    """

    def __init__(self, folder: Path, *, adapter: Path | None = None) -> None:
        try:
            import torch  # noqa: F401
            from transformers import AutoConfig, AutoTokenizer
            from transformers.utils import logging
        except ImportError:
            raise MissingExtra("The reference model", "torch") from None
        logging.disable_progress_bar()
        self.folder = folder
        self._adapter = adapter
        self._loaded: Any = None
        self._stamps: dict[str, tuple[int, ...]] | None = None
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            self.architecture = str((config.architectures or [""])[0])
            self.layers = int(config.get_text_config().num_hidden_layers)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise _cannot_load(folder, error) from None
        _ = self._model  # what is wrong with the weights is said now

    @property
    def _model(self) -> Any:
        """The model, loaded where it is not."""
        with _computing:
            if self._loaded is None:
                self._loaded = self._same_as_before()
            _use(self)
            return self._loaded

    def _same_as_before(self) -> Any:
        """Raises BrokenCheckpoint: the files are others than when it was loaded for the first
        time, as of a trainer that writes its next step over the last one."""
        weights = (file for file in self.folder.glob("*") if _holds_weights(file))
        stamps = {file.name: stamp(file) for file in weights if file.is_file()}
        if self._stamps is not None and stamps != self._stamps:
            raise BrokenCheckpoint(
                f"{self.folder} was written to after its reference model was loaded.",
                advice="Write each checkpoint to a folder of its own.",
            )
        self._stamps = stamps
        return _load(self.folder, self._adapter)

    def release(self) -> None:
        """Gives the memory of the weights back; they are loaded again when they are needed."""
        with _computing:
            self._loaded = None

    def follow(self, folder: Path) -> None:
        """The same files are in ``folder`` too: from now on they are read there, where the folder
        that they were read from is gone."""
        with _computing:
            if self.folder.exists():
                return
            self.folder = folder
            if self._loaded is not None and any(p.is_meta for p in self._loaded.parameters()):
                self._loaded = None  # it reads its weights by the names that are gone

    @property
    def parameters_bytes(self) -> int:
        """Size of the weights in float32."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def encode(self, text: str) -> list[int]:
        """Token ids, including the special tokens that the tokenizer adds to a text."""
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
            raise ValueError("the reference model needs a prompt and an output")
        return _scores(self._logprobs([*prompt, *output])[len(prompt) - 1 : -1], output)

    def score_over(
        self, old: Oracle, prompt: Sequence[int], output: Sequence[int], switched: int
    ) -> Scores:
        """Scores an answer during which the weights were replaced, its cache left as it was.

        The first ``switched`` tokens are ``old``'s; the others are this model's, which sees
        everything before them through the keys and values that ``old`` computed. This is how a
        server generates that was paused with mode ``in_place`` and told not to flush.
        """
        import torch

        if not prompt or not 0 < switched < len(output):
            raise ValueError("the weights are replaced after the first token and before the last")
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
        """As many threads as pay for a model of this size, at most as many as torch has.

        They wait for each other some thousand times in one pass. Where something else, such as
        the server, takes a core, that turns 0.12 s for 135 M parameters on two threads into 1 to
        3 s; one thread takes 0.15 s to 0.3 s either way.
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
            raise ValueError("the reference model needs a prompt of at least one token")
        with torch.inference_mode(), self._threads():
            logits = self._model(torch.tensor([ids])).logits[0].float()
            return torch.log_softmax(logits, dim=-1)


def _scores(logprobs: torch.Tensor, output: Sequence[int]) -> Scores:
    """Of ``output``, by the log-probabilities of every token at each of its places."""
    best = logprobs.max(dim=-1)
    chosen = logprobs[range(len(output)), list(output)]
    return Scores(tuple(chosen.tolist()), tuple(best.indices.tolist()), tuple(best.values.tolist()))


def _cannot_load(folder: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return ModelError(f"transformers cannot load {folder}: {reason}.")


def _load(folder: Path, adapter: Path | None) -> Any:
    """The model, held or streamed.

    Raises:
        NotEnoughRoom: neither fits, not even alone.
    """
    try:
        size = Size.of_folder(folder)
    except ModelError:
        return _held(folder, adapter)  # transformers reads it, or says why not
    held, streamed = (reference_model(size, streamed=each).memory for each in (False, True))
    # The other half is for the next model, files in a tmpfs, and a server on the same machine.
    if held <= headroom.memory().available // 2:
        return _held(folder, adapter)
    while True:
        available = headroom.memory().available
        if adapter is None and streamed <= available:
            with suppress(NotStreamable):
                return streaming.streamed(folder)
        if held <= available:
            return _held(folder, adapter)
        if not _release_one():
            break
    what = f"The reference model of {folder}"
    less = "take a smaller model, or select checks without it by -k"
    if adapter is not None:
        what += " with an adapter"
    else:
        require(what, RoomNeeded(streamed), less=less)
        what += ", which cannot be read layer by layer,"
    require(what, RoomNeeded(held), less=less)
    return _held(folder, adapter)  # there is more memory than a moment ago


def _held(folder: Path, adapter: Path | None) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _cannot_load(folder, error) from None
    model, told = loaded
    if lacking := sorted(told["missing_keys"]):
        # transformers fills these with noise.
        more = f"it lacks {lacking[0]} ({len(lacking)} such weights)"
        raise _cannot_load(folder, ValueError(more))
    model.eval()
    _detach(model)
    return model if adapter is None else _adapted(model, adapter)


def _detach(model: Any) -> None:
    """Gives weights that are mapped from their files memory of their own.

    transformers maps weights that are in float32 already. A trainer that writes its next step over
    the last one would change them under the reference model, and end this process by SIGBUS while
    the file is shorter.
    """
    from sglang_harness.checkpoint.formats.spans import empty

    for parameter in model.parameters():
        parameter.data = empty(tuple(parameter.shape), "float32").copy_(parameter.data)


def _adapted(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
        from safetensors import SafetensorError
    except ImportError:
        raise MissingExtra("The reference model of a LoRA adapter", "torch") from None
    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"PEFT cannot load {adapter}: {reason}.") from None


#: Reference models that are kept for their next use: that of the served weights, and one more.
KEPT = 2

#: Files that are told apart by their stamp: too large to be read for that.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def _holds_weights(file: Path) -> bool:
    return file.name.endswith(_WEIGHTS)


_Content = frozenset[tuple[object, ...]]

_kept: OrderedDict[_Content, Oracle] = OrderedDict()
_known: WeakValueDictionary[_Content, Oracle] = WeakValueDictionary()
"""Also those that only their users keep."""
_used: list[weakref.ref[Oracle]] = []
"""Those that may have a model in memory, the one used last at the end."""
_lock = threading.Lock()


def _use(oracle: Oracle) -> None:
    _used[:] = [each for each in _used if each() not in (None, oracle)]
    _used.append(weakref.ref(oracle))


def _release_one() -> bool:
    """Releases the reference model that was used the longest ago; false where there is none."""
    while _used:
        oracle = _used.pop(0)()
        if oracle is not None and oracle._loaded is not None:
            oracle.release()
            return True
    return False


def for_folder(folder: Path) -> Oracle:
    """The reference model of a folder, loaded once for the same files.

    A push makes a folder of its own of the served model's configuration and of links to the
    weights that it pushes. What counts is what is in a folder, not where it is: loading it again
    would give the same model, seconds later. A folder whose files have changed since is loaded
    again.

    Raises:
        MissingExtra, NotEnoughRoom, ModelError: see :class:`Oracle`.
    """
    with _lock:
        try:
            content = _content(folder)
        except OSError:
            return Oracle(folder)  # which says what is wrong with it
        oracle = _known.get(content)
        if oracle is None:
            while len(_kept) >= KEPT:
                _kept.popitem(last=False)
            oracle = Oracle(folder)
            # Files that were written to meanwhile may be half in it.
            if _content(folder) != content:
                return oracle
            _known[content] = oracle
        oracle.follow(folder)
        _kept[content] = oracle
        _kept.move_to_end(content)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
        return oracle


def forget() -> None:
    """Releases all reference models: a run is over."""
    with _lock, _computing:
        _kept.clear()
        for oracle in list(_known.values()):
            oracle.release()
        _known.clear()


def _content(folder: Path) -> _Content:
    """What tells a model folder from every other: the bytes of its small files, and of the
    weights which file they are, wherever links lead, and when it was written to."""
    found: set[tuple[object, ...]] = set()
    for file in folder.iterdir():
        if not file.is_file():
            continue
        if _holds_weights(file):
            found.add((file.name, file.stat().st_dev, *stamp(file)))
        else:
            found.add((file.name, hashlib.sha256(file.read_bytes()).digest()))
    return frozenset(found)
