"""Which checkpoint a name means, the tiny model, and other weights for the same model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sglang_harness._base.permissions import check_readable
from sglang_harness.checkpoint import check_folder, locate
from sglang_harness.checkpoint.made import tiny
from sglang_harness.checkpoint.made.perturb import one_perturbed, perturbed
from sglang_harness.errors import ModelError


def quietly(_: str) -> None:
    return None


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own: nothing of the user's is read or written."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_HARNESS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tiny_folder(cache: Path) -> Path:
    folder = locate("tiny", quietly)
    assert folder is not None
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The smallest folder that passes for a checkpoint."""
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").touch()
    return folder


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content(folder: Path) -> dict[str, str]:
    return {file.name: digest(file) for file in folder.iterdir()}


# --- tiny ---------------------------------------------------------------------------------------


def test_a_tiny_model_is_written_once_and_found_again(tiny_folder: Path, cache: Path):
    assert tiny_folder.is_relative_to(cache)
    weights = tiny_folder / "model.safetensors"
    before = weights.stat()
    assert locate("tiny", quietly) == locate("tiny:0", quietly) == tiny_folder
    after = weights.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    # Nothing half-made was left beside it.
    assert [f.name for f in tiny_folder.parent.iterdir()] == [tiny_folder.name]


def test_a_tiny_model_can_be_loaded_by_a_server_of_another_user(tiny_folder: Path):
    check_folder(tiny_folder)
    check_readable(tiny_folder)


def test_the_same_seed_gives_the_same_model_on_another_day(tiny_folder: Path, tmp_path: Path):
    # Whatever else has drawn random numbers meanwhile.
    torch.manual_seed(1234)
    tiny.write(tmp_path / "again", 0)
    assert content(tmp_path / "again") == content(tiny_folder)


def test_making_a_model_does_not_disturb_its_callers_random_numbers(tmp_path: Path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny.write(tmp_path / "model", 5)
    assert torch.equal(torch.rand(3), expected)


def test_another_seed_gives_other_weights_for_the_same_model(tiny_folder: Path):
    other_folder = locate("tiny:1", quietly)
    assert other_folder is not None
    one, other = (
        load_file(tiny_folder / "model.safetensors"),
        load_file(other_folder / "model.safetensors"),
    )
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {
        n: (t.shape, t.dtype) for n, t in other.items()
    }
    # Norm weights begin as ones in every model; everything else is random.
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert same == {name for name in one if "norm" in name}
    for name in ("config.json", "tokenizer.json"):
        assert digest(tiny_folder / name) == digest(other_folder / name)


def test_half_a_model_that_a_killed_process_left_is_made_anew(cache: Path, tiny_folder: Path):
    name = tiny_folder.name.replace("seed0", "seed42")
    half = cache / "models" / name
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    whole = locate("tiny:42", quietly)
    assert whole == half
    check_folder(half)
    assert load_file(half / "model.safetensors")


@pytest.mark.parametrize("name", ["tiny:", "tiny:-1", "tiny:a", "tiny:1234567890", "Tiny", "tiny "])
def test_what_is_almost_a_name_is_no_model(name: str):
    with pytest.raises(ModelError, match="does not exist"):
        locate(name, quietly)


# --- a folder -----------------------------------------------------------------------------------


def refused(model: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        locate(model, quietly)
    assert caught.value.advice
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_folder_is_taken_as_it_is_even_with_a_blank_in_its_name(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    assert locate(str(model), quietly) == model
    # What reaches the engine is never relative, and a link is followed.
    monkeypatch.chdir(model.parent)
    assert locate("a model", quietly) == locate("./a model", quietly) == model
    (model.parent / "link").symlink_to(model)
    assert locate("link", quietly) == model
    monkeypatch.setenv("HOME", str(model.parent))
    assert locate("~/a model", quietly) == model


def test_a_file_in_place_of_a_folder_is_told_as_such(model: Path):
    assert "is a file" in str(refused(str(model / "config.json")))


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/at/all",
        "./nowhere",
        "../nowhere",
        "~/nowhere",
        "nowhere",
        "my models/llama 3",
        "a/b/c",
        "https://huggingface.co/a/b",
        "C:\\models\\a",
    ],
)
def test_a_path_that_is_not_there_is_not_sent_to_the_hub(name: str):
    error = refused(name)
    assert name in str(error)
    assert "owner/name" in error.advice


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "a/b_c.d"])
def test_a_hub_name_is_left_to_the_server(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    assert locate(name, quietly) is None


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "a" * 5000])
def test_a_path_that_cannot_be_one_is_refused_like_any_other(name: str):
    refused(name)


def test_each_part_that_is_missing_is_named_before_a_server_is_started(model: Path):
    (model / "tokenizer.json").unlink()
    assert "tokenizer" in str(refused(str(model)))
    (model / "model.safetensors").unlink()
    assert "no weights" in str(refused(str(model)))
    (model / "config.json").unlink()
    assert "no config.json" in str(refused(str(model)))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "vocab.json"], ids=lambda n: n
)
def test_every_kind_of_tokenizer_and_of_weights_is_known(model: Path, name: str):
    (model / "tokenizer.json").unlink()
    (model / name).touch()
    (model / "model.safetensors").rename(model / "pytorch_model-00001-of-00002.bin")
    assert locate(str(model), quietly) == model


@pytest.mark.parametrize(
    "config",
    [b"", b"{", b"\xff\xfe{", b"[]", b"null", b"{}", b'{"architectures": []}', b'"text"'],
)
def test_a_broken_configuration_is_told_by_its_name(model: Path, config: bytes):
    (model / "config.json").write_bytes(config)
    with pytest.raises(ModelError, match=r"config\.json"):
        locate(str(model), quietly)


def test_a_configuration_that_is_a_folder_is_no_configuration(model: Path):
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert "no config.json" in str(refused(str(model)))


def test_shards_that_the_index_names_and_nobody_downloaded_are_missed(model: Path):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in str(refused(str(model)))


# --- other weights ------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two shards, every dtype that checkpoints come in, and tensors of odd shapes."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    save_file(
        {
            "embed.weight": torch.randn(32, 8, generator=draw),
            "half.weight": torch.randn(16, 8, generator=draw).to(torch.bfloat16),
            "fp16.weight": torch.randn(16, 8, generator=draw).to(torch.float16),
        },
        folder / "model-00001-of-00002.safetensors",
        metadata={"format": "pt", "made by": "a test"},
    )
    save_file(
        {
            "norm.weight": torch.ones(8),
            "scale": torch.tensor(2.0),
            "one": torch.tensor([0.5]),
            "position_ids": torch.arange(16),
            "mask": torch.tensor([True, False]),
        },
        folder / "model-00002-of-00002.safetensors",
    )
    (folder / "config.json").write_text('{"architectures": ["X"]}')
    (folder / "inner").mkdir()
    return folder


def test_every_float_changes_and_names_shapes_dtypes_and_shards_do_not(mixed: Path, tmp_path: Path):
    before = {file.name: digest(file) for file in mixed.iterdir() if file.is_file()}
    made = perturbed(mixed, tmp_path / "new" / "other", seed=3)
    # The index, without which nothing but this reader finds the second shard.
    assert {f.name for f in made.iterdir()} == {*before, "model.safetensors.index.json"}
    # Only the weights are other ones; and what was there is as it was.
    assert digest(made / "config.json") == before["config.json"]
    assert {file.name: digest(file) for file in mixed.iterdir() if file.is_file()} == before
    one, other = tensors(mixed), tensors(made)
    assert {n: (t.shape, t.dtype) for n, t in other.items()} == {
        n: (t.shape, t.dtype) for n, t in one.items()
    }
    for name, tensor in one.items():
        if tensor.is_floating_point():
            assert not torch.equal(tensor, other[name]), f"{name} did not change"
            assert torch.isfinite(other[name]).all()
        else:
            assert torch.equal(tensor, other[name]), f"{name} is no weight"
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert set(load_file(mixed / shard)) == set(load_file(made / shard))
    with safe_open(made / "model-00001-of-00002.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    check_readable(made)


def test_the_noise_is_in_proportion_to_each_tensor(mixed: Path, tmp_path: Path):
    one, other = tensors(mixed), tensors(perturbed(mixed, tmp_path / "other", seed=3))
    by = (other["embed.weight"] - one["embed.weight"]).std() / one["embed.weight"].std()
    assert float(by) == pytest.approx(0.05, rel=0.3)
    # A tensor without a spread of its own is not wiped out either.
    assert float((other["norm.weight"] - 1).abs().max()) < 0.5


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(mixed: Path, tmp_path: Path):
    torch.manual_seed(99)
    one, again, other = (
        content(perturbed(mixed, tmp_path / name, seed=seed))
        for name, seed in (("one", 3), ("again", 3), ("other", 4))
    )
    assert one == again
    assert all(one[name] != other[name] for name in one if name.endswith(".safetensors"))


def test_the_tiny_model_perturbed_is_a_whole_checkpoint(tiny_folder: Path, tmp_path: Path):
    made = perturbed(tiny_folder, tmp_path / "other", seed=1)
    check_folder(made)
    check_readable(made)
    assert content(made).keys() == content(tiny_folder).keys()


def test_a_source_in_another_layout_comes_out_as_safetensors(mixed: Path, tmp_path: Path):
    before = tensors(mixed)
    for file in mixed.glob("*.safetensors"):
        file.unlink()
    torch.save({"state_dict": before}, mixed / "pytorch_model.bin")
    other = tensors(made := perturbed(mixed, tmp_path / "other", seed=0))
    assert {f.name for f in made.iterdir()} == {"config.json", "model.safetensors"}
    assert {n: (t.shape, t.dtype) for n, t in other.items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    assert not torch.equal(other["embed.weight"], before["embed.weight"])


def test_a_source_that_cannot_be_read_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path
):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read") as caught:
        perturbed(model, tmp_path / "other", seed=0)
    assert caught.value.advice
    assert not (tmp_path / "other").exists()


def test_one_tensor_changes_and_every_other_stays_to_the_bit(mixed: Path, tmp_path: Path):
    one = tensors(mixed)
    made = one_perturbed(mixed, tmp_path / "other", "half.weight", seed=3)
    other = tensors(made)
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["half.weight"]
    # It is what the same seed makes of it among all others.
    everything = tensors(perturbed(mixed, tmp_path / "all", seed=3))
    assert torch.equal(other["half.weight"], everything["half.weight"])
    check_readable(made)


@pytest.mark.parametrize("name", ["position_ids", "mask", "no.such.weight"])
def test_one_tensor_that_cannot_change_is_refused(mixed: Path, tmp_path: Path, name: str):
    with pytest.raises(ModelError, match=name) as caught:
        one_perturbed(mixed, tmp_path / "other", name, seed=3)
    assert "weight" in caught.value.advice
    assert not (tmp_path / "other").exists()


def test_a_folder_that_is_there_already_is_never_mixed_with_another(mixed: Path, tmp_path: Path):
    target = tmp_path / "other"
    shutil.copytree(mixed, target)
    before = content_of_files(target)
    with pytest.raises(FileExistsError):
        perturbed(mixed, target, seed=0)
    assert content_of_files(target) == before


def content_of_files(folder: Path) -> dict[str, str]:
    return {file.name: digest(file) for file in folder.iterdir() if file.is_file()}
