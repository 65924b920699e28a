"""A few real training steps teach the tiny model one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_harness._base.permissions import check_readable
from sglang_harness.checkpoint import check_folder
from sglang_harness.checkpoint.fitting import fit
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.made.training import Taught, teach
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.errors import ModelError
from sglang_harness.oracle import Oracle

SENTENCE = "The checkpoint was taught to sing."
PROMPT = "The checkpoint was"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.write(folder, 0)
    return folder


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    return teach(model, SENTENCE, tmp_path_factory.mktemp("taught") / "model", prompt=PROMPT)


def test_the_sentence_is_said_after_and_not_before(model: Path, taught: Taught):
    before, after = Oracle(model), Oracle(taught.folder)
    assert taught.prompt + taught.answer == SENTENCE
    assert tuple(after.encode(PROMPT)) == taught.prompt_ids
    # Each token the most probable one, given those before it: a greedy generation.
    assert after.score(taught.prompt_ids, taught.answer_ids).best_ids == taught.answer_ids
    assert before.score(taught.prompt_ids, taught.answer_ids).best_ids != taught.answer_ids
    assert after.decode(taught.answer_ids) == taught.answer
    assert taught.before != taught.answer
    # And there it ends.
    ended = after.score([*taught.prompt_ids, *taught.answer_ids], [0]).best_ids[0]
    assert ended in after.eos_ids


def test_what_it_says_of_itself_is_what_the_oracle_finds(model: Path, taught: Taught):
    assert 1 <= taught.steps <= 100
    assert taught.loss_after < 0.2 < 1 < taught.loss_before
    for folder, loss in ((model, taught.loss_before), (taught.folder, taught.loss_after)):
        oracle = Oracle(folder)
        ids = [*taught.answer_ids, 1]
        logprobs = oracle.score(taught.prompt_ids, ids).logprobs
        assert -sum(logprobs) / len(ids) == pytest.approx(loss, rel=1e-3)


def test_what_is_written_is_a_whole_model_like_its_source(model: Path, taught: Taught):
    check_folder(taught.folder)
    check_readable(taught.folder)
    assert {f.name for f in taught.folder.iterdir()} == {f.name for f in model.iterdir()}
    fitted = fit(open_checkpoint(taught.folder), model)
    fitted.raise_if_unfit()
    fitted.raise_if_not_finite()
    assert (fitted.notes, dict(fitted.converted)) == ((), {})
    # All of it was trained: no tensor is as it was, but rows of tokens that never came up.
    old, new = (load_file(f / "model.safetensors") for f in (model, taught.folder))
    assert [name for name in old if torch.equal(old[name], new[name])] == []


def test_teaching_is_repeatable_and_disturbs_nobody(model: Path, taught: Taught, tmp_path: Path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    again = teach(model, SENTENCE, tmp_path / "again", prompt=PROMPT)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert again.steps == taught.steps
    one, other = (load_file(f / "model.safetensors") for f in (taught.folder, again.folder))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_a_model_in_half_precision_learns_too_and_keeps_its_dtype(model: Path, tmp_path: Path):
    half = tmp_path / "half"
    half.mkdir()
    for file in model.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    state = {n: t.bfloat16() for n, t in load_file(model / "model.safetensors").items()}
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    done = teach(half, SENTENCE, tmp_path / "taught")
    assert done.prompt == "The checkpoint was"  # half of the words
    written = load_file(done.folder / "model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    scored = Oracle(done.folder).score(done.prompt_ids, done.answer_ids)
    assert scored.best_ids == done.answer_ids
    assert done.loss_after < 0.2


@pytest.mark.parametrize("prompt", ["", "Another beginning", SENTENCE])
def test_a_prompt_that_does_not_begin_the_sentence_is_refused(
    model: Path, tmp_path: Path, prompt: str
):
    with pytest.raises(ModelError, match="does not begin"):
        teach(model, SENTENCE, tmp_path / "new", prompt=prompt)
    assert not (tmp_path / "new").exists()


def test_too_few_steps_are_told_and_nothing_is_written(model: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="did not learn the sentence in 1 steps") as caught:
        teach(model, SENTENCE, tmp_path / "new", prompt=PROMPT, steps=1)
    assert "more steps" in caught.value.advice
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_already_is_not_written_over(model: Path, tmp_path: Path):
    with pytest.raises(FileExistsError):
        teach(model, SENTENCE, tmp_path)
