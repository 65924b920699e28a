"""A kit from end to end without a GPU: a bare Python is described, a kit is built for it, unpacked
there with nothing of the harness's in reach, and gpu-check rehearsed with it.

The bare Python has torch for a CPU and, of the packages that the shipped target lists, those that
the harness's own environment for the CPU has: no SGLang, and none of what only the harness needs.
They are linked to that environment's files, package by package, from each one's list of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvml_mock import Scenario, environment, why_not
from sglang_harness._base import assets
from sglang_harness.kit import describe
from sglang_harness.kit.record import KitRecord
from sglang_harness.kit.target import Target
from sglang_harness.runtime import images
from sglang_harness.verdict import Verdict

pytestmark = pytest.mark.nightly

#: Seconds for building, for unpacking and for the rehearsal, on two slow cores that others use.
BUILT_WITHIN, UNPACKED_WITHIN, BUDGET = 1200, 300, 1200

MINOR = ".".join(map(str, sys.version_info[:2]))

#: What a kit brings, or does without: not even by accident on the bare Python.
NEVER_THERE = ("sglang", "sglang-cpu-stand-ins", "testcontainers", "docker", "pydantic", "fastapi")


def run(*words: str | Path, within: float, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=within, **options
    )


def link(distribution: importlib.metadata.Distribution, to: Path) -> None:
    """Links a package's files, those that its own list has, into another environment."""
    for file in distribution.files or []:
        source, target = Path(str(file.locate())), to / file
        if ".." in file.parts or "__pycache__" in file.parts or not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system
            target.symlink_to(source)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a host that a kit could be for, apart from its GPU."""
    if assets.pins()["PYTHON_VERSION"] != MINOR:
        pytest.skip(f"the CPU stack is pinned for Python {assets.pins()['PYTHON_VERSION']}")
    python = Path(images.run_script("embedded.sh", None, print, within=900))
    packages = python.parents[1] / "lib" / f"python{MINOR}" / "site-packages"
    listed = Target.read("h100-python3.12-torch2.11-cuda13").packages
    folder = tmp_path_factory.mktemp("host") / "python"
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, within=60)
    assert made.returncode == 0, made.stderr
    for distribution in importlib.metadata.distributions(path=[str(packages)]):
        name = describe.normalised(distribution.metadata["Name"])
        if name in listed and name not in NEVER_THERE:
            link(distribution, folder / "lib" / f"python{MINOR}" / "site-packages")
    return folder / "bin" / "python"


@dataclass(frozen=True)
class Unpacked:
    """An archive on the host: its folder, its record, and the Python that it is for."""

    folder: Path
    record: KitRecord
    bare: Path

    def gpu_check(
        self, *words: str | Path, within: float, env: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        command = self.folder / "gpu-check"
        return run(command, "--python", self.bare, *words, within=within, env=env, cwd=self.folder)


@pytest.fixture(scope="module")
def kit(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    """A kit that was built for the bare Python as describe.py saw it, and was carried there."""
    folder = tmp_path_factory.mktemp("kit")
    described = run(bare, "-I", describe.__file__, within=60)
    assert described.returncode == 0, described.stderr
    host = json.loads(described.stdout)
    assert not set(NEVER_THERE) & set(host["packages"]), "the bare Python is not bare"
    (folder / "target.json").write_text(described.stdout)
    built = run(
        *(sys.executable, "-m", "sglang_harness", "kit", "--target", folder / "target.json"),
        *("--gpu", "none", "--out", folder / "kit.tar"),
        within=BUILT_WITHIN,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    print(built.stdout)
    with tarfile.open(folder / "kit.tar") as archive:
        archive.extractall(folder, filter="data")
    there = folder / "sglang-harness-kit"
    return Unpacked(there, KitRecord.read(there / "kit.json"), bare)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a person on the host: nothing of this process's Python, the mock of the
    NVIDIA driver, a folder for temporary files in which nothing may be left."""
    if why := why_not():
        pytest.skip(why)
    # A short name: torch puts sockets there, whose paths have at most 108 bytes.
    scratch = Path(tempfile.mkdtemp(prefix="kit-"))
    mock = environment(Scenario(tmp_path / "scenario"))
    segments = set(Path("/dev/shm").iterdir())
    yield {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TMPDIR": str(scratch),
        "LD_LIBRARY_PATH": mock["LD_LIBRARY_PATH"],
        "NVML_MOCK_SCENARIO": mock["NVML_MOCK_SCENARIO"],
    }
    left_there = [path.name for path in scratch.iterdir()]
    shutil.rmtree(scratch)
    assert left_there == []
    left = set(Path("/dev/shm").iterdir()) - segments
    assert not [each for each in left if each.name.startswith(("torch_", "sglang"))]


def living_in(folder: Path) -> list[str]:
    """Processes that run something of a folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words):
            found.append(f"{process.info['pid']}: {' '.join(words)[:200]}")
    return found


def test_a_host_that_the_kit_is_not_for_is_one_line(kit: Unpacked, host: dict[str, str]) -> None:
    for words, why in (
        ((), "the kit has no kernels for GPUs: it is for a rehearsal, --device cpu."),
        (("--device", "cpu", "--unpack-to", "/proc/none"), "/proc/none cannot be written"),
    ):
        done = kit.gpu_check(*words, within=60, env=host)
        assert (done.returncode, done.stdout) == (3, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("not run: ")
        assert why in line
    assert not (kit.folder / "unpacked").exists()


def test_the_whole_of_gpu_check_is_rehearsed_from_the_kit(
    kit: Unpacked, host: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = kit.gpu_check(
        *("--device", "cpu", "--budget", str(BUDGET), "--slow", "4", "--out", out),
        within=UNPACKED_WITHIN + BUDGET + 120,
        env=host,
    )
    print(done.stdout)
    told = json.loads((out / "results.json").read_text())
    parts = {part["part"]: part for part in told["parts"]}
    failed = {name: p["message"] for name, p in parts.items() if p["outcome"] == "failed"}
    assert not failed, done.stdout + done.stderr
    # Not everything is run where there is no GPU, and that is no success.
    assert done.returncode == 3, done.stderr
    release = kit.record.releases[0]
    assert [r["version"] for r in told["kit"]["releases"]] == [release.version]
    held = {name for name, part in parts.items() if part["outcome"] == "held"}
    assert {"facts", "imports", "server-flags", "qualify-tiny", "cycles", "death"} <= held
    for name in set(parts) - held:
        assert parts[name]["outcome"] == "not run"
        assert parts[name]["message"], f"{name} does not say why it was not run"
    for name in ("figures", "ipc", "kernels", "release-resume", "second-gpu"):
        assert "rehearsal on the CPU" in parts[name]["message"]
    assert (out / "summary.txt").read_text().startswith("A REHEARSAL ON THE CPU: no GPU was seen")

    verdicts = [Verdict.read(file) for file in out.rglob("verdict.json")]
    assert verdicts, "no run of the suite has left its verdict"
    for verdict in verdicts:
        caveats = "\n".join(verdict.caveats)
        for stand_in in release.stand_ins:
            assert f"A stand-in for {stand_in.name}: " in caveats
        assert "A rehearsal on the CPU: sgl_kernel is a stand-in, and no GPU was seen." in caveats
        assert "without SGLang's kernels" in caveats
        assert "No container" in caveats

    assert living_in(kit.folder) == []
    beside = {path.name for path in kit.folder.iterdir()}
    assert beside - {path.name for path in out.iterdir()} == {
        *("README.txt", "describe.py", "gpu-check", "kit.json", "payload.tar.xz", "unpack.py"),
        "unpacked-cpu",
    }
