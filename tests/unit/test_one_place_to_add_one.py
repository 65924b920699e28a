"""A newcomer adds one of each: one file, and at most one line beside it.

The package is copied, the newcomer's file and line are put into the copy, and a process that has
never heard of either is asked whether every place that shows such things shows the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sglang_harness

PACKAGE = Path(sglang_harness.__file__).parent

Asked = Callable[..., str]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    copy = tmp_path / "harness" / "sglang_harness"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parents[1] / "docker", tmp_path / "docker")
    shutil.copy(PACKAGE.parents[1] / "compose.yaml", tmp_path)
    return copy


@pytest.fixture
def ask(package: Path, tmp_path: Path) -> Asked:
    """Runs Python or the command over the copy; returns what it printed."""

    def ask(*command: str, code: str = "", exit_code: int = 0) -> str:
        program = code or "from sglang_harness.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "200"},
        )
        assert done.returncode == exit_code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return ask


def add_line(file: Path, after: str, line: str) -> None:
    """Puts one line behind the first that holds ``after``."""
    lines = file.read_text(encoding="utf-8").split("\n")
    place = next(n for n, text in enumerate(lines) if after in text)
    file.write_text("\n".join([*lines[: place + 1], line, *lines[place + 1 :]]), encoding="utf-8")


def test_a_check_of_a_new_subject(package: Path, ask: Asked):
    (package / "suite" / "checks" / "greeting.py").write_text(
        """
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, register


class Said(Observation):
    text: str


@register
class SaysHello(Check[Said]):
    id = "greeting/hello"
    sentence = "It says hello."
    observation = Said

    def observe(self, context: Context) -> Said:
        return Said(text=context.server.client.generate("Say hello.").text)

    def judge(self, seen: Said) -> list[Mismatch]:
        return [] if "hello" in seen.text else [Mismatch("text", "hello", seen.text)]
"""
    )
    add_line(package / "suite" / "checks" / "__init__.py", '"launch",', '    "greeting",')
    listed = json.loads(ask("checks", "--json"))
    assert [c["id"] for c in listed].count("greeting/hello") == 1
    assert "## greeting" in ask("checks", "--markdown"), "docs/checks.md is made from this"
    code = "from sglang_harness import suite; print([c.id for c in suite.select('quick', [])])"
    assert "greeting/hello" in ask(code=code)


def test_a_weight_route(package: Path, ask: Asked):
    (package / "weights" / "routes" / "pigeon.py").write_text(
        """
from sglang_harness.weights.routes.base import Job, Needs, Route, Sent, register
from sglang_harness.weights.routes.buckets import Bucket


@register
class Pigeon(Route):
    name = "pigeon"
    title = "carried by a pigeon"
    needs = Needs(posts=("/update_weights_from_pigeon",))

    def open(self, job: Job) -> None:
        raise NotImplementedError

    def send(self, bucket: Bucket) -> Sent:
        raise NotImplementedError
"""
    )
    code = "from sglang_harness.weights import routes; print(routes.names(), routes.markdown())"
    shown = ask(code=code)
    assert "'pigeon'" in shown
    assert "| `pigeon` | carried by a pigeon | `POST /update_weights_from_pigeon` |" in shown
    listed = {c["id"]: c for c in json.loads(ask("checks", "--json"))}
    assert "carried by a pigeon" in listed["weights/pigeon"]["sentence"]
    assert listed["weights/pigeon"]["needs"], "the suite asks what the route says that it needs"


IMPORTS_THE_TEAPOT = "from sglang_harness.runtime.teapot import KIND as TEAPOT"


def test_a_runtime(package: Path, ask: Asked, tmp_path: Path):
    (package / "runtime" / "teapot.py").write_text(
        """
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_harness.errors import EngineError
from sglang_harness.runtime import Kind, KindOption, Order, Running


class TeapotRuntime:
    name = "teapot"
    starts = True
    decides_gpus = False
    decides_model = False
    caveats = ("It was a teapot.",)

    def for_another_server(self) -> "TeapotRuntime":
        return self

    def prepare(self, order: Order) -> Running:
        raise EngineError("It is a teapot.")

    @contextmanager
    def keeping_parents(self) -> Iterator[None]:
        yield


KIND = Kind("teapot", lambda given: TeapotRuntime(), (KindOption("spout", "which spout"),))
"""
    )
    registry = package / "runtime" / "registry.py"
    add_line(registry, "from sglang_harness.spec import", IMPORTS_THE_TEAPOT)
    add_line(registry, "    process.KIND,", "    TEAPOT,")
    for given in (["--runtime", "teapot"], ["--spout", "left"]):
        told = ask("qualify", "--model", "tiny", "--out", "out", *given, exit_code=2)
        assert "It is a teapot." in told
        verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
        assert verdict["runtime"] == "teapot"
        assert "It was a teapot." in verdict["caveats"]
        shutil.rmtree(tmp_path / "out")
    told = ask("qualify", "--runtime", "docker", "--spout", "left", exit_code=2)
    assert "--spout belongs to the runtime 'teapot'" in told
    assert "which spout" in ask("qualify", "--help")
    code = "import pytest; pytest.main(['--help'])"
    assert "--sglang-spout" in ask(code=code)


def test_a_report(package: Path, ask: Asked, tmp_path: Path):
    (package / "report" / "haiku.py").write_text(
        """
from sglang_harness.verdict import Verdict


def text(verdict: Verdict) -> str:
    return f"{verdict.verdict}, and the frogs are silent\\n"
"""
    )
    registry = package / "report" / "__init__.py"
    registry.write_text(registry.read_text().replace("import junit,", "import haiku, junit,"))
    add_line(registry, 'Format("junit"', '    Format("haiku", "verdict.haiku", haiku.text),')
    code = f"""
from pathlib import Path
from sglang_harness import report
from sglang_harness.verdict import Verdict
saved = Verdict.read(Path({str(RECORDED)!r}))
print([str(p) for p in report.write_all(saved, Path("out"))])
"""
    (tmp_path / "out").mkdir(exist_ok=True)
    assert "verdict.haiku" in ask(code=code)
    assert (tmp_path / "out" / "verdict.haiku").read_text().endswith("the frogs are silent\n")


RECORDED = Path(__file__).parent / "data" / "recorded-full-tiny-0.5.23.json"


@pytest.mark.parametrize(
    ("registered", "says"),
    [
        ("suite/checks/launch.py", "Two checks have the id"),
        ("weights/routes/disk.py", "two routes are named"),
    ],
)
def test_a_second_of_the_same_name_is_an_error(
    package: Path, ask: Asked, registered: str, says: str
):
    file = package / registered
    copy = file.with_name("again.py")
    shutil.copy(file, copy)
    module = "sglang_harness." + registered.rsplit("/", 1)[0].replace("/", ".") + ".again"
    told = ask(code=f"from sglang_harness import suite; import {module}", exit_code=1)
    assert says in told
