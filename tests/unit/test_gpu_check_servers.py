"""Servers that the parts of gpu-check share: real processes, of a package that imitates SGLang."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import made_up_server
from sglang_harness._base.file_lease import LeaseTaken
from sglang_harness._base.living import lives_as
from sglang_harness._base.signals import interruptions
from sglang_harness.errors import (
    DeviceNotIdle,
    HarnessError,
    SpecError,
    StartTimeout,
)
from sglang_harness.gpu_check import record, run_parts
from sglang_harness.gpu_check.outcomes import NotHere
from sglang_harness.gpu_check.results import PartResult, Results
from sglang_harness.gpu_check.servers import Servers
from sglang_harness.gpu_check.settings import Release, Settings
from sglang_harness.server import Server
from sglang_harness.spec import ServerSpec

TESTS = Path(__file__).parents[1]


class Checked:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.results: Results

    def run(self, *names: str, **more: Any) -> dict[str, PartResult]:
        release = Release(
            version="1.0",
            python=made_up_server.python(self.folder),
            server_args={"release": "own", "of-release": True},
            environment={"GIVEN": "thing"},
        )
        settings = Settings(
            **{
                "out": self.out,
                "device": "cpu",
                "ends_at": time.time() + 300,
                "models": self.folder,
                "releases": [release],
                **more,
            }
        )
        self.results = run_parts.results_of(settings, {}, None)
        into = record.Record(record.new_folder(self.out))
        parts = run_parts.chosen(run_parts.table(), names)
        run = run_parts.Run(settings, parts, into, self.results, say=lambda _: None)
        with interruptions() as signals:
            run.run(signals)
        return {part.part: part for part in self.results.parts}

    def texts(self) -> dict[str, str]:
        files = [each for each in (self.out / "parts").rglob("*") if each.is_file()]
        return {str(each.relative_to(self.out)): each.read_text() for each in files}


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    monkeypatch.setattr(run_parts, "TABLE", "made_up_parts")
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return Checked(tmp_path)


def test_the_parts_of_a_group_share_a_server_until_another_is_asked_for(checked: Checked):
    parts = checked.run("has-a-server", "has-it-still", "has-another")
    assert {p.outcome for p in parts.values()} == {"held"}, checked.results
    first, still, other = (p.figures for p in parts.values())
    assert first == still
    assert other["pid"] != first["pid"]
    for figures in (first, other):
        assert not lives_as(figures["pid"])
        assert not lives_as(figures["scheduler"])
    assert checked.results.notes == []
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
    logs = checked.texts()
    assert f"scheduler {first['scheduler']}" in logs["parts/has-a-server-1.0-server.log"]
    assert f"scheduler {other['scheduler']}" in logs["parts/has-another-1.0-server.log"]


def test_a_server_whose_part_was_killed_is_killed_too_and_its_log_is_kept_without_its_key(
    checked: Checked,
):
    parts = checked.run("has-a-server", "hangs-with-it", "has-a-fresh-one")
    assert [p.outcome for p in parts.values()] == ["held", "failed", "held"], checked.results
    first, hung, fresh = (p.figures for p in parts.values())
    assert hung == first
    assert fresh["pid"] != first["pid"]
    for figures in (first, fresh):
        assert not lives_as(figures["pid"])
        assert not lives_as(figures["scheduler"])
        assert not list(Path("/dev/shm").glob(f"sglang_loads_*_{figures['pid']:x}.shm"))
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
    logs = checked.texts()
    (kept,) = (text for text in logs.values() if f"scheduler {first['scheduler']}" in text)
    assert kept.startswith("server_args=ServerArgs(api_key='<redacted>')")


def test_a_server_that_does_not_start_is_tried_once_in_all_processes(checked: Checked):
    parts = checked.run("has-none", "has-none-again", "has-none-in-another-process")
    first, again, elsewhere = parts.values()
    assert first.outcome == "failed"
    assert "this flag is not for this GPU" in first.message
    assert again.outcome == elsewhere.outcome == "not run"
    assert again.message == elsewhere.message
    assert again.message.startswith("no server: ")
    assert "this flag is not for this GPU" in again.message
    log = checked.texts()["parts/has-none-1.0-server.log"]
    assert "ValueError: this flag is not for this GPU" in log
    assert "api_key='<redacted>'" in log


def test_a_server_that_a_push_left_unfit_is_not_given_to_the_next_part(checked: Checked):
    """A session that could not be closed blamed every part after the push."""
    parts = checked.run("leaves-it-unfit", "has-a-fit-one")
    left, fit = (part.figures for part in parts.values())
    assert {part.outcome for part in parts.values()} == {"held"}, checked.results
    assert fit["pid"] != left["pid"]


def test_a_server_that_a_part_had_no_time_for_is_tried_again_by_the_next(checked: Checked):
    """It had failed for want of time, and parts with time enough were not run because of it."""
    parts = checked.run("has-no-time", "has-time")
    assert [part.outcome for part in parts.values()] == ["not run", "held"], checked.results
    assert "did not start in the 3 s that were left" in parts["has-no-time"].message


@pytest.mark.parametrize(
    ("error", "within", "again"),
    [
        (DeviceNotIdle("GPU-1 is not idle."), 100.0, True),
        (LeaseTaken("GPU-1 is leased."), 100.0, True),
        (StartTimeout("No generation succeeded within 20 s."), 20.0, True),
        (StartTimeout("No generation succeeded within 140 s."), 140.0, False),
        (SpecError("There is no such flag."), 20.0, False),
    ],
)
def test_what_passes_is_no_reason_not_to_start_a_server_for_the_next_part(
    tmp_path: Path, error: HarnessError, within: float, again: bool
):
    """Memory that the driver freed late took the server from every part after it."""
    failed: dict[str, str] = {}
    settings = Settings(out=tmp_path, ends_at=time.time() + 60, models=tmp_path)
    servers = Servers(settings, None, lambda _: None, failed)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise error

        patch.setattr(Server, "start", refuse)
        with pytest.raises((type(error), NotHere)):
            servers.get(ServerSpec(), key="part", within=within, say=lambda _: None)
    assert (not failed) is again


def test_flags_come_from_the_release_from_what_was_found_and_from_the_command_line(
    checked: Checked,
):
    parts = checked.run("server-flags", "would-start", server_args={"found": "asked", "line": "2"})
    spec = parts["would-start"].figures["spec"]
    assert spec["server_args"] == {
        "release": "found",
        "of-release": True,
        "found": "asked",
        "line": "2",
        "own": 1,
    }
    assert spec["environment"] == {"GIVEN": "thing"}
    assert (spec["device"], spec["start"], spec["model"]) == ("cpu", "cold", "owner/name")


def test_limits_grow_with_the_factor(checked: Checked):
    parts = checked.run("would-start", slow=2.0)
    assert parts["would-start"].figures["spec"]["limits"] == {
        "start": 300.0,
        "check": 120.0,
        "request": 120.0,
        "stop": 24.0,
        # A GPU that another run has is told, with who has it, before the part is ended.
        "gpus": 60.0,
    }


def test_with_containers_the_image_is_the_one_asked_for_or_that_of_the_release(tmp_path: Path):
    for image, expected in (
        ("some/image:1", {"image": "some/image:1"}),
        (None, {"sglang_version": "1.0"}),
    ):
        folder = tmp_path / str(bool(image))
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_parts, "TABLE", "made_up_parts")
            path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
            patch.setenv("PYTHONPATH", path)
            parts = Checked(folder).run("would-start", runtime="docker", image=image, device="gpu")
        assert parts["would-start"].outcome == "held", parts
        spec = parts["would-start"].figures["spec"]
        named = {key: spec[key] for key in ("image", "sglang_version") if key in spec}
        assert named == expected
        assert json.dumps(spec["device"]) == '"gpu"'
