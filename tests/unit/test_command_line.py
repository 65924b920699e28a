"""The command as a person types it: a real process, no engine, and every mistake in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from scripted_server import BOUND

import sglang_harness
from sglang_harness import __version__, report, suite
from sglang_harness._base.signals import interruptions
from sglang_harness.errors import Interrupted, SpecError
from sglang_harness.spec import from_options
from sglang_harness.verdict import Verdict

RECORDED = Path(__file__).parent / "data" / "recorded-full-tiny-0.5.23.json"

#: Runs each command that it reads in a process of its own, by fork, so that the second of
#: imports is spent once and not twenty times.
RUN_EACH = """
import json, os, sys, time
from sglang_harness.cli import main

for order in map(json.loads, sys.stdin):
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in ((1, order["out"]), (2, order["error"])):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["sglang-harness", *order["words"]]
        main()
        os._exit(99)  # main() always exits
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, time.monotonic() - began]), flush=True)
"""

NO_ENGINE = "unix:///nonexistent.sock"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    error: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.error.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of this module's own, with the files that its commands name."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "broken.yaml").write_text("model: tiny\nport: [1\nimage: a\n")
    (folder / "cut.json").write_bytes(RECORDED.read_bytes()[:3000])
    (folder / "picture.json").write_bytes(b"\x89PNG\r\n\xff")
    recorded = json.loads(RECORDED.read_text())
    # Evidence that a judge cannot pass: the start never gave a token.
    launch = next(c for c in recorded["checks"] if c["id"] == "launch/phases")
    launch["evidence"]["first_tokens"] = 0
    (folder / "failing.json").write_text(json.dumps(recorded))
    (folder / "saved").mkdir()
    (folder / "saved" / "verdict.json").write_bytes(RECORDED.read_bytes())
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / "model" / name).touch(mode=0o644)
    return folder


def environment(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "COLUMNS", "FORCE_"))}
    own = {"HOME": str(home), "DOCKER_HOST": NO_ENGINE, "SGLANG_HARNESS_CACHE": str(home / "cache")}
    return {**kept, **own}


COMMANDS: dict[str, str] = {
    "version": "version",
    "help": "--help",
    "nothing": "",
    "checks": "checks",
    "checks as data": "checks --json",
    "judge a file": f"judge {RECORDED}",
    "judge a folder": "judge saved",
    "judge a failure": "judge failing.json",
    "judge a cut file": "judge cut.json",
    "judge a picture": "judge picture.json",
    "doctor": "doctor",
    "bad YAML": "qualify --spec broken.yaml",
    "unknown check": "qualify -k no-such-check",
    "unknown profile": "qualify --profile fast",
    "missing model": "qualify --model /nowhere/model",
    "bad flag": "qualify --server-arg =3",
    "bad option": "qualify --colour red",
    "bad number": "qualify --port http",
    "results onto a file": "qualify --model model --out cut.json",
    "no engine": "qualify --model model --out out --junit out/copy.xml",
    "sweep without an engine": "sweep",
    "down of a stranger": "down somebody",
}


@pytest.fixture(scope="module")
def ended(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """How each of the commands above ended."""
    written = tmp_path_factory.mktemp("written")
    orders = [
        {
            "words": words.split(),
            "out": str(written / f"{number}.out"),
            "error": str(written / f"{number}.error"),
        }
        for number, words in enumerate(COMMANDS.values())
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH],
        input="".join(json.dumps(order) + "\n" for order in orders),
        capture_output=True,
        text=True,
        cwd=home,
        env=environment(home),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    by_name = {
        name: Ended(code, Path(order["out"]).read_text(), Path(order["error"]).read_text(), seconds)
        for name, order, (code, seconds) in zip(COMMANDS, orders, ends, strict=True)
    }
    return by_name.__getitem__


MISTAKES = [
    ("bad YAML", "broken.yaml: line 3"),
    ("unknown check", "no-such-check"),
    ("unknown profile", "fast"),
    ("missing model", "/nowhere/model"),
    ("bad flag", "--server-arg"),
    ("bad option", "--colour"),
    ("judge a cut file", "cut.json"),
    ("results onto a file", "cut.json"),
    ("no engine", NO_ENGINE),
    ("sweep without an engine", NO_ENGINE),
    ("down of a stranger", "somebody"),
    pytest.param(
        *("bad number", "--port"),
    ),
    pytest.param(
        *("judge a picture", "picture.json"),
    ),
]


@pytest.mark.parametrize(("name", "told"), MISTAKES)
def test_every_mistake_is_one_line_and_exit_code_2(
    ended: Callable[[str], Ended], name: str, told: str
):
    end = ended(name)
    assert end.code == 2
    assert "Traceback" not in end.error + end.out
    assert len(end.error_lines) == 1, end.error
    assert end.error.startswith("sglang-harness: ")
    assert told in end.error
    # Minutes of pulling or building would be the wrong time to find out.
    assert end.seconds < 20


def test_without_an_engine_the_way_out_is_told(ended: Callable[[str], Ended]):
    assert "doctor" in ended("no engine").error


def test_a_saved_run_is_judged_again_from_its_file_or_its_folder(
    ended: Callable[[str], Ended],
):
    for name in ("judge a file", "judge a folder"):
        end = ended(name)
        assert (end.code, end.error) == (0, ""), end.out
        assert "PASS" in end.out
        assert "Traceback" not in end.out


def test_a_judgement_that_changed_is_told_and_is_exit_code_1(ended: Callable[[str], Ended]):
    end = ended("judge a failure")
    assert end.code == 1
    assert "launch/phases: was pass, is now fail" in end.out
    assert "FAIL" in end.out


def test_judging_writes_nothing(ended: Callable[[str], Ended], home: Path):
    ended("judge a folder")
    assert [f.name for f in (home / "saved").iterdir()] == ["verdict.json"]
    assert (home / "saved" / "verdict.json").read_bytes() == RECORDED.read_bytes()


def test_checks_are_listed_as_data_for_programs(ended: Callable[[str], Ended]):
    end = ended("checks as data")
    assert (end.code, end.error) == (0, "")
    rows = json.loads(end.out)
    assert [row["id"] for row in rows] == list(suite.registered())
    for row in rows:
        assert row["sentence"].endswith(".")
        assert row["profile"] in ("quick", "full")
        assert isinstance(row["needs"], list)


def test_checks_are_listed_as_a_table_for_people(ended: Callable[[str], Ended]):
    end = ended("checks")
    assert end.code == 0
    # Ids are folded and not cut where the window is narrow.
    text = re.sub(r"[\s│]", "", end.out)
    assert "…" not in text
    for check_id in suite.registered():
        assert check_id.split("/")[0] in text


def test_the_version_is_printed_alone(ended: Callable[[str], Ended]):
    end = ended("version")
    assert (end.code, end.out, end.error) == (0, f"{__version__}\n", "")


def test_the_installed_command_is_the_same_one(home: Path):
    command = Path(sys.executable).parent / "sglang-harness"
    done = subprocess.run(
        [command, "version"], capture_output=True, text=True, env=environment(home), timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_a_python_without_installed_scripts_has_it_as_a_module(home: Path):
    done = subprocess.run(
        [sys.executable, "-m", "sglang_harness", "version"],
        capture_output=True,
        text=True,
        env=environment(home),
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_a_python_without_what_the_package_needs_is_told_so_in_one_line(home: Path):
    done = subprocess.run(
        [sys.executable, "-S", "-m", "sglang_harness", "version"],  # -S: nothing that is installed
        capture_output=True,
        text=True,
        env={**environment(home), "PYTHONPATH": str(Path(sglang_harness.__file__).parents[1])},
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sglang-harness: {sys.executable} lacks the package typer. ")
    assert done.stderr.count("\n") == 1


def test_help_names_every_command(ended: Callable[[str], Ended]):
    end = ended("help")
    assert (end.code, end.error) == (0, "")
    for command in ("qualify", "up", "down", "sweep", "doctor", "judge", "checks", "version"):
        assert command in end.out


def test_the_command_alone_prints_its_help_and_no_empty_error(ended: Callable[[str], Ended]):
    end = ended("nothing")
    assert end.code == 2
    assert "qualify" in end.out + end.error
    assert "sglang-harness: \n" not in end.error


def test_a_doctor_without_an_engine_says_so_and_is_no_success(ended: Callable[[str], Ended]):
    end = ended("doctor")
    assert end.code == 2
    told = " ".join(end.out.split())
    assert f"No Docker engine answers at {NO_ENGINE}" in told
    # It goes on to the end: everything that can be looked at without one was.
    for subject in ("versions", "disk", "GPU"):
        assert subject in told


def test_a_doctor_gives_each_advice_once(ended: Callable[[str], Ended]):
    assert " ".join(ended("doctor").out.split()).count("systemctl start docker") == 1


def test_no_command_leaves_anything_where_it_was_run(ended: Callable[[str], Ended], home: Path):
    before = {"broken.yaml", "cut.json", "picture.json", "failing.json"}
    for name in COMMANDS:
        ended(name)
    assert {f.name for f in home.iterdir() if f.is_file()} == before
    # 'out' was asked for, and says why there was no server.
    assert {f.name for f in (home / "out").iterdir()} == {*report.FILES, "server.log", "copy.xml"}
    assert Verdict.read(home / "out" / "verdict.json").verdict == "error"


# --- options and files together -----------------------------------------------------------------


def test_options_win_over_the_file_and_say_no_more_than_they_were_given(home: Path):
    file = home / "inner"
    file.mkdir(exist_ok=True)
    file = file / "spec.yaml"
    file.write_text(
        "model: tiny\nserver_args: {tp_size: 1, dtype: half}\nlimits: {start: 1800, check: 60}\n"
    )
    spec = from_options(
        file,
        {"start": 5.0, "check": None},
        ["tp-size=2", "--enable-lora", "skip-x=False", "path=a=b", "empty="],
        model=None,
        port=31000,
    )
    assert (spec.model, spec.port) == ("tiny", 31000)
    assert (spec.limits.start, spec.limits.check, spec.limits.run) == (5.0, 60.0, 5400.0)
    assert spec.server_args == {
        "tp-size": "2",
        "dtype": "half",
        "enable-lora": True,
        "skip-x": False,
        "path": "a=b",
        "empty": "",
    }


@pytest.mark.parametrize("word", ["", "=", "--", "--=3", "-"])
def test_a_flag_without_a_name_is_refused(word: str):
    with pytest.raises(SpecError, match="names no flag"):
        from_options(None, {}, [word])


# --- interruption -------------------------------------------------------------------------------

STAND_BY = """
import sys, time
from sglang_harness import cli
from sglang_harness._base.signals import interruptions
from sglang_harness.spec import from_options
from sglang_harness.verdict import Verdict

@cli.app.command("stand-by")
def stand_by() -> None:
    with interruptions():
        try:
            print("here", flush=True)
            time.sleep(30)
        except Exception:
            print("swallowed by an ordinary handler", flush=True)
        finally:
            print("cleaning", flush=True)
            sys.stdin.readline()
            print("cleaned", flush=True)

cli.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_an_interruption_cleans_up_is_told_and_cannot_be_interrupted_again(
    home: Path, number: signal.Signals, code: int, told: str
):
    with subprocess.Popen(
        [sys.executable, "-c", STAND_BY, "stand-by"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home),
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            process.send_signal(number)
            assert process.stdout.readline() == "cleaning\n"
            # Somebody impatient: again, and the other one too.
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            out, error = process.communicate("go on\n", timeout=BOUND)
        finally:
            process.kill()
    assert out == "cleaned\n"
    assert process.returncode == code
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1
    assert told in lines[0]
    assert "Traceback" not in error


def test_a_signal_that_comes_while_things_are_put_away_is_remembered_and_raises_nothing():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with interruptions() as state:
        state.calm()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert state.seen is not None
    # The first is the one that counts: the exit code is made from it.
    assert state.seen.signal_number == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_first_signal_raises_once_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    cleaned: list[bool] = []

    def work() -> None:
        with interruptions():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned.append(True)

    with pytest.raises(Interrupted) as caught:
        work()
    assert cleaned
    assert caught.value.signal_number == signal.SIGINT
    # Whoever handles errors must not take it for one.
    assert not isinstance(caught.value, Exception)
    assert signal.getsignal(signal.SIGINT) is before


def test_elsewhere_than_in_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)

    def inside() -> bool:
        with interruptions():
            return signal.getsignal(signal.SIGINT) is before

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result(BOUND)
