"""The stand-ins of the CPU image, in a fresh interpreter each time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_harness._base import assets

DOCKER = assets.root() / "docker"
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


def in_a_server(tmp_path: Path, code: str, **environment: str) -> list[str]:
    """What ``code`` prints in a Python with a package ``sglang`` and the environment of a server.

    ``python()`` leaves ``SGLANG_USE_CPU_ENGINE`` out, as a Python that is no server has it.
    """
    package = tmp_path / "sglang"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(
        "import gc\nduring = gc.isenabled()\nfrom . import inner\nafter_inner = gc.isenabled()\n"
    )
    (package / "inner.py").write_text("import gc\nduring = gc.isenabled()\n")
    (package / "large.py").write_text("kept = [[] for _ in range(60_000)]\n")
    (package / "broken.py").write_text("raise ValueError('as it says')\n")
    (package / "launch_server.py").write_text("print(__name__, __spec__.name)\n")
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "TORCH_COMPILE_DISABLE": "1"} | environment
    code = f"import os, sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"
    lines = "".join(f"os.environ[{name!r}] = {value!r}; " for name, value in environment.items())
    again = "import quick_start; quick_start.install()\n"
    return printed(f"import os; {lines}\n{again}{code}")


def test_the_collector_rests_while_sglang_is_imported_and_no_longer(tmp_path: Path):
    code = """
import gc, sglang
print(sglang.during, sglang.inner.during, sglang.after_inner, gc.isenabled())
print(type(sglang.__loader__).__name__, sglang.__spec__.loader is sglang.__loader__)
import json.tool
print(gc.get_freeze_count() == 0, gc.isenabled())
import sglang.large
print(gc.get_freeze_count() >= 60_000, gc.isenabled())
try:
    import sglang.broken
except ValueError as error:
    print(error, gc.isenabled())
gc.disable()
del sys.modules["sglang.inner"]
import sglang.inner
print(gc.isenabled())
"""
    assert in_a_server(tmp_path, code) == [
        "False False False True",
        "SourceFileLoader True",
        "True True",
        "True True",
        "as it says True",
        "False",
    ]


def test_a_module_of_sglang_still_runs_as_a_program(tmp_path: Path):
    code = "import runpy; runpy.run_module('sglang.launch_server', None, '__main__', True)"
    assert in_a_server(tmp_path, code) == ["__main__ sglang.launch_server"]


TOLD = """
print(os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE"))
print(sum(type(finder).__module__ == "quick_start" for finder in sys.meta_path))
"""


def test_what_shortens_a_start_is_set_for_servers_on_a_cpu_only(tmp_path: Path):
    assert in_a_server(tmp_path, TOLD) == ["1 sglang_first_models", "1"]
    assert in_a_server(tmp_path, TOLD, TORCH_COMPILE_DISABLE="0") == [
        "None sglang_first_models",
        "1",
    ]
    assert in_a_server(tmp_path, TOLD, SGLANG_USE_CPU_ENGINE="0") == ["None None", "0"]


def test_what_a_user_sets_stays(tmp_path: Path):
    mine = {"TORCHDYNAMO_DISABLE": "0", "SGLANG_EXTERNAL_MODEL_PACKAGE": "mine"}
    assert in_a_server(tmp_path, TOLD, **mine)[0] == "0 mine"


def test_torch_gives_back_the_function_itself_where_it_compiles_nothing(tmp_path: Path):
    code = """
import torch
f = lambda x: x
print(torch.compile(f) is f, "torch._inductor.compile_fx" in sys.modules)
"""
    assert in_a_server(tmp_path, code) == ["True False"]


def test_transformers_is_asked_for_a_folder_under_one_name(tmp_path: Path):
    utils = tmp_path / "transformers" / "utils"
    utils.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").touch()
    (utils / "__init__.py").touch()
    (utils / "import_utils.py").write_text(
        "from functools import lru_cache\n\n\n@lru_cache\n"
        "def create_import_structure_from_path(module_path):\n"
        "    print('read', module_path)\n    return {'one': module_path}\n"
    )
    code = f"""
from pathlib import Path
from transformers.utils import import_utils
folder = {str(utils)!r}
ask = import_utils.create_import_structure_from_path
print(ask(Path(folder)) is ask(folder + "/__init__.py") is ask(folder))
"""
    assert in_a_server(tmp_path, code) == [f"read {utils}", "True"]


def test_the_models_that_are_imported_first_are_sglangs_own():
    for file in (STAND_INS / "sglang_first_models").glob("[!_]*.py"):
        assert file.read_text() == (
            f"from sglang.srt.models.{file.stem} import EntryClass as EntryClass\n"
        )


def test_every_stand_in_is_in_the_wheel():
    files = [p for p in STAND_INS.rglob("*") if p.suffix in (".py", ".pth")]
    assert len(files) == 13
    wheel = (STAND_INS / "pyproject.toml").read_text()
    for file in files:
        name = str(file.relative_to(STAND_INS))
        assert f'"{name.split("/")[0]}"' in wheel, name


@pytest.mark.parametrize("script", ["build.sh", "embedded.sh"])
def test_a_changed_stand_in_is_a_new_recipe(tmp_path: Path, script: str):
    # A file that is not in the recipe could change without a new image.
    (line,) = re.findall(r"^stand_ins\(\) .*$", (DOCKER / script).read_text(), re.MULTILINE)
    copy = tmp_path / "stand_ins"
    shutil.copytree(STAND_INS, copy)

    def recipe() -> str:
        told = ["sh", "-c", f"{line}\nstand_ins"]
        return subprocess.run(told, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    before = recipe()
    for file in STAND_INS.rglob("*"):
        if file.suffix in (".py", ".pth", ".toml"):
            assert f"{file.relative_to(STAND_INS.parent)}\n{file.read_text()}" in before
    (copy / "quick_start.pth").rename(copy / "slow_start.pth")
    assert recipe() != before
