"""Checks that another package brings: a real distribution on the path, found by its entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
from sglang_harness.suite import Check, Context, Mismatch, Observation, register

class Seen(Observation):
    tokens: int

@register
class Theirs(Check[Seen]):
    id = "acme/answers"
    sentence = "It answers."
    observation = Seen

    def observe(self, context: Context) -> Seen:
        return Seen(tokens=context.server.client.generate("Hello").completion_tokens)

    def judge(self, seen: Seen) -> list[Mismatch]:
        return [] if seen.tokens else [Mismatch("tokens", "some", "none")]
"""


def install(site: Path, source: str, name: str = "acme-checks") -> None:
    """What an installer would have left in ``site``."""
    module = name.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[sglang_harness.checks]\nmine = {module}\n")


def checks(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r}); "
        "from sglang_harness.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *(words or ("checks", "--json"))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_package_adds_a_check_by_being_installed(tmp_path: Path) -> None:
    install(tmp_path, GOOD)
    done = checks(tmp_path)
    assert done.returncode == 0, done.stderr
    listed = {row["id"]: row for row in json.loads(done.stdout)}
    assert listed["acme/answers"]["sentence"] == "It answers."
    assert "launch/phases" in listed


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (GOOD.replace("acme/answers", "launch/phases"), "Two checks have the id 'launch/phases'"),
        (GOOD.replace("acme/answers", "answers"), "not of the form subject/name"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1", "does not register any"),
    ],
)
def test_checks_that_cannot_be_added_are_refused_in_one_line(
    tmp_path: Path, source: str, words: str
) -> None:
    install(tmp_path, source)
    done = checks(tmp_path)
    assert done.returncode == 2
    assert "acme-checks (acme_checks)" in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_two_packages_with_one_id_are_an_error_that_names_the_second(tmp_path: Path) -> None:
    install(tmp_path, GOOD)
    install(tmp_path, GOOD, "beta-checks")
    done = checks(tmp_path)
    assert done.returncode == 2
    assert "beta-checks" in done.stderr
    assert "'acme/answers'" in done.stderr


def test_a_run_is_not_judged_while_a_packages_checks_are_broken(tmp_path: Path) -> None:
    """A suite that lacks checks would look like one that passed."""
    install(tmp_path, "raise RuntimeError('no')")
    recorded = Path(__file__).parent / "data" / "recorded-full-tiny-0.5.23.json"
    done = checks(tmp_path, "judge", str(recorded))
    assert done.returncode == 2
    assert "RuntimeError: no" in done.stderr
