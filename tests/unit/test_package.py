"""The package as others get it: light to import, complete, and honest about what it needs."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_harness
from sglang_harness import suite
from sglang_harness._base import assets

SOURCE = Path(sglang_harness.__file__).parent
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def python(code: str, **variables: str) -> str:
    """What a fresh interpreter prints for ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_costs_nothing_that_it_does_not_need():
    loaded = json.loads(
        python("import json, sys, sglang_harness; print(json.dumps(sorted(sys.modules)))")
    )
    heavy = {"torch", "transformers", "docker", "requests", "testcontainers", "pydantic", "rich"}
    assert heavy & set(loaded) == set()


def test_the_client_alone_needs_neither_an_engine_nor_torch():
    loaded = json.loads(
        python(
            "import json, sys; from sglang_harness import Client, ServerDied; "
            "print(json.dumps(sorted(sys.modules)))"
        )
    )
    assert {"torch", "transformers", "docker", "testcontainers"} & set(loaded) == set()


def test_the_command_line_and_the_suite_do_not_load_torch():
    # 6 s of imports before 'version' answers.
    assert python("import sys, sglang_harness.cli; print('torch' in sys.modules)") == "False"


def test_every_public_name_is_there():
    for name in sglang_harness.__all__:
        assert getattr(sglang_harness, name) is not None
    assert sglang_harness.ServerSpec.__module__ == "sglang_harness.spec"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sglang_harness.no_such_name
    with pytest.raises(ImportError):
        exec("from sglang_harness import no_such_name", {})


def test_the_version_is_the_same_wherever_it_is_asked_for():
    assert importlib.metadata.version("sglang-harness") == sglang_harness.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", sglang_harness.__version__)


# --- what it needs ------------------------------------------------------------------------------

#: Where a distribution's module is called otherwise.
MODULES = {"pyyaml": "yaml", "nvidia-ml-py": "pynvml"}


#: Runs under a server's Python, not under this one.
SENDER = SOURCE / "peer" / "sender.py"


#: Programs of their own, started in processes that have torch or SGLang.
PROGRAMS = {
    SENDER,
    SOURCE / "gpu_check" / "kernels_beside_torch.py",
    *(SOURCE / "gpu_check" / "probes").glob("[a-z]*.py"),
}


def imported() -> dict[str, set[str]]:
    """Top-level modules that the source imports, and by which files."""
    found: dict[str, set[str]] = {}
    for file in SOURCE.rglob("*.py"):
        if file in PROGRAMS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top != "sglang_harness":
                    found.setdefault(top, set()).add(str(file.relative_to(SOURCE)))
    return found


def declared(extra: str = "torch") -> tuple[set[str], set[str]]:
    """Modules of the package's own dependencies, and of an extra."""
    # pytest brings the one of older Pythons.
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]

    def modules(requirements: list[str]) -> set[str]:
        names = [re.match(r"[A-Za-z0-9_.-]+", each) for each in requirements]
        found = {name[0].lower() for name in names if name is not None}
        return {MODULES.get(name, name) for name in found}

    return modules(project["dependencies"]), modules(project["optional-dependencies"][extra])


def test_every_import_is_of_something_that_is_installed_with_it():
    own, extra = declared()
    _, kit = declared("kit")
    # tokenizers comes with transformers, which the extra names.
    known = own | extra | kit | {"tokenizers"}
    unknown = {m: files for m, files in imported().items() if m not in known}
    assert unknown == {}


def test_what_runs_beside_a_server_needs_what_a_server_has():
    tops = set()
    for node in ast.walk(ast.parse(SENDER.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            tops.add((node.module or "").split(".")[0])
    assert tops - set(sys.stdlib_module_names) == {"torch", "sglang"}


def test_every_dependency_is_used():
    own, _ = declared()
    assert own - set(imported()) == set()


def test_what_only_the_extra_brings_is_imported_when_it_is_used_and_not_before():
    _, extra = declared()
    at_once = set()
    for file in SOURCE.rglob("*.py"):
        if file in PROGRAMS:
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            at_once |= {
                f"{file.relative_to(SOURCE)}: {n}" for n in names if n.split(".")[0] in extra
            }
    assert at_once == set()


WITHOUT_TORCH = """
import os, sys
for name in ("torch", "transformers", "tokenizers", "safetensors", "gguf", "accelerate", "peft"):
    sys.modules[name] = None
from pathlib import Path
from sglang_harness.errors import MissingExtra

def tried(what):
    try:
        what()
    except MissingExtra as error:
        print(error)
    else:
        print("no error")

from sglang_harness.checkpoint import locate
from sglang_harness.checkpoint.made import lora as adapter, perturb
from sglang_harness.oracle import Oracle
tried(lambda: locate("tiny", print))
tried(lambda: perturb.perturbed(Path("/nowhere"), Path("/nowhere"), 0))
tried(lambda: Oracle(Path("/nowhere")))
tried(lambda: adapter.made(Path("/nowhere"), Path("/nowhere"), 0))
tried(lambda: adapter.in_request(Path("/nowhere")))
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.made.training import teach
from sglang_harness.checkpoint.writing import write_torch
header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
file = Path(os.environ["SGLANG_HARNESS_CACHE"]) / "a.safetensors"
file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
# What is in a checkpoint can be looked at; its tensors cannot be had.
opened = open_checkpoint(file)
tried(lambda: list(opened.read()))
tried(lambda: teach(Path("/nowhere"), "a b", Path("/nowhere")))
tried(lambda: write_torch(Path("/nowhere"), {}))
import sglang_harness.cli
print("the command line is there")
"""


def test_without_torch_the_cure_is_named_and_the_rest_works(tmp_path: Path):
    lines = python(WITHOUT_TORCH, SGLANG_HARNESS_CACHE=str(tmp_path)).splitlines()
    assert lines[-1] == "the command line is there"
    assert len(lines) == 9
    for line in lines[:-1]:
        assert "pip install 'sglang-harness[torch]'" in line
    # Nothing half-made is left to be taken for a model the next time.
    assert list((tmp_path / "models").iterdir()) == []


# --- what is shipped with it --------------------------------------------------------------------


def test_every_version_that_is_needed_is_pinned_once():
    pins = assets.pins()
    assert set(pins) >= {
        "SGLANG_VERSION",
        "BASE_IMAGE",
        "PYTHON_VERSION",
        "DEBIAN_SUITE",
        "GPU_IMAGE",
        "SMOLLM2_PACKAGE",
        "SMOLLM2_SHA256",
    }
    for name, value in pins.items():
        # The same file is read by shell scripts.
        assert re.fullmatch(r"[A-Z0-9_]+", name), name
        assert re.fullmatch(r"[^\s'\"$`;&|<>]+", value), name
    text = (assets.root() / "docker" / "versions.env").read_text()
    assert len(pins) == sum("=" in x and not x.startswith("#") for x in text.splitlines())


def test_what_is_pinned_fits_together():
    pins = assets.pins()
    assert pins["GPU_IMAGE"].split("@")[0].endswith(f":v{pins['SGLANG_VERSION']}")
    assert re.fullmatch(r"[0-9a-f]{64}", pins["SMOLLM2_SHA256"])
    assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pins["SMOLLM2_PACKAGE"])
    assert pins["PYTHON_VERSION"] in pins["BASE_IMAGE"]


def test_names_of_pins_in_the_source_exist():
    used = set()
    for file in SOURCE.rglob("*.py"):
        used |= set(re.findall(r"pins(?:\(\))?\[['\"](\w+)['\"]\]", file.read_text()))
    assert used
    assert used <= set(assets.pins())


def test_what_the_source_reads_beside_itself_is_there():
    root = assets.root()
    for name in ("docker/build.sh", "docker/cpu.Dockerfile", "docker/launch.py", "compose.yaml"):
        assert (root / name).is_file(), name
    for name in ("py.typed", "suite/known_defects.yaml", "verdict.schema.json"):
        assert (SOURCE / name).is_file(), name


def test_the_docs_list_every_check_as_it_is() -> None:
    text = (assets.root() / "docs" / "checks.md").read_text(encoding="utf-8")
    assert suite.as_markdown() in text, "sglang-harness checks --markdown prints what belongs there"
