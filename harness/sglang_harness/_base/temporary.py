"""Temporary folders that say whose they are.

Every folder that the package makes outside the user's own comes from :func:`temporary_folder`.
The record in it names the process that it belongs to, so that ``sweep`` removes it once that
process has gone, and never by its age: a run takes hours and may not write for all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sglang_harness._base import paths
from sglang_harness._base.owner import Owner

Purpose = Literal[
    "doctor", "exchange", "parent", "probe", "process", "scratch", "staged", "weights", "xdist"
]

#: The file in a temporary folder that says whose it is. Its first line is an :class:`Owner`. A
#: second one, where the folder outlives that process, names the state folder and the run of the
#: record that keeps it.
RECORD = ".owner"

#: Seconds after which an empty folder without a record was left half-made: its owner writes the
#: record at once.
HALF_MADE_AFTER = 3600.0

_NAME = re.compile(rf"sglang-harness-({'|'.join(get_args(Purpose))})-[a-z0-9_]{{8}}")


def temporary_folder(purpose: Purpose) -> Path:
    """A new folder that only this user may enter, recorded as this process's."""
    folder = Path(tempfile.mkdtemp(prefix=f"sglang-harness-{purpose}-"))
    try:
        (folder / RECORD).write_text(f"{Owner.this_process()}\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # as on a full disk
        raise
    return folder


@contextmanager
def within_temporary_folder(purpose: Purpose) -> Iterator[Path]:
    """A :func:`temporary_folder` for one block."""
    folder = temporary_folder(purpose)
    try:
        yield folder
    finally:
        remove(folder)


def keep(folder: Path, run_id: str) -> None:
    """From now on ``folder`` belongs to the record of ``run_id`` in the state folder, and stays
    for as long as that is there. Call it when the record has been written."""
    record = folder / RECORD
    try:
        owner = record.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return  # not one of these folders: nothing removes it
    new = folder / f"{RECORD}.new"
    new.write_text(f"{owner}\n{run_id} {paths.state().absolute()}\n", encoding="utf-8")
    new.replace(record)


def remove(folder: Path) -> list[str]:
    """Removes ``folder``; returns ``[]``, or one line with the folder and why it is still there.

    The record goes last, so that ``sweep`` can finish what was interrupted.
    """
    errors: list[OSError] = []

    def attempt(path: Path) -> None:
        try:
            if stat.S_ISDIR(path.lstat().st_mode):
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            errors.append(error)

    try:
        contents = list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{folder}: {error}"]
    for each in contents:
        if each.name != RECORD:
            attempt(each)
    if not errors:
        attempt(folder)
    if errors:
        return [f"{folder}: {errors[0]}"]
    return [f"{folder}: it is still there"] if folder.exists() else []


@dataclass(frozen=True)
class Found:
    """A temporary folder of this user.

    Attributes:
        state: ``in use``: its process or the record that keeps it is there. ``abandoned``:
            neither is. ``unknown``: it has no record, so nobody can tell.
    """

    path: Path
    state: Literal["in use", "abandoned", "unknown"]


def found() -> list[Found]:
    """This user's temporary folders of this package; of everybody, where root asks."""
    every = []
    for path in sorted(Path(tempfile.gettempdir()).glob("sglang-harness-*")):
        if not _NAME.fullmatch(path.name):
            continue  # a person's own folder
        try:
            about = path.lstat()
            if stat.S_ISDIR(about.st_mode) and os.getuid() in (0, about.st_uid):
                every.append(Found(path, _state(path, about)))
        except FileNotFoundError:
            continue  # its owner removes it at this moment
    return every


def left_by(pid: int) -> list[Path]:
    """The temporary folders of a process of this machine that has ended, by its number."""
    mine = []
    for path in sorted(Path(tempfile.gettempdir()).glob("sglang-harness-*")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            owner = Owner.parse((path / RECORD).read_text(encoding="utf-8").splitlines()[0])
        except (OSError, ValueError, IndexError):
            continue  # not one of these, or somebody else's
        if owner is not None and owner.pid == pid and owner.is_gone():
            mine.append(path)
    return mine


def _state(path: Path, about: os.stat_result) -> Literal["in use", "abandoned", "unknown"]:
    try:
        lines = (path / RECORD).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, ValueError):
        return "unknown"
    owner = Owner.parse(lines[0]) if lines else None
    if owner is None:
        old = time.time() - about.st_mtime > HALF_MADE_AFTER
        half_made = old and all(each.name == RECORD for each in path.iterdir())
        return "abandoned" if half_made else "unknown"
    if not owner.is_gone():
        return "in use"
    if len(lines) > 1:
        run_id, _, state = lines[1].partition(" ")
        if paths.on_record(Path(state), run_id):
            return "in use"
    return "abandoned"
