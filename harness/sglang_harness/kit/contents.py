"""The files of a kit's payload: what a server needs of each wheel, the stand-ins, the harness.

Everything here is a name and where its bytes come from; nothing is unpacked to disk.
"""

from __future__ import annotations

import posixpath
import re
import stat
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path

from sglang_harness.errors import KitError
from sglang_harness.kit import harness_files
from sglang_harness.kit.lock import Locked
from sglang_harness.kit.releases import Catalogue, Release, StandIn


@dataclass(frozen=True)
class Entry:
    """A file of the payload.

    Attributes:
        name: from the folder that the payload is unpacked to, with slashes.
        part: whose it is, for the sizes in messages.
        source: the file, a wheel with ``member``, or the bytes themselves.
    """

    name: str
    part: str
    source: Path | bytes
    member: str = ""

    def data(self, open_wheels: dict[Path, zipfile.ZipFile]) -> bytes:
        """Its bytes. A wheel stays open for the next one."""
        if isinstance(self.source, bytes):
            return self.source
        if not self.member:
            return self.source.read_bytes()
        if self.source not in open_wheels:
            open_wheels[self.source] = zipfile.ZipFile(self.source)
        # A member whose checksum does not hold raises BadZipFile.
        return open_wheels[self.source].read(self.member)


def of_wheel(package: Locked, wheel: Path, left_out: Iterable[str]) -> Iterator[Entry]:
    """The files of a wheel that go in.

    Args:
        left_out: patterns of those that do not.

    Raises:
        KitError: a member's name leads out of its folder, or is a link, or the wheel is broken.
    """
    patterns = list(left_out)
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise KitError(f"{wheel.name} is not a wheel that can be read: {error}.") from None
    with archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            _refuse_unsafe(wheel.name, member)
            if any(fnmatchcase(member.filename, pattern) for pattern in patterns):
                continue
            name = _installed(member.filename)
            if name is not None:
                yield Entry(f"{package.site}/{name}", package.name, wheel, member.filename)


def _refuse_unsafe(wheel: str, member: zipfile.ZipInfo) -> None:
    name = member.filename
    leads_out = posixpath.normpath(name) != name or name.startswith(("/", "../")) or "\\" in name
    if leads_out or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise KitError(f"{wheel} has a member with an unsafe name: {name!r}. Nothing was unpacked.")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise KitError(f"{wheel} has a link: {name!r}. Nothing was unpacked.")


def _installed(member: str) -> str | None:
    """Where an installer would put it, from the folder of packages; ``None``: elsewhere (programs,
    C headers), where nothing of a kit looks."""
    head, _, rest = member.partition("/")
    if not head.endswith(".data"):
        return member
    kind, _, inner = rest.partition("/")
    return inner if kind in ("purelib", "platlib") else None


def patterns_for(
    package: str, catalogue: Catalogue, releases: list[Release], kernel_patterns: list[str]
) -> dict[str, str]:
    """Which files of a package do not go in, with the reason of each pattern."""
    found = {**catalogue.files_left_out["*"], **catalogue.files_left_out.get(package, {})}
    if package == "sglang":
        for release in releases:
            found |= release.files_left_out
    if package == "sglang-kernel":
        found |= dict.fromkeys(kernel_patterns, "for other GPU generations")
    return found


def of_stand_ins(used: list[StandIn]) -> Iterator[Entry]:
    """The empty packages that come with this one."""
    for stand_in in used:
        folder = Path(str(resources.files(__package__) / "stand_ins" / stand_in.folder))
        for path in sorted(folder.glob("*.py")):
            name = f"stand_ins/{stand_in.folder}/{path.name}"
            yield Entry(name, f"stand-in for {stand_in.name}", path)


def of_harness() -> Iterator[Entry]:
    """The harness, and the mock of the driver where this is a checkout."""
    for name, source in harness_files.files():
        yield Entry(f"harness/{name}", "the harness", source)
    for name, path in harness_files.mock_driver():
        yield Entry(name, "the mock driver", path)


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """As they go into the archive: the same file of two releases one after the other, because a
    compressor finds again what it has just seen; libraries last.

    Raises:
        KitError: two packages bring the same file with different content.
    """
    by_name: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_name[entry.name].append(entry)
    opened: dict[Path, zipfile.ZipFile] = {}
    try:
        for name, same in by_name.items():
            if len(same) > 1 and len({entry.data(opened) for entry in same}) > 1:
                parts = " and ".join(sorted({entry.part for entry in same}))
                raise KitError(f"{parts} both bring {name}, with different content.")
    finally:
        for archive in opened.values():
            archive.close()
    return sorted((same[0] for same in by_name.values()), key=_place)


def _place(entry: Entry) -> tuple[bool, str, str]:
    _, _, inner = entry.name.partition("/")
    return (inner.endswith(".so"), inner, entry.name)
