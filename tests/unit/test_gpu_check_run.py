"""The processes, the order and the files of gpu-check, with parts that are made up to misbehave."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import made_up_parts
from sglang_harness._base.living import lives_as, until_gone
from sglang_harness._base.signals import interruptions
from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import HarnessError, Interrupted, SpecError
from sglang_harness.gpu_check import one_child, record, run_parts, summary
from sglang_harness.gpu_check.part_log import KEPT, LAST
from sglang_harness.gpu_check.results import Note, PartResult, Results
from sglang_harness.gpu_check.settings import Release, Settings
from sglang_harness.upkeep.sweep import Swept

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that are made up take the place of the real ones, here and in child processes."""
    monkeypatch.setattr(run_parts, "TABLE", "made_up_parts")
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


class Checked:
    """One run in this process."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.lines: list[str] = []
        self.results: Results

    def run(
        self,
        *names: str,
        budget: float = 600.0,
        passed: float = 0.0,
        releases: tuple[str, ...] = (),
        say: Callable[[str], None] = lambda _: None,
        left_on_gpus: Callable[[], list[str]] = list,
        **more: Any,
    ) -> dict[str, PartResult]:
        def heard(line: str) -> None:
            self.lines.append(line)
            say(line)

        models = self.out.parent / "models"
        models.mkdir(exist_ok=True)
        settings = Settings(
            out=self.out,
            budget_seconds=budget,
            ends_at=time.time() + budget - passed,
            models=models,
            releases=[Release(version=v) for v in releases],
            **more,
        )
        folder = record.new_folder(self.out)
        self.results = run_parts.results_of(settings, {}, None)
        parts = run_parts.chosen(run_parts.table(), names)
        run = run_parts.Run(
            settings,
            parts,
            record.Record(folder),
            self.results,
            say=heard,
            left_on_gpus=left_on_gpus,
        )
        with interruptions() as signals:
            run.run(signals)
        return {f"{p.part} {p.release or ''}".strip(): p for p in self.results.parts}

    def saved(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text())

    def log(self, key: str) -> str:
        return (self.out / "parts" / f"{key}.log").read_text()


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    return Checked(tmp_path / "out")


# --- how a part can end --------------------------------------------------------------------------


def test_a_part_fails_where_python_is_told_to_remove_assertions(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    assert checked.run("asserts-nothing")["asserts-nothing"].outcome == "failed"


def test_each_way_to_end_has_its_outcome_and_its_message(checked: Checked):
    parts = checked.run(
        *("holds", "asserts", "asserts-nothing", "is-not-here", "breaks"),
        *("harness-error", "leaves-by-exit"),
    )
    line = made_up_parts.asserts_nothing.__code__.co_firstlineno + 1
    assert {name: (p.outcome, p.message) for name, p in parts.items()} == {
        "holds": ("held", ""),
        "asserts": ("failed", "7 bytes are in use, expected 0"),
        "asserts-nothing": (
            "failed",
            f"an assertion without a message: asserts_nothing, line {line}: "
            "assert context.settings.slow > 100",
        ),
        "is-not-here": ("not run", "no second kitchen"),
        "breaks": ("failed", "KeyError: 'a name'"),
        "harness-error": ("failed", "The pan is hot. Wait."),
        "leaves-by-exit": ("failed", "SystemExit: enough"),
    }
    assert parts["asserts"].figures == {"seen": 7}
    assert "Traceback" in checked.log("breaks")
    assert checked.results.exit_code == 1


def test_figures_are_json_whatever_a_part_returns(checked: Checked):
    checked.run("holds")
    text = (checked.out / "results.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    figures = json.loads(text, parse_constant=refuse)["parts"][0]["figures"]
    assert figures == {"answer": 42, "not a number": "nan", "where": "/somewhere"}
    assert checked.results.exit_code == 0


# --- a part that hangs ---------------------------------------------------------------------------


def test_a_part_that_hangs_is_killed_with_all_that_it_started_and_keeps_its_figures(
    checked: Checked,
):
    began = time.monotonic()
    parts = checked.run("hangs", "after-hangs")
    assert time.monotonic() - began < 30
    hung, after = parts["hangs"], parts["after-hangs"]
    assert hung.outcome == "failed"
    assert hung.message == "did not end within 3 s (where it was is in its log)"
    assert hung.figures.keys() == {"before"}
    assert not lives_as(hung.figures["before"])
    assert [note.what for note in hung.notes] == ["seen before it hung"]
    assert 3.0 <= hung.seconds < 15.0
    # Where it hung is in its log.
    assert "made_up_parts.py" in checked.log("hangs")
    assert "in hangs" in checked.log("hangs")
    assert after.outcome == "held"


def test_a_part_that_hears_no_signal_is_killed_too(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(one_child, "ENDS_WITHIN", 1.0)
    parts = checked.run("hangs-deaf")
    assert parts["hangs-deaf"].message == "did not end within 2 s (where it was is in its log)"
    assert "the last line before the silence" in checked.log("hangs-deaf")
    assert not [p for p in psutil.Process().children() if "gpu_check.child" in p.cmdline()]


def test_a_process_that_a_part_left_is_named_and_ended(checked: Checked):
    parts = checked.run("leaves-a-process")
    assert parts["leaves-a-process"].outcome == "held"
    pid = parts["leaves-a-process"].figures["pid"]
    assert not lives_as(pid)
    assert len(checked.results.notes) == 1
    assert checked.results.notes[0].startswith(f"After leaves-a-process: process {pid} (")
    assert checked.results.notes[0].endswith(" was left, and killed")
    assert checked.results.notes[0] in summary.page(checked.results)


def test_what_is_still_on_a_gpu_after_a_part_is_said(checked: Checked):
    checked.run("holds", left_on_gpus=lambda: ["GPU-a has 900 MiB in use, 3 MiB before."])
    assert checked.results.notes == ["After holds: GPU-a has 900 MiB in use, 3 MiB before."]


# --- a child process that ends -------------------------------------------------------------------


def test_a_crash_fails_its_part_alone_and_names_the_signal(checked: Checked):
    parts = checked.run("is-killed", "segfaults", "exits-at-once", "after-crashes")
    assert {name: p.outcome for name, p in parts.items()} == {
        "is-killed": "failed",
        "segfaults": "failed",
        "exits-at-once": "failed",
        "after-crashes": "held",
    }
    assert parts["is-killed"].message == "its process was ended by SIGKILL"
    assert parts["is-killed"].figures == {"before": 1}
    assert parts["segfaults"].message.startswith("its process was ended by SIGSEGV; the last line")
    assert "Fatal Python error: Segmentation fault" in checked.log("segfaults")
    assert parts["exits-at-once"].message == "its process ended with exit code 0"


def test_a_death_is_seen_although_a_fork_holds_the_pipes_open(checked: Checked):
    (part,) = checked.run("is-killed-with-a-fork").values()
    assert part.message == "its process was ended by SIGKILL"
    assert part.seconds < 10
    assert len(checked.results.notes) == 1
    assert checked.results.notes[0].endswith("was left, and killed")


def python_that(folder: Path, does: str) -> str:
    made = folder / "python"
    made.write_text(f"#!/bin/sh\n{does}\n")
    made.chmod(0o755)
    return str(made)


def test_a_process_that_cannot_begin_says_why(
    checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = python_that(tmp_path, "echo \"No module named 'pydantic'\"; exit 1")
    monkeypatch.setattr(sys, "executable", broken)
    (part,) = checked.run("pid").values()
    assert part.message == (
        "its process ended with exit code 1; the last line of its log: No module named 'pydantic'"
    )


def test_a_process_that_never_begins_is_ended_however_much_it_was_to_be_told(
    checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What it is told first does not fit into a pipe."""
    monkeypatch.setattr(sys, "executable", python_that(tmp_path, "exec sleep 600"))
    (part,) = checked.run("hangs-deaf", server_args={"long": "x" * 300_000}).values()
    assert part.message == "did not end within 2 s (where it was is in its log)"


def test_a_process_that_ends_between_two_parts_costs_neither(checked: Checked):
    def wait_for_its_end(line: str) -> None:
        if line.startswith("held     dies-afterwards"):
            until_gone(psutil.Process().children(), 10)

    parts = checked.run("dies-afterwards", "after-a-death", say=wait_for_its_end)
    assert [p.outcome for p in parts.values()] == ["held", "held"]
    assert checked.results.notes == [
        "After after-a-death: the child process ended with exit code 7 between two parts"
    ]


def test_a_process_that_does_not_end_well_after_its_last_part_is_said(checked: Checked):
    parts = checked.run("dies-afterwards")
    assert parts["dies-afterwards"].outcome == "held"
    assert checked.results.notes == [
        "After dies-afterwards: the child process ended with exit code 7 after its last part"
    ]


def test_containers_of_a_process_that_was_killed_are_removed(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
):
    def sweep() -> Swept:
        return Swept(removed=["container sglang-harness-1"], failed=["volume x: in use"])

    monkeypatch.setattr(run_parts, "sweep", sweep)
    parts = checked.run("is-killed", "after-crashes", runtime="docker")
    assert [p.outcome for p in parts.values()] == ["failed", "held"]
    assert checked.results.notes == [
        "After is-killed: container sglang-harness-1 was left, and removed",
        "After is-killed: not removed: volume x: in use",
    ]


# --- output --------------------------------------------------------------------------------------


def test_of_a_part_that_prints_without_end_the_beginning_and_the_end_are_kept(checked: Checked):
    parts = checked.run("talks")
    assert parts["talks"].outcome == "held"
    log = (checked.out / "parts" / "talks.log").stat().st_size
    assert KEPT < log < KEPT + 3 * LAST
    text = checked.log("talks")
    assert "bytes are left out here" in text
    assert text.rstrip().endswith("the last of many words")


def test_a_log_that_cannot_be_written_fails_no_part(checked: Checked):
    (checked.out / "parts" / "talks.log").mkdir(parents=True)
    (part,) = checked.run("talks").values()
    assert part.outcome == "held"


def test_what_a_part_starts_cannot_take_the_orders_of_the_next(checked: Checked):
    parts = checked.run("takes-the-input", "after-the-input")
    assert [p.outcome for p in parts.values()] == ["held", "held"]


def test_each_part_has_a_log_of_its_own(checked: Checked):
    parts = checked.run("asserts", "breaks")
    assert parts["asserts"].files == ["parts/asserts.log"]
    assert "7 bytes" in checked.log("asserts")
    assert "7 bytes" not in checked.log("breaks")


def test_no_secret_and_no_checkpoint_is_in_the_results(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
):
    ours, servers = "a-secret-of-this-machine", "0123456789abcdef" * 4
    monkeypatch.setenv("MADE_UP_API_KEY", ours)
    parts = checked.run("whispers")
    assert parts["whispers"].outcome == "failed"
    assert "parts/whispers/own.txt" in parts["whispers"].files
    for file in checked.out.rglob("*"):
        if file.is_file() and file.suffix != ".gz":
            text = file.read_bytes()
            assert ours.encode() not in text, file
            assert servers.encode() not in text, file
    assert "<redacted>" in (checked.out / "parts" / "whispers" / "own.txt").read_text()
    assert not any(ours in line or servers in line for line in checked.lines)
    with tarfile.open(checked.out / "results.tar.gz") as archive:
        names = archive.getnames()
        texts = [archive.extractfile(m).read() for m in archive.getmembers()]  # type: ignore[union-attr]
    assert sorted(names) == [
        "out/parts/whispers.log",
        "out/parts/whispers/own.txt",
        "out/results.json",
        "out/summary.txt",
    ]
    assert not any(ours.encode() in t or servers.encode() in t for t in texts)
    assert any("huge.txt" in note for note in checked.saved()["notes"])


# --- order, needs and the budget -----------------------------------------------------------------


def test_every_release_has_its_parts_and_what_comes_last_comes_after_all_of_them(checked: Checked):
    parts = checked.run("at-last", "serves", "serves-more", "pid", releases=("1.0", "0.5"))
    assert list(parts) == [
        *("pid", "serves 1.0", "serves-more 1.0", "serves 0.5", "serves-more 0.5"),
        *("at-last 1.0", "at-last 0.5"),
    ]
    pids = {name: part.figures["pid"] for name, part in parts.items()}
    assert pids["serves 1.0"] == pids["serves-more 1.0"]
    assert pids["serves 1.0"] != pids["serves 0.5"]


def test_parts_of_a_group_share_a_process_and_a_later_part_has_the_figures_of_the_earlier(
    checked: Checked,
):
    parts = checked.run("pid", "pid-again", "serves", releases=("1.0",))
    first, again, serves = parts["pid"], parts["pid-again"], parts["serves 1.0"]
    assert first.figures["pid"] == again.figures["pid"] == again.figures["earlier"]["pid"]
    assert serves.figures["pid"] != first.figures["pid"]
    assert serves.figures["earlier"]["pid"] == first.figures["pid"]


def test_what_is_missing_is_said_for_each_part(checked: Checked):
    parts = checked.run("on-two", "large", "serves", gpus=["GPU-a"])
    assert parts["on-two"].message == "one GPU"
    assert parts["large"].message.startswith("needs 1152921504.6 GB of disk, and ")
    assert parts["serves"].message.startswith("there is no SGLang here")
    assert {p.outcome for p in parts.values()} == {"not run"}
    assert checked.results.exit_code == 3


def test_in_a_rehearsal_nothing_runs_that_needs_a_gpu(checked: Checked):
    parts = checked.run("on-cuda", "on-two", "pid", device="cpu")
    assert parts["on-cuda"].message == parts["on-two"].message == "a rehearsal on the CPU"
    assert parts["pid"].outcome == "held"


def test_with_the_budget_used_up_the_rest_is_not_run(checked: Checked):
    parts = checked.run("long", "pid", budget=2000.0)
    assert parts["long"].outcome == "not run"
    assert re.fullmatch(r"(2000|19\d\d) s left", parts["long"].message)
    assert parts["pid"].outcome == "held"


def test_a_part_that_the_budget_cuts_short_has_not_failed(checked: Checked):
    parts = checked.run("hangs", "pid", budget=600.0, passed=599.0)
    assert parts["hangs"].outcome == "not run"
    assert parts["hangs"].message == "did not end within the 1 s that were left"
    assert (parts["pid"].outcome, parts["pid"].message) == ("not run", "0 s left")


# --- the files -----------------------------------------------------------------------------------


def test_results_are_written_as_each_part_ends(checked: Checked):
    seen: list[list[str]] = []

    def look(line: str) -> None:
        if line.startswith("held"):
            seen.append([part["part"] for part in checked.saved()["parts"]])

    checked.run("holds", "pid", "pid-again", say=look)
    assert seen == [["holds"], ["holds", "pid"], ["holds", "pid", "pid-again"]]
    assert checked.saved()["ended"].startswith("It ended after ")


def test_a_disk_that_is_full_for_a_while_ends_no_run(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
):
    full = iter([False, True, True])

    def write(path: Path, text: str) -> None:
        if path.name == "results.json" and next(full, False):
            raise OSError(28, "No space left on device")
        write_whole(path, text)

    monkeypatch.setattr(record, "write_whole", write)
    checked.run("holds")
    assert [line for line in checked.lines if "cannot be written" in line] == [
        f"The results cannot be written to {checked.out}: No space left on device."
    ]
    assert checked.saved()["parts"][0]["outcome"] == "held"


def test_results_that_cannot_be_written_at_the_end_are_an_error(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
):
    def write(path: Path, text: str) -> None:
        if path.name == "results.json":
            raise OSError(28, "No space left on device")
        write_whole(path, text)

    monkeypatch.setattr(record, "write_whole", write)
    with pytest.raises(HarnessError, match="No space left on device"):
        checked.run("holds")


def test_a_folder_with_results_of_an_earlier_run_is_refused(checked: Checked):
    checked.run("holds")
    with pytest.raises(SpecError, match="holds the results of an earlier run"):
        checked.run("holds")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpecError, match=r"file/out cannot be written to: Not a directory\."):
        record.new_folder(tmp_path / "file" / "out")


def test_a_second_run_of_the_day_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from datetime import date

    day = date(2026, 11, 28)
    monkeypatch.chdir(tmp_path)
    first = record.default_folder("NVIDIA H100 80GB HBM3", None, day)
    assert first == tmp_path / "gpu-check-nvidia-h100-80gb-hbm3-2026-11-28"
    first.mkdir()
    assert record.default_folder("NVIDIA H100 80GB HBM3", None, day).name == f"{first.name}-2"
    results = record.default_folder("NVIDIA H100 80GB HBM3", tmp_path / "checkout", day)
    assert results == (
        tmp_path / "checkout" / "bench" / "results" / "nvidia-h100-80gb-hbm3-2026-11-28"
    )


# --- signals and the command line ----------------------------------------------------------------

COMMAND = """
import sys
from sglang_harness.gpu_check import run_parts
run_parts.TABLE = "made_up_parts"
from sglang_harness.cli import main
sys.argv[0] = "sglang-harness"
main()
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, "gpu-check", "--device", "cpu", *words]


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "interrupted by Ctrl-C (SIGINT)"),
        (signal.SIGTERM, 143, "interrupted by SIGTERM"),
    ],
)
def test_a_signal_ends_the_children_and_leaves_a_summary_of_what_there_is(
    tmp_path: Path, number: int, code: int, words: str
):
    out = tmp_path / "out"
    names = ("holds", "hangs", "after-hangs")
    # So slow that the part hangs for as long as this test looks.
    run = subprocess.Popen(
        command(*(w for n in names for w in ("--part", n)), "--out", str(out), "--slow", "60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 60
    while not (out / "hung").exists():
        assert time.monotonic() < until, "the part never began to hang"
        time.sleep(0.05)
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(number)
    run.send_signal(number)  # a second one does not stop the clean-up
    said, _ = run.communicate(timeout=60)
    assert run.returncode == code, said
    assert "Traceback" not in said
    assert family
    assert not [p for p in family if lives_as(p.pid)]
    results = json.loads((out / "results.json").read_text())
    assert [(p["part"], p["outcome"]) for p in results["parts"]] == [
        ("holds", "held"),
        ("hangs", "not run"),
        ("after-hangs", "not run"),
    ]
    assert results["parts"][1]["message"].startswith(f"{words} after ")
    assert not lives_as(results["parts"][1]["figures"]["before"])
    assert results["parts"][2]["message"] == words
    assert words in (out / "summary.txt").read_text()
    with tarfile.open(out / "results.tar.gz") as archive:
        assert "out/results.json" in archive.getnames()


def test_a_run_that_is_killed_leaves_whole_results_and_no_child(tmp_path: Path):
    out = tmp_path / "out"
    run = subprocess.Popen(
        command("--part", "holds", "--part", "waits-a-moment", "--out", str(out)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    while not run.stdout.readline().startswith("held     holds"):
        assert run.poll() is None, "it ended by itself"
    until = time.monotonic() + 30
    while not (family := psutil.Process(run.pid).children(recursive=True)):
        assert time.monotonic() < until, "no child was started"
        time.sleep(0.01)
    run.kill()
    run.wait(30)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert [p["part"] for p in json.loads((out / "results.json").read_text())["parts"]] == ["holds"]


def test_a_reader_that_goes_away_ends_no_run(tmp_path: Path):
    out = tmp_path / "out"
    run = subprocess.Popen(
        command("--part", "holds", "--part", "pid", "--part", "pid-again", "--out", str(out)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline().startswith("gpu-check on the CPU")
    run.stdout.close()
    assert run.wait(60) == 0
    assert run.stderr is not None
    assert run.stderr.read() == ""
    results = json.loads((out / "results.json").read_text())
    assert [p["outcome"] for p in results["parts"]] == ["held"] * 3
    assert results["ended"]


def said_by(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--part", "no-such"), "--part 'no-such' is not a part. The parts are holds, "),
        (("--device", "tpu"), "--device 'tpu' is neither 'gpu' nor 'cpu'."),
        (("--runtime", "podman"), "--runtime 'podman' is neither 'process' nor 'docker'."),
        (("--budget", "0"), "--budget 0 is not a number above 0."),
        (("--slow", "nan"), "--slow nan is not a number above 0."),
        (("--image", "some/image"), "--image names what containers run from."),
        (("--kit", "/nowhere"), "--kit /nowhere: there is no kit.json in it or beside it."),
        (("--python", "/nowhere/python"), "/nowhere/python cannot be run: No such file"),
        (("--python", "/bin/false"), "/bin/false has no SGLang."),
        (("--server-arg", "=1"), "--server-arg '=1' names no flag."),
    ],
)
def test_a_mistake_in_its_use_is_one_line_and_exit_code_2(
    tmp_path: Path, words: tuple[str, ...], line: str
):
    done = said_by(*words, "--out", str(tmp_path / "out"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"sglang-harness: {line}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_says_first_that_no_gpu_was_seen(tmp_path: Path):
    done = said_by("--part", "holds", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "out" / "summary.txt").read_text()
    assert page.startswith("A REHEARSAL ON THE CPU: no GPU was seen")
    assert "42 MiB of 42" in page
    assert "memory:\n  what was asked  42 MiB" in page
    # The figures are on the terminal too: a page that is not carried away is lost.
    assert "what was asked  42 MiB" in done.stdout


def test_the_process_that_runs_the_parts_imports_no_torch(tmp_path: Path):
    """A CUDA context of its own would be on the GPU that it watches."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os\nopen(os.environ['SEEN'], 'a').write(f'{os.getpid()}\\n')\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
    seen = tmp_path / "seen"
    run = subprocess.Popen(
        command("--part", "imports-torch", "--out", str(tmp_path / "out")),
        env={**os.environ, "PYTHONPATH": path, "SEEN": str(seen)},
        stdout=subprocess.PIPE,
        text=True,
    )
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    importers = seen.read_text().split()
    assert len(importers) == 1
    assert importers != [str(run.pid)]


def test_an_interruption_in_this_process_is_not_swallowed(checked: Checked):
    def interrupt(_: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        checked.run("holds", "pid", say=interrupt)
    assert [p.outcome for p in checked.results.parts] == ["held", "not run"]


# --- the page that a person reads -----------------------------------------------------------------


def results(**more: Any) -> Results:
    known = {
        "date": "2026-11-28T03:00:00+00:00",
        "device": "gpu",
        "harness": "0.1.0",
        "budget_seconds": 480.0,
        "machine": {"device": ["NVIDIA H100, 79.6 GiB", "NVIDIA H100, 79.6 GiB"], "driver": "570"},
        "releases": {"0.5.15": ["kernels of sm90 only"], "0.5.23": []},
        "parts": [
            PartResult(part="figures", outcome="held", seconds=3.2, headline="off by 1 MiB"),
            PartResult(
                part="pushes",
                release="0.5.15",
                outcome="failed",
                message="disk: the checksums\ndiffer",
                notes=[Note(topic="weights", what="disk", value="1.2 GB/s")],
            ),
            PartResult(part="second-gpu", outcome="not run", message="one GPU"),
        ],
        "ended": "It ended after 300 s.",
    }
    return Results(**{**known, **more})


def test_the_page_begins_with_what_failed():
    lines = summary.page(results()).splitlines()
    assert lines[0] == (
        "gpu-check of 2026-11-28T03:00:00+00:00: 1 held, 1 failed, 1 not run. It ended after 300 s."
    )
    assert lines[1] == "  failed: pushes (0.5.15)"
    text = "\n".join(lines)
    assert "  device   NVIDIA H100, 79.6 GiB\n           NVIDIA H100, 79.6 GiB\n" in text
    assert "  SGLang   0.5.15\n           caveat: kernels of sm90 only\n" in text
    assert "failed   pushes (0.5.15)               0.0 s  disk: the checksums differ\n" in text
    assert "\nweights:\n  disk (0.5.15)  1.2 GB/s" in text
    assert "REHEARSAL" not in text


def test_the_page_of_a_run_that_goes_on_says_so():
    assert "It has not ended yet." in summary.page(results(ended=""))


def test_a_long_message_is_cut_and_says_where_the_rest_is():
    part = PartResult(part="pushes", outcome="failed", message="word " * 500)
    told = summary.line(part)
    assert len(told) < 500
    assert told.endswith("... (the rest is in results.json)")


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["held", "held"], 0),
        (["held", "failed", "not run"], 1),
        (["held", "not run"], 3),
        ([], 3),
    ],
)
def test_the_exit_code_is_that_of_the_worst_outcome(outcomes: list[Any], code: int):
    parts = [PartResult(part=f"p{n}", outcome=each) for n, each in enumerate(outcomes)]
    assert results(parts=parts).exit_code == code
