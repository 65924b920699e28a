"""What packages require of each other, evaluated for a target: the metadata in their wheels."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.markers import Marker, default_environment
from packaging.metadata import parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from sglang_harness.errors import KitError
from sglang_harness.kit.describe import normalised
from sglang_harness.kit.target import Target


@dataclass(frozen=True)
class Package:
    """A wheel's own statements. The name is normalised."""

    name: str
    version: str
    requires: tuple[Requirement, ...]

    @classmethod
    def of_wheel(cls, wheel: Path) -> Package:
        """Raises KitError where it is no wheel, or its metadata is unreadable."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                (file,) = (
                    name
                    for name in archive.namelist()
                    if name.count("/") == 1 and name.endswith(".dist-info/METADATA")
                )
                found, _ = parse_email(archive.read(file))
                requires = tuple(Requirement(line) for line in found.get("requires_dist", ()))
                return cls(normalised(found["name"]), found["version"], requires)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise KitError(f"{wheel.name} is not a wheel that can be read: {error}.") from None


@dataclass(frozen=True)
class Rules:
    """How one release's requirements are met other than by the index.

    Attributes:
        dropped: normalised names that are neither looked for nor followed: left out, or stood in.
        replaced: normalised names whose version is not what SGLang itself states, on purpose.
    """

    dropped: frozenset[str]
    replaced: frozenset[str]


@dataclass
class Closure:
    """What was reached.

    Attributes:
        used: names of packages of the kit.
        needs: names of packages that are expected on the target.
        lacking: one line for each requirement that nothing satisfies.
    """

    used: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)
    lacking: list[str] = field(default_factory=list)


def environment(target: Target) -> dict[str, str]:
    """What markers ask, answered for the target."""
    full = target.python if target.python.count(".") == 2 else f"{target.python}.0"
    return {
        **{name: str(value) for name, value in default_environment().items()},
        "implementation_name": target.implementation,
        "implementation_version": full,
        "os_name": "posix",
        "platform_machine": target.machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": full,
        "python_version": target.python_minor,
        "sys_platform": "linux",
    }


def applies(marker: Marker | None, answers: Mapping[str, str], extras: Iterable[str]) -> bool:
    """Whether a requirement counts for one who was asked for with ``extras``."""
    if marker is None:
        return True
    return any(marker.evaluate({**answers, "extra": extra}) for extra in ("", *extras))


def satisfies(requirement: Requirement, version: str) -> bool:
    """Whether a version is one that is asked for. A local part ('+cu130') is the builder's, and a
    release before the final one that is there is taken, as pip takes it."""
    try:
        public = Version(version).public
    except InvalidVersion:
        return False
    return requirement.specifier.contains(public, prereleases=True)


def pins(requirement: Requirement) -> bool:
    """Whether it asks for one version and no other."""
    return any(s.operator in ("==", "===") and "*" not in s.version for s in requirement.specifier)


def close(
    roots: list[Requirement], kit: Mapping[str, Package], target: Target, rules: Rules
) -> Closure:
    """Follows the requirements from ``roots`` through the packages of a kit. Those of the target
    are not followed: what they need is there.

    A package of the target whose version is not known counts as fit, unless SGLang itself states
    one version.

    Args:
        kit: packages by normalised name; where one is in the kit, the target's is not used.
    """
    answers = environment(target)
    reached = Closure()
    waiting: list[tuple[Requirement, str]] = [(root, "") for root in roots]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, wanted_by = waiting.pop()
        name = normalised(requirement.name)
        if name in rules.dropped:
            continue
        of_sglang = wanted_by == "sglang"
        free = of_sglang and name in rules.replaced
        by = f" ({wanted_by} requires it)" if wanted_by else ""
        if package := kit.get(name):
            reached.used.add(name)
            if not free and not satisfies(requirement, package.version):
                reached.lacking.append(f"{requirement}{by}: the kit has {package.version}")
            for extra in ("", *requirement.extras):
                if (name, extra) in seen:
                    continue
                seen.add((name, extra))
                waiting += [
                    (next_one, name)
                    for next_one in package.requires
                    if applies(next_one.marker, answers, (extra,))
                ]
        elif name in target.packages:
            reached.needs.add(name)
            there = target.packages[name]
            if free or (there is None and not (of_sglang and pins(requirement))):
                continue
            if there is None or not satisfies(requirement, there):
                has = "one of unknown version" if there is None else there
                reached.lacking.append(f"{requirement}{by}: the target has {has}")
        else:
            reached.lacking.append(f"{requirement}{by}")
    return reached


def parsed(lines: Iterable[str]) -> list[Requirement]:
    """Raises KitError where a line is not a requirement."""
    try:
        return [Requirement(line) for line in lines]
    except InvalidRequirement as error:
        raise KitError(f"Not a requirement: {error}.") from None
