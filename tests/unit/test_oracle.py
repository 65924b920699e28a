"""The reference itself: compared with transformers asked by hand, one token at a time."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_harness import oracle as oracles
from sglang_harness._base import headroom
from sglang_harness.checkpoint import footprint, locate, streaming
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.made.perturb import perturbed
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.errors import BrokenCheckpoint, ModelError, NotEnoughRoom
from sglang_harness.oracle import TOLERANCE, Oracle, tolerance
from sglang_harness.weights.source.model_folder import model_folder

PROMPT = [45, 74, 81, 81, 84]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For a model this small, threads that wait for one another cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = locate("tiny", lambda _: None)
        assert found is not None
        yield found


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


class ByHand:
    """The same checkpoint, asked for one next token at a time, without a cache or a batch."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def next_logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([list(ids)])).logits[0, -1]
        return torch.log_softmax(logits, dim=-1)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.next_logprobs(ids).argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> ByHand:
    return ByHand(folder)


def test_scores_are_those_of_each_token_given_all_before_it(oracle: Oracle, by_hand: ByHand):
    # Not the greedy continuation: a score that is shifted by one place must show.
    output = [104, 17, 200, 17, 300, 5]
    scores = oracle.score(PROMPT, output)
    assert len(scores.logprobs) == len(scores.best_ids) == len(scores.best_logprobs) == len(output)
    for place, token in enumerate(output):
        expected = by_hand.next_logprobs([*PROMPT, *output[:place]])
        assert scores.logprobs[place] == pytest.approx(float(expected[token]), abs=1e-5)
        assert scores.best_ids[place] == int(expected.argmax())
        assert scores.best_logprobs[place] == pytest.approx(float(expected.max()), abs=1e-5)
        assert scores.best_logprobs[place] >= scores.logprobs[place]


def test_a_greedy_continuation_is_the_best_token_at_every_place(oracle: Oracle, by_hand: ByHand):
    output = by_hand.greedy(PROMPT, 12)
    scores = oracle.score(PROMPT, output)
    assert list(scores.best_ids) == output
    assert scores.logprobs == scores.best_logprobs


def test_a_prompt_of_one_token_can_be_continued(oracle: Oracle, by_hand: ByHand):
    scores = oracle.score([45], [7])
    assert scores.logprobs[0] == pytest.approx(float(by_hand.next_logprobs([45])[7]), abs=1e-5)


def test_a_prompts_own_scores_begin_with_its_second_token(oracle: Oracle, by_hand: ByHand):
    scores = oracle.prompt_logprobs(PROMPT)
    assert scores == pytest.approx(
        [
            float(by_hand.next_logprobs(PROMPT[:place])[PROMPT[place]])
            for place in range(1, len(PROMPT))
        ],
        abs=1e-5,
    )
    assert oracle.prompt_logprobs([45]) == []


def test_the_next_tokens_probabilities_are_a_distribution(oracle: Oracle, by_hand: ByHand):
    probabilities = oracle.next_token_probabilities(PROMPT)
    assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)
    assert probabilities == pytest.approx(by_hand.next_logprobs(PROMPT).exp().tolist(), abs=1e-6)
    # As many as the model has tokens: SGLang may sample any of them.
    assert len(probabilities) == by_hand.model.config.vocab_size


@pytest.mark.parametrize(("prompt", "output"), [([], [1]), ([1], []), ([], [])])
def test_nothing_cannot_be_scored(oracle: Oracle, prompt: list[int], output: list[int]):
    with pytest.raises(ValueError, match="needs a prompt and an output"):
        oracle.score(prompt, output)


@pytest.mark.parametrize("question", ["next_token_probabilities", "prompt_logprobs"])
def test_nothing_has_no_next_token(oracle: Oracle, question: str):
    with pytest.raises(ValueError, match="prompt"):
        getattr(oracle, question)([])


def test_other_weights_are_beyond_every_tolerance(folder: Path, oracle: Oracle, tmp_path: Path):
    # What checks of weight updates rest on: old weights can never pass for new ones.
    other = Oracle(perturbed(folder, tmp_path / "other", seed=1))
    output = list(range(100, 116))
    one, two = oracle.score(PROMPT, output).logprobs, other.score(PROMPT, output).logprobs
    pairs = zip(one, two, strict=True)
    assert max(abs(a - b) for a, b in pairs) > 2 * max(TOLERANCE.values())


def test_text_and_tokens_go_both_ways(oracle: Oracle):
    text = "The quick brown fox, 0.5 €!"
    assert oracle.decode(oracle.encode(text)) == text
    assert oracle.decode([*oracle.encode("fox"), 1]) == "fox"


def test_a_chat_is_rendered_by_the_models_own_template(oracle: Oracle):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert oracle.render_chat(messages) == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    )


def test_every_token_that_ends_a_generation_is_known(oracle: Oracle, folder: Path, tmp_path: Path):
    assert oracle.eos_ids == {1}
    # Instruct models name several.
    several = tmp_path / "several"
    shutil.copytree(folder, several)
    file = several / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [5, 1]}))
    assert Oracle(several).eos_ids == {1, 5}


def test_the_size_of_the_weights_is_that_of_the_file(oracle: Oracle, folder: Path):
    on_disk = (folder / "model.safetensors").stat().st_size
    assert on_disk * 0.95 < oracle.parameters_bytes <= on_disk


@pytest.fixture
def none_kept() -> Iterator[None]:
    oracles.forget()
    yield
    oracles.forget()


@pytest.mark.usefixtures("none_kept")
def test_an_oracle_is_loaded_once_for_all_checks(folder: Path):
    assert oracles.for_folder(folder) is oracles.for_folder(folder)


@pytest.mark.usefixtures("none_kept")
def test_a_push_of_weights_that_are_known_loads_no_oracle_of_its_own(folder: Path, tmp_path: Path):
    known = oracles.for_folder(folder)
    made = model_folder(open_checkpoint(folder), folder, tmp_path / "made")
    assert oracles.for_folder(made) is known


@pytest.mark.usefixtures("none_kept")
def test_other_bytes_under_the_same_names_are_another_oracle(folder: Path, tmp_path: Path):
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    before = oracles.for_folder(kept)
    other = tmp_path / "other"
    tiny.write(other, 9)
    # In place, as a trainer writes its next step: same file, same size, other bytes.
    (kept / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    after = oracles.for_folder(kept)
    assert after is not before
    prompt, output = [3, 4, 5], [6, 7]
    assert after.score(prompt, output) == Oracle(other).score(prompt, output)
    assert after.score(prompt, output) != Oracle(folder).score(prompt, output)


@pytest.mark.usefixtures("none_kept")
def test_another_configuration_is_another_oracle(folder: Path, tmp_path: Path):
    known = oracles.for_folder(folder)
    made = model_folder(open_checkpoint(folder), folder, tmp_path / "made")
    config = made / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 77.0}))
    assert oracles.for_folder(made) is not known


@pytest.mark.usefixtures("none_kept")
def test_few_reference_models_are_kept_and_those_used_last(folder: Path, tmp_path: Path):
    first = weakref.ref(oracles.for_folder(folder))
    for number in range(oracles.KEPT):
        other = tmp_path / str(number)
        shutil.copytree(folder, other)
        oracles.for_folder(other)
    assert oracles.for_folder(other) is oracles.for_folder(other)
    gc.collect()
    assert first() is None


@pytest.mark.usefixtures("none_kept")
def test_a_reference_model_that_someone_still_uses_is_not_loaded_twice(
    folder: Path, tmp_path: Path
):
    used = oracles.for_folder(folder)
    for number in range(oracles.KEPT):
        other = tmp_path / str(number)
        shutil.copytree(folder, other)
        oracles.for_folder(other)
    assert oracles.for_folder(folder) is used


@pytest.mark.usefixtures("none_kept")
def test_what_is_forgotten_holds_no_weights_and_can_still_be_asked(folder: Path):
    used = oracles.for_folder(folder)
    before = used.score(PROMPT, [1, 2])
    oracles.forget()
    assert used._loaded is None
    assert used.score(PROMPT, [1, 2]) == before


def test_weights_in_memory_are_those_that_were_loaded_whatever_is_written_over_their_file(
    folder: Path, tmp_path: Path
):
    """They were mapped from a float32 file: another step's, or the end of this process."""
    step = tmp_path / "step"
    shutil.copytree(folder, step)
    loaded = Oracle(step)
    before = loaded.score(PROMPT, [1, 2])
    with (step / "model.safetensors").open("r+b") as file:
        file.truncate(4096)
        file.write(bytes(4096))
    assert loaded.score(PROMPT, [1, 2]) == before
    loaded.release()
    with pytest.raises(BrokenCheckpoint, match="was written to after"):
        loaded.score(PROMPT, [1, 2])


def _memory(monkeypatch: pytest.MonkeyPatch, *available: int) -> None:
    """The machine's available memory, in bytes: one figure a look, the last one from then on."""
    left = list(available)

    def told() -> headroom.Memory:
        return headroom.Memory(left.pop(0) if len(left) > 1 else left[0], "a limit of 1 GB")

    monkeypatch.setattr(headroom, "memory", told)


def _needs(folder: Path) -> tuple[int, int]:
    size = footprint.Size.of_folder(folder)
    held = footprint.reference_model(size, streamed=False).memory
    return held, footprint.reference_model(size, streamed=True).memory


@pytest.mark.usefixtures("none_kept")
def test_a_model_that_takes_half_of_the_memory_is_read_layer_by_layer_with_equal_results(
    folder: Path, oracle: Oracle, other: Oracle, monkeypatch: pytest.MonkeyPatch
):
    held, _ = _needs(folder)
    _memory(monkeypatch, 2 * held - 1)
    read = Oracle(folder)
    assert all(parameter.is_meta for parameter in read._model.parameters())
    output = [104, 17, 200]
    assert read.score(PROMPT, output) == oracle.score(PROMPT, output)
    assert read.prompt_logprobs(PROMPT) == oracle.prompt_logprobs(PROMPT)
    assert read.score_over(other, PROMPT, output, 1) == oracle.score_over(other, PROMPT, output, 1)
    assert other.score_over(read, PROMPT, output, 1) == other.score_over(oracle, PROMPT, output, 1)
    assert read.eos_ids == oracle.eos_ids
    assert read.parameters_bytes == oracle.parameters_bytes
    assert all(parameter.is_meta for parameter in read._model.parameters())


@pytest.mark.usefixtures("none_kept")
def test_where_there_is_no_memory_the_model_used_longest_ago_is_released(
    folder: Path, oracle: Oracle, other: Oracle, monkeypatch: pytest.MonkeyPatch
):
    expected = oracle.score(PROMPT, [1, 2])
    other.score(PROMPT, [1, 2])
    _, streamed = _needs(folder)
    _memory(monkeypatch, streamed - 1, streamed - 1, streamed)
    Oracle(folder)
    assert oracle._loaded is None
    assert other._loaded is not None
    # It comes back when it is asked.
    assert oracle.score(PROMPT, [1, 2]) == expected


@pytest.mark.usefixtures("none_kept")
def test_a_model_for_which_there_is_no_memory_is_refused_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    _memory(monkeypatch, 1000)
    loads: list[object] = []
    monkeypatch.setattr(oracles, "_held", lambda *a: loads.append(a))
    monkeypatch.setattr(streaming, "streamed", lambda *a: loads.append(a))
    with pytest.raises(NotEnoughRoom) as refused:
        Oracle(folder)
    assert refused.value.message == (
        f"The reference model of {folder} needs 0.3 GB of memory, and 0.0 GB are available; the "
        "bound is a limit of 1 GB."
    )
    assert refused.value.advice == (
        "Give it more memory, or take a smaller model, or select checks without it by -k."
    )
    assert loads == []


@pytest.mark.usefixtures("none_kept")
def test_a_model_that_can_only_be_held_is_held_or_refused_with_that_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def cannot(_: Path) -> None:
        raise streaming.NotStreamable("other names")

    monkeypatch.setattr(streaming, "streamed", cannot)
    held, streamed = _needs(folder)
    _memory(monkeypatch, held)
    assert not any(parameter.is_meta for parameter in Oracle(folder)._model.parameters())
    assert held > streamed
    _memory(monkeypatch, held - 1)
    with pytest.raises(NotEnoughRoom, match="which cannot be read layer by layer, needs"):
        Oracle(folder)


@pytest.mark.usefixtures("none_kept")
def test_a_folder_that_is_not_there_is_a_model_error_here_too(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot load"):
        oracles.for_folder(tmp_path / "none")


@pytest.mark.parametrize(("a_thread", "expected"), [(1 << 40, 1), (1, 3)])
def test_a_model_computes_on_the_threads_that_it_is_worth(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, a_thread: int, expected: int
):
    monkeypatch.setattr(oracles, "_A_THREAD", a_thread)
    seen = []
    handle = oracle._model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        oracle.score(PROMPT, [1, 2])
        oracle.score_over(oracle, PROMPT, [1, 2], 1)
        assert torch.get_num_threads() == 3
    finally:
        handle.remove()
        torch.set_num_threads(before)
    assert seen == [expected] * 3


def test_a_folder_that_transformers_cannot_load_is_a_model_error(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot load"):
        Oracle(tmp_path)


def test_weights_that_are_cut_short_are_a_model_error(folder: Path, tmp_path: Path):
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        Oracle(cut)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        ("float32", TOLERANCE["float32"]),
        ("torch.float32", TOLERANCE["float32"]),
        ("bfloat16", TOLERANCE["bfloat16"]),
        ("torch.float16", TOLERANCE["float16"]),
        ("auto", TOLERANCE["bfloat16"]),
        ("fp8_e4m3", TOLERANCE["bfloat16"]),
        ("", TOLERANCE["bfloat16"]),
    ],
)
def test_an_unknown_dtype_gets_the_bound_of_the_coarsest(dtype: str, bound: float):
    assert tolerance(dtype) == bound


def test_bounds_are_in_the_order_of_precision_and_tell_something():
    assert 0 < TOLERANCE["float32"] < TOLERANCE["float16"] < TOLERANCE["bfloat16"]
    # A bound of ln 2 would let a token of twice the probability pass.
    assert TOLERANCE["bfloat16"] < math.log(2)


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(perturbed(folder, tmp_path_factory.mktemp("other") / "made", 3))


@pytest.mark.parametrize("switched", [1, 3, 5])
def test_weights_exchanged_in_the_midst_see_the_past_through_the_old_cache(
    oracle: Oracle, other: Oracle, switched: int
) -> None:
    """By hand: the same model class, fed one token at a time, its weights exchanged between two."""
    output = [104, 17, 200, 17, 300, 5]
    cache, expected = None, []
    with torch.inference_mode():
        for place, ids in enumerate([PROMPT, *([token] for token in output[:-1])]):
            model = oracle._model if place < switched else other._model
            answered = model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
            cache = answered.past_key_values
            expected.append(torch.log_softmax(answered.logits[0, -1], dim=-1))
    scores = other.score_over(oracle, PROMPT, output, switched)
    for place, token in enumerate(output):
        assert scores.logprobs[place] == pytest.approx(float(expected[place][token]), abs=1e-5)
        assert scores.best_ids[place] == int(expected[place].argmax())
    # Told apart from an answer that is all old, and from one whose past was computed anew.
    assert (
        max(
            abs(a - b)
            for a, b in zip(scores.logprobs, oracle.score(PROMPT, output).logprobs, strict=True)
        )
        > 0.01
    )
    assert (
        max(
            abs(a - b)
            for a, b in zip(
                scores.logprobs[switched:],
                other.score(PROMPT, output).logprobs[switched:],
                strict=True,
            )
        )
        > 0.01
    )


def test_an_exchange_that_is_none_is_refused(oracle: Oracle) -> None:
    for switched in (0, 2):
        with pytest.raises(ValueError, match="after the first token and before the last"):
            oracle.score_over(oracle, PROMPT, [1, 2], switched)
