"""The lock of a kit: every wheel in it by its one sha256, in pip's own format for requirements.

What pip does not read is in comments: whom the lock is for, and which folder of the kit ('site')
the packages that follow go to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from sglang_harness.errors import KitError
from sglang_harness.kit.describe import normalised
from sglang_harness.kit.releases import Release
from sglang_harness.kit.target import Target

_HEAD = "# A lock of sglang-harness kit, format 1. 'sglang-harness kit' writes it; pip reads it."
_PACKAGE = re.compile(r"([a-z0-9][a-z0-9.-]*)==([^\s;]+) --hash=sha256:([0-9a-f]{64})")

#: The site of packages that every release in the kit uses.
COMMON = "site"


@dataclass(frozen=True)
class Locked:
    """A wheel in a kit. The name is normalised; the hash is of the whole wheel."""

    name: str
    version: str
    sha256: str
    site: str

    def requirement(self) -> str:
        """The line that pip reads."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class Lock:
    """What goes into a kit.

    Attributes:
        made_for: Python, torch and machine, as :func:`made_for` writes them.
        releases: versions of SGLang, the primary one first.
        with_torch: packages that came with the target's torch, although its description does not
            list them.
    """

    made_for: str
    releases: tuple[str, ...]
    packages: tuple[Locked, ...]
    with_torch: tuple[str, ...] = field(default=())

    def text(self) -> str:
        """As it is written to a file."""
        lines = [_HEAD, f"# for: {self.made_for}", f"# releases: {' '.join(self.releases)}"]
        if self.with_torch:
            lines.append(f"# with torch: {' '.join(self.with_torch)}")
        site = None
        for package in sorted(self.packages, key=lambda p: (p.site, p.name)):
            if package.site != site:
                site = package.site
                lines += ["", f"# site: {site}"]
            lines.append(package.requirement())
        return "\n".join([*lines, ""])

    @classmethod
    def parse(cls, text: str, where: str) -> Lock:
        """Reads what :meth:`text` wrote.

        Args:
            where: for messages.

        Raises:
            KitError: it is not such a text; says which line is not.
        """
        lines = text.splitlines()
        if not lines or lines[0] != _HEAD:
            raise KitError(
                f"{where} is not a lock of a kit of this version.",
                advice="Leave --lock out, and one is made.",
            )
        about: dict[str, str] = {}
        site, packages, seen = COMMON, list[Locked](), set[tuple[str, str]]()
        for number, line in enumerate(lines[1:], 2):
            if comment := re.fullmatch(r"# ([a-z ]+): ?(.*)", line):
                about[comment[1]] = comment[2]
                site = comment[2] if comment[1] == "site" else site
                continue
            if not line.strip() or line.startswith("#"):
                continue
            found = _PACKAGE.fullmatch(line.strip())
            if found is None or not re.fullmatch(r"site(-[0-9][\w.]*)?", site):
                raise KitError(
                    f"{where}, line {number}: {line!r} is not 'NAME==VERSION --hash=sha256:...'."
                )
            if (found[1], site) in seen:
                raise KitError(f"{where}, line {number}: {found[1]} is there twice.")
            seen.add((found[1], site))
            packages.append(Locked(normalised(found[1]), found[2], found[3], site))
        if not about.get("for") or not about.get("releases"):
            raise KitError(f"{where} does not say whom it is for and which releases it has.")
        return cls(
            about["for"],
            tuple(about["releases"].split()),
            tuple(packages),
            tuple(about.get("with torch", "").split()),
        )

    @classmethod
    def read(cls, file: Path) -> Lock:
        """Reads a lock.

        Raises:
            KitError: the file cannot be read, or is not one.
        """
        try:
            return cls.parse(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise KitError(f"The lock {file} cannot be read: {error}.") from None

    def of(self, version: str) -> list[Locked]:
        """What a release uses: its own packages and the common ones."""
        return [p for p in self.packages if p.site in (COMMON, own_site(version))]

    def fits(self, target: Target, releases: list[Release]) -> None:
        """Verifies that it is for this target and these releases.

        Raises:
            KitError: it is not; says what differs.
        """
        if self.made_for != made_for(target):
            raise KitError(
                f"The lock is for {self.made_for}, and the kit for {made_for(target)}.",
                advice="Leave --lock out, and one is made.",
            )
        wanted = tuple(release.version for release in releases)
        if self.releases != wanted:
            raise KitError(
                f"The lock is of SGLang {', '.join(self.releases)}, and the kit is to have "
                f"{', '.join(wanted)}.",
                advice="Leave --lock out, and one is made.",
            )


def own_site(version: str) -> str:
    """The site of what one release alone uses."""
    return f"site-{version}"


def made_for(target: Target) -> str:
    """What decides which wheels a kit has, in one line."""
    return (
        f"{target.implementation} {target.python_minor}, torch {target.torch_release}, "
        f"{target.machine}"
    )


def shipped(name: str) -> Lock | None:
    """The lock that comes with the package for a shipped target; ``None``: there is none."""
    file = resources.files(__package__) / "locks" / f"{name}.txt"
    if "/" in name or not file.is_file():
        return None
    return Lock.parse(file.read_text(encoding="utf-8"), f"the lock of {name}")
