"""'sglang-harness kit' and 'kit describe': what is asked for, and mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_harness.errors import KitError
from sglang_harness.kit import describe, lock
from sglang_harness.kit.releases import catalogue
from sglang_harness.kit.request import USUAL_TARGET, Host, Request, described, request
from sglang_harness.kit.target import Target, shipped


def asked(**changes: object) -> Request:
    words: dict[str, object] = {
        "target": None,
        "host": Host(),
        "gpu": None,
        "versions": [],
        "lock": None,
        "out": None,
        "largest": 58.0,
    }
    return request(**{**words, **changes})  # type: ignore[arg-type]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    program = "from sglang_harness.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "kit", *words], capture_output=True, text=True
    )


def test_without_options_it_is_the_shipped_target_with_its_lock():
    wanted = asked()
    assert wanted.target == Target.read(USUAL_TARGET)
    assert wanted.lock == lock.shipped(USUAL_TARGET)
    assert wanted.lock is not None
    assert wanted.lock.releases == ("0.5.15", "0.5.23")


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_lock_is_for_its_target_and_has_each_wheel_once(name: str):
    target, found = Target.read(name), lock.shipped(name)
    assert found is not None
    releases = catalogue().choose(target.torch_release or "", list(found.releases))
    found.fits(target, releases)
    for release in releases:
        names = [p.name for p in found.of(release.version)]
        assert len(names) == len(set(names))
        assert {"sglang", "sglang-kernel"} <= set(names)
    assert "torch" not in {p.name for p in found.packages}


def test_other_releases_than_the_shipped_locks_are_resolved():
    assert asked(versions=["0.5.15"]).lock is None
    assert asked(versions=["0.5.15", "0.5.23"]).lock is not None


def test_a_lock_says_which_releases_there_are(tmp_path: Path):
    file = tmp_path / "kit.lock"
    file.write_text(lock.Lock(lock.made_for(Target.read(USUAL_TARGET)), ("0.5.15",), ()).text())
    assert asked(lock=file).versions == ["0.5.15"]
    assert asked(lock=file, versions=["0.5.15", "0.5.23"]).versions == ["0.5.15", "0.5.23"]


def test_another_gpu_is_taken_in_place_of_the_targets():
    assert asked(gpu="sm120").target.architectures == ("sm120",)
    without = asked(gpu="none")
    assert (without.kernels, without.target.architectures) == (False, ())


def test_a_host_by_what_a_person_knows_of_it():
    wanted = asked(host=Host(python="3.11", torch="2.13.0"), gpu="8.0")
    assert (wanted.target.python_minor, wanted.target.cuda_major) == ("3.11", 13)
    assert wanted.target.architectures == ("sm80",)
    assert wanted.lock is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": Host(python="3.12")}, "needs --torch as well"),
        ({"host": Host(installed=Path("x"))}, "needs --python-version as well"),
        (
            {"host": Host(python="3.12", torch="2.11.0"), "target": "x"},
            "--target and --python-version both say what host it is",
        ),
        ({"target": "h200"}, "No target is named 'h200'"),
        ({"gpu": "hopper"}, "'hopper' is not a GPU generation"),
        ({"versions": ["0.5.20"]}, r"cannot have SGLang 0\.5\.20 on torch 2\.11\.0"),
        ({"versions": ["0.5.23"]}, r"0\.5\.23 is a guest .* Add one of: 0\.5\.15"),
        ({"lock": Path("/nowhere/lock.txt")}, "The lock /nowhere/lock.txt cannot be read"),
    ],
)
def test_options_that_make_no_sense_are_said(changes: dict[str, object], message: str):
    with pytest.raises(KitError, match=message):
        asked(**changes)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path):
    ended = command("--target", str(tmp_path / "no-such.json"))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert "there is no such file" in ended.stderr


def test_a_torch_without_a_release_is_refused_before_anything_is_fetched(tmp_path: Path):
    ended = command("--python-version", "3.12", "--torch", "2.9.0", "--gpu", "sm90")
    assert ended.returncode == 2
    assert "There are releases for torch 2.11.0, 2.13.0, 2.14.1" in ended.stderr


def test_describe_prints_a_target():
    ended = command("describe", "--python", sys.executable)
    assert ended.returncode == 0
    assert Target.model_validate(json.loads(ended.stdout)).packages["pydantic"]


def test_describe_prints_its_own_program_to_be_carried():
    ended = command("describe", "--script")
    assert ended.stdout == Path(describe.__file__).read_text(encoding="utf-8")


def test_what_is_no_python_cannot_be_described(tmp_path: Path):
    with pytest.raises(KitError, match="cannot be started"):
        described(tmp_path / "python")
    with pytest.raises(KitError, match="/bin/false cannot describe its host"):
        described(Path("/bin/false"))


# What is known of the releases.


def test_a_kit_has_the_newest_release_for_its_torch_and_the_guests():
    known = catalogue()
    assert [r.version for r in known.choose("2.11.0", [])] == ["0.5.15", "0.5.23"]
    assert [r.version for r in known.choose("2.13.0", [])] == ["0.5.21"]
    assert [(r.version, r.guest) for r in known.choose("2.14.1", [])] == [("0.5.23", False)]
    assert [r.version for r in known.choose("2.11.0", ["0.5.23", "0.5.15"])] == ["0.5.15", "0.5.23"]


def test_each_gpu_generation_takes_its_own_kernels_alone():
    known = catalogue()
    assert known.kernel_files(("sm90",)) == (["sgl_kernel/sm100/*"], ["sm90"])
    left_out, served = known.kernel_files(("sm89",))
    assert left_out == ["sgl_kernel/sm90/*"]
    assert {"sm80", "sm89", "sm100", "sm120"} <= set(served)
    assert known.kernel_files(("sm90", "sm100"))[0] == []


def test_everything_that_is_left_out_has_its_reason():
    known = catalogue()
    reasons = [
        *known.requirements_left_out.values(),
        *known.requirements_added.values(),
        *(reason for files in known.files_left_out.values() for reason in files.values()),
        *(stand_in.reason for stand_in in known.stand_ins),
        *(reason for release in known.all() for reason in release.files_left_out.values()),
    ]
    assert all(len(reason) > 8 for reason in reasons)


def test_a_stand_in_fails_where_it_is_called(monkeypatch: pytest.MonkeyPatch):
    folder = Path(lock.__file__).parent / "stand_ins"
    program = (
        "from flashinfer.prefill import cudnn_batch_prefill_with_kv_cache\n"
        "from flashinfer.sampling import (\n"
        "    min_p_sampling_from_probs, top_k_top_p_sampling_from_probs)\n"
        "from IPython.display import HTML, display\n"
        "import soundfile\n"
        "for call in (cudnn_batch_prefill_with_kv_cache, min_p_sampling_from_probs, display,\n"
        "             HTML, top_k_top_p_sampling_from_probs, lambda: soundfile.read('x')):\n"
        "    try:\n"
        "        call()\n"
        "    except NotImplementedError as error:\n"
        "        print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(folder)},
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 6
    assert all("stand-in" in line for line in ended.stdout.splitlines())
    assert {s.folder for s in catalogue().stand_ins} == {
        path.name for path in folder.iterdir() if path.name != "__pycache__"
    }
