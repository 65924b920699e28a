"""Reports, each made from a verdict alone. A new format is one file and one line of ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import SpecError
from sglang_harness.report import junit, terminal
from sglang_harness.verdict import Verdict


@dataclass(frozen=True)
class Format:
    """A report format.

    Attributes:
        name: by which a caller selects it.
        file: name of its file in the folder of the results.
        text: returns the content of that file, from the verdict alone.
    """

    name: str
    file: str
    text: Callable[[Verdict], str]


#: The verdict itself comes first, so that a defect in another format cannot prevent it.
FORMATS = (
    Format("json", "verdict.json", Verdict.as_json),
    Format("junit", "junit.xml", junit.text),
    Format("terminal", "verdict.txt", terminal.text),
)

#: The files that :func:`write_all` writes.
FILES = tuple(each.file for each in FORMATS)


def write_all(verdict: Verdict, folder: Path) -> list[Path]:
    """Writes every format into ``folder``, and returns the files in the order of ``FORMATS``.

    A format that fails does not stop the others; the first error is raised after the last one.

    Raises:
        SpecError: a file cannot be written.
    """
    written: list[Path] = []
    problems: list[Exception] = []
    for each in FORMATS:
        try:
            written.append(_write(each, verdict, folder / each.file))
        except Exception as error:
            problems.append(error)
    if problems:
        raise problems[0]
    return written


def write(name: str, verdict: Verdict, path: Path) -> Path:
    """Writes one format to ``path``.

    Raises:
        SpecError: there is no such format, or the file cannot be written.
    """
    for each in FORMATS:
        if each.name == name:
            return _write(each, verdict, path)
    raise SpecError(
        f"{name!r} is not a report format.",
        advice=f"Choose one of: {', '.join(each.name for each in FORMATS)}.",
    )


def _write(each: Format, verdict: Verdict, path: Path) -> Path:
    text = each.text(verdict)
    try:
        write_whole(path, text)
    except OSError as error:
        raise SpecError(
            f"{path} cannot be written: {error.strerror or error}.",
            advice="Choose another folder, or make room on this one's disk.",
        ) from None
    return path
