"""A server runs as another user: what it may not read is found before it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_harness._base.permissions import check_readable, make_readable
from sglang_harness.errors import ModelError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as ``save_file`` leaves it under a careful umask."""
    folder = tmp_path / "my model"
    (folder / "inner").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "inner/more.json"):
        (folder / name).write_text("{}")
    make_readable(folder)
    return folder


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_was_written_here_is_readable_for_every_user(model: Path):
    for path, before in ((model, 0o700), (model / "inner", 0o700), (model / "config.json", 0o600)):
        path.chmod(before)
    (model / "inner" / "more.json").chmod(0o400)
    make_readable(model)
    assert mode(model) == mode(model / "inner") == 0o755
    assert mode(model / "config.json") == mode(model / "inner" / "more.json") == 0o644


def test_a_single_file_is_made_readable_too(tmp_path: Path):
    file = tmp_path / "adapter.safetensors"
    file.touch(mode=0o600)
    make_readable(file)
    assert mode(file) == 0o644


def test_a_readable_model_is_taken(model: Path):
    check_readable(model)
    # More than needed does not matter, nor does a link to a file that is readable.
    (model / "config.json").chmod(0o777)
    (model / "linked.json").symlink_to(model / "config.json")
    check_readable(model)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("model.safetensors", 0o600),
        ("model.safetensors", 0o640),
        ("inner/more.json", 0o600),
        ("inner", 0o750),
        # Listed but not entered: every file in it looks missing.
        ("inner", 0o754),
        (".", 0o700),
    ],
)
def test_a_model_that_its_server_could_not_read_is_refused_with_the_cure(
    model: Path, name: str, bits: int
):
    (model / name).chmod(bits)
    with pytest.raises(ModelError) as caught:
        check_readable(model)
    text = str(caught.value)
    assert str(model / name) in text
    assert f"mode {bits:o}" in text
    # The command can be copied although the name has a blank in it.
    assert f"chmod -R a+rX '{model}'" in text


def test_the_cure_that_is_named_cures(model: Path):
    (model / "model.safetensors").chmod(0o600)
    (model / "inner").chmod(0o700)
    make_readable(model)
    check_readable(model)


def test_a_link_to_a_file_of_somebody_else_is_looked_through(model: Path, tmp_path: Path):
    # The hub's cache is made of links: what counts is the file at their end.
    blob = tmp_path / "blob"
    blob.touch(mode=0o600)
    blob.chmod(0o600)
    (model / "linked.safetensors").symlink_to(blob)
    with pytest.raises(ModelError, match="linked"):
        check_readable(model)


def test_a_link_to_nothing_is_the_loaders_business(model: Path):
    (model / "dangling").symlink_to(model / "gone")
    check_readable(model)
