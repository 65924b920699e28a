"""What somebody has who only installed the wheel: no checkout, no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_harness._base import assets

CHECKOUT = Path(assets.__file__).resolve().parents[3]
RECORDED = CHECKOUT / "tests" / "unit" / "data" / "recorded-full-tiny-0.5.23.json"


def run(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    built = run(
        sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", folder, CHECKOUT
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("sglang_harness-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment that holds the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    assert run(sys.executable, "-m", "venv", folder / "venv").returncode == 0
    pip = folder / "venv" / "bin" / "pip"
    done = run(pip, "install", "-qq", "-c", CHECKOUT / "constraints.txt", wheel)
    assert done.returncode == 0, done.stderr
    return folder / "venv" / "bin"


def test_a_saved_run_is_judged_with_the_base_install(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "python", "-c", "import torch").returncode != 0
    done = run(installed / "sglang-harness", "judge", RECORDED, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout


def test_a_missing_extra_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = run(installed / "sglang-harness", "model", "tiny", cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "pip install 'sglang-harness[torch]'" in done.stderr


def test_the_wheel_carries_what_is_needed_to_build_and_run(installed: Path) -> None:
    program = "from sglang_harness._base import assets; print(assets.root())"
    root = Path(run(installed / "python", "-c", program).stdout.strip())
    assert root.is_relative_to(installed.parent)
    for name in ("build.sh", "engine.sh", "cpu.Dockerfile", "launch.py", "versions.env"):
        ours, theirs = CHECKOUT / "docker" / name, root / "docker" / name
        assert theirs.read_bytes() == ours.read_bytes()
    assert (root / "compose.yaml").exists()
    assert (root / ".env").read_bytes() == (CHECKOUT / "docker" / "versions.env").read_bytes()
    # The same files are the same image: the tag is made of their content.
    both = [run("sh", folder / "docker" / "build.sh") for folder in (CHECKOUT, root)]
    assert both[0].stdout.splitlines()[-1] == both[1].stdout.splitlines()[-1]


def example_of_the_readme() -> str:
    """The Python block under 'In your own tests', as a reader copies it."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    section = text.split("## In your own tests")[1]
    return section.split("```python\n")[1].split("```")[0]


def test_the_readmes_example_runs_as_pasted_in_a_folder_of_its_own(
    wheel: Path, tmp_path: Path
) -> None:
    """With the wheel, and the extra [torch] that the README installs (lent from here)."""
    environment = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", environment).returncode == 0
    done = run(environment / "bin" / "pip", "install", "-qq", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr
    (site,) = environment.glob("lib/python*/site-packages")
    here = next(p for p in sys.path if p.endswith("site-packages"))
    # Only behind the wheel's own folder: the harness itself is the one out of the wheel.
    (site / "lent.pth").write_text(here + "\n")
    where = "import sglang_harness; print(sglang_harness.__file__)"
    found = run(environment / "bin" / "python", "-c", where, cwd=tmp_path).stdout
    assert found.startswith(str(environment))
    project = tmp_path / "project"
    project.mkdir()
    example = example_of_the_readme()
    assert len(example.strip().splitlines()) <= 12
    (project / "test_mine.py").write_text(example)
    python = environment / "bin" / "python"
    done = run(python, "-m", "pytest", "-p", "no:cacheprovider", cwd=project)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "2 passed" in done.stdout
    assert "sglang: 1 server started (" in done.stdout
