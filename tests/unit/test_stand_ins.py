"""The stand-ins of the CPU image, in a fresh interpreter each time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_harness import shipped

DOCKER = shipped.root() / "docker"
STAND_INS = DOCKER / "stand_ins"


def python(code: str, *, installed: bool = True) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter says to ``code``, after the lines of the ``.pth`` files."""
    lines = [p.read_text().strip() for p in STAND_INS.glob("*.pth")] if installed else []
    return subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, code])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(STAND_INS), "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )


def printed(code: str) -> list[str]:
    done = python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ASKS_FOR_PINNED = """
import torch
made = [
    torch.arange(3, pin_memory=True), torch.empty(3, pin_memory=True).zero_(),
    torch.full((3,), 2, pin_memory=True), torch.ones(3, pin_memory=True),
    torch.tensor([1, 2], dtype=torch.int32, pin_memory=True, device="cpu"),
    torch.zeros(3, pin_memory=True), torch.ones(2).pin_memory(),
]
print([each.tolist() for each in made], made[4].dtype)
"""


def test_without_the_stand_in_torch_refuses_pinned_memory_here():
    done = python(ASKS_FOR_PINNED, installed=False)
    if "True" in python("import torch; print(torch.accelerator.is_available())").stdout:
        pytest.skip("this machine has an accelerator")
    assert done.returncode != 0
    assert "pin_memory=True requires" in done.stderr


def test_with_it_the_wish_is_left_out_and_the_values_are_what_was_asked_for():
    assert printed(ASKS_FOR_PINNED) == [
        "[[0, 1, 2], [0.0, 0.0, 0.0], [2, 2, 2], [1.0, 1.0, 1.0], [1, 2], [0.0, 0.0, 0.0], "
        "[1.0, 1.0]] torch.int32"
    ]


def test_nothing_heavy_is_imported_at_the_start_of_every_python():
    assert printed(
        "import sys; print(sorted({'torch', 'torchvision', 'numpy'} & set(sys.modules)))"
    ) == ["[]"]


def test_where_there_is_an_accelerator_the_wish_is_passed_on():
    code = """
import torch
torch.accelerator.is_available = lambda: True
for ask in (lambda: torch.zeros(2, pin_memory=True), lambda: torch.ones(2).pin_memory()):
    try:
        ask()
    except RuntimeError as error:
        print(type(error).__name__)
"""
    assert printed(code) == ["RuntimeError", "RuntimeError"]


def test_torch_is_as_it_was_for_everybody_else():
    code = """
import importlib.resources, inspect, pickle, sys
import torch
print(type(torch.__spec__.loader).__name__, torch.__loader__ is torch.__spec__.loader)
with torch.device("meta"):
    print(torch.empty(2).device, torch.tensor([1.0]).device)
print(torch.zeros(2, requires_grad=True).requires_grad, torch.zeros.__name__)
print(pickle.loads(pickle.dumps(torch.zeros)) is torch.zeros)
print(torch.zeros(2, out=torch.ones(2)).tolist())
try:
    torch.zeros(2, no_such_thing=True)
except TypeError as error:
    print("TypeError")
compiled = torch.compile(lambda x: x + torch.arange(2) + torch.zeros(2), backend="eager")
print(compiled(torch.ones(2)).tolist())
print(importlib.resources.files("torch").is_dir(), "torch" in inspect.getsource(torch))
"""
    assert printed(code) == [
        "SourceFileLoader True",
        "meta meta",
        "True zeros",
        "True",
        "[0.0, 0.0]",
        "TypeError",
        "[1.0, 2.0]",
        "True True",
    ]


def test_scripted_functions_still_know_torchs_own(tmp_path: Path):
    # Needs a file: torch reads the source of what it scripts.
    (tmp_path / "scripted.py").write_text(
        "import torch\n\n\n@torch.jit.script\ndef f(x: torch.Tensor):\n"
        "    return x + torch.zeros(2) + torch.arange(2)\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "import torch, scripted; print(scripted.f(torch.ones(2)).tolist())"
    assert printed(code) == ["[1.0, 2.0]"]


def test_installing_it_twice_is_installing_it_once():
    code = """
import sys, unpinned_memory
unpinned_memory.install()
print(sum(type(finder).__module__ == "unpinned_memory" for finder in sys.meta_path))
"""
    assert printed(code) == ["1"]


def test_every_stand_in_is_in_the_wheel_and_in_both_recipes():
    files = [p for p in STAND_INS.rglob("*") if p.suffix in (".py", ".pth")]
    assert len(files) == 5
    wheel = (STAND_INS / "pyproject.toml").read_text()
    for file in files:
        name = str(file.relative_to(STAND_INS))
        assert f'"{name.split("/")[0]}"' in wheel, name
        for script in ("build.sh", "embedded.sh"):
            # A file that is not in the recipe can change without a new image.
            assert re.search(rf"stand_ins/{re.escape(name)}\b", (DOCKER / script).read_text()), name
