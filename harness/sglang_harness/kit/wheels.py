"""The wheels of a kit: fetched by pip with their hashes, kept in the harness's cache.

pip verifies every wheel against the one hash that the lock has for it, and this module once more
before a wheel is used: what lies in a cache may have been cut short.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from sglang_harness._base import bounded, paths
from sglang_harness._base.temporary import within_temporary_folder
from sglang_harness.errors import KitError
from sglang_harness.kit.lock import Locked
from sglang_harness.kit.target import USUAL_GLIBC, Target

#: Seconds that one call of pip may take: a kernel package has 370 to 620 MB.
FETCH_WITHIN = 3600.0

#: manylinux as it was called before the glibc was part of the name.
_LEGACY = {"2.17": "manylinux2014", "2.12": "manylinux2010", "2.5": "manylinux1"}


def platforms(target: Target) -> list[str]:
    """Tags of the platforms whose wheels run on the target, the best first."""
    major, minor = (int(part) for part in (target.glibc or USUAL_GLIBC).split("."))
    found = []
    for number in range(minor, 4, -1):
        found.append(f"manylinux_{major}_{number}_{target.machine}")
        if legacy := _LEGACY.get(f"{major}.{number}"):
            found.append(f"{legacy}_{target.machine}")
    return [*found, f"linux_{target.machine}"]


def tags(target: Target) -> Iterator[Tag]:
    """What wheels for the target may be tagged with, the best first."""
    version = tuple(int(part) for part in target.python_minor.split("."))
    abi = "cp" + target.python_minor.replace(".", "")
    yield from cpython_tags(version, [abi], platforms(target))
    yield from compatible_tags(version, abi, platforms(target))


def best(files: Iterable[str], target: Target) -> str | None:
    """The wheel for the target among file names; ``None``: there is none."""
    order = {tag: number for number, tag in enumerate(tags(target))}
    rated = []
    for file in files:
        with suppress(InvalidWheelFilename):
            _, _, build, of_file = parse_wheel_filename(file)
            if fitting := [order[tag] for tag in of_file if tag in order]:
                # Of two builds that fit as well the later one counts, as for pip.
                rated.append((min(fitting), tuple(-n for n in build[:1]), file))
    return min(rated)[2] if rated else None


def needed_glibc(files: Iterable[str]) -> str | None:
    """The lowest glibc that every one of these wheels runs with, by their tags; ``None``: any."""
    highest: tuple[int, int] | None = None
    for file in files:
        runs_with = []
        for tag in parse_wheel_filename(file)[3]:
            legacy = {name: version for version, name in _LEGACY.items()}
            name, _, _ = tag.platform.partition("_")
            if match := re.match(r"manylinux_(\d+)_(\d+)_", tag.platform):
                runs_with.append((int(match[1]), int(match[2])))
            elif name in legacy:
                major, minor = legacy[name].split(".")
                runs_with.append((int(major), int(minor)))
        if runs_with:
            highest = max(highest or (0, 0), min(runs_with))
    return None if highest is None else f"{highest[0]}.{highest[1]}"


def fetch(packages: list[Locked], target: Target, say: Callable[[str], None]) -> dict[str, Path]:
    """The wheels of ``packages``, by their sha256. Those that are not in the cache are fetched.

    Raises:
        KitError: one cannot be had: no network, no wheel for this Python, another hash.
    """
    folder = paths.cache() / "kit" / "wheels"
    found: dict[str, Path] = {}
    missing: dict[str, Locked] = {}
    for package in packages:
        there = _cached(folder / package.sha256, package.sha256)
        if there is None:
            missing[package.sha256] = package
        else:
            found[package.sha256] = there
    if missing:
        names = ", ".join(f"{p.name} {p.version}" for p in missing.values())
        say(f"fetching {len(missing)} wheels: {names}")
        # One name in two versions (of two releases) takes two calls.
        waiting = list(missing.values())
        while waiting:
            now = {package.name: package for package in waiting}
            waiting = [package for package in waiting if package not in now.values()]
            found |= _fetch(list(now.values()), target, folder)
    for package in packages:
        if package.sha256 not in found:
            raise KitError(
                f"pip fetched no wheel of {package.name} {package.version} with the hash that the "
                f"lock has: {package.sha256}."
            )
    return found


def _fetch(packages: list[Locked], target: Target, to: Path) -> dict[str, Path]:
    with within_temporary_folder("scratch") as scratch:
        lines = scratch / "requirements.txt"
        lines.write_text("".join(f"{p.requirement()}\n" for p in packages), encoding="utf-8")
        to.mkdir(parents=True, exist_ok=True)
        got = scratch / "wheels"
        _pip(["--require-hashes", "--requirement", str(lines)], target, got)
        found = {}
        for wheel in sorted(got.glob("*.whl")):
            kept = _keep(wheel, to)
            found[kept.parent.name] = kept
        return found


def fetch_unlocked(requirement: str, target: Target, to: Path) -> Path:
    """The wheel of ``NAME==VERSION`` for the target, to the folder ``to``, for its metadata.

    Raises:
        KitError: it cannot be had.
    """
    _pip([requirement], target, to)
    (wheel,) = to.glob("*.whl")
    return wheel


def _pip(words: list[str], target: Target, to: Path) -> None:
    version = target.python_minor.replace(".", "")
    said = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    said += ["--progress-bar", "off"]
    said += ["--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(to)]
    said += ["--implementation", "cp", "--python-version", target.python_minor]
    for abi in (f"cp{version}", "abi3", "none"):
        said += ["--abi", abi]
    for platform in platforms(target):
        said += ["--platform", platform]
    try:
        ended = bounded.run([*said, *words], within=FETCH_WITHIN)
    except subprocess.TimeoutExpired:
        raise KitError(f"pip fetched no more within {FETCH_WITHIN / 60:g} minutes.") from None
    except OSError as error:
        raise KitError(f"pip cannot be started: {error}.") from None
    if ended.code != 0:
        raise refused("\n".join([*ended.output, *ended.errors]), target)


def refused(text: str, target: Target) -> KitError:
    """What the words of pip or uv mean, without the addresses that are in them."""
    if re.search(r"No module named '?pip\b", text):
        return KitError(
            f"{sys.executable} has no pip.",
            advice="A kit's wheels are fetched by pip: install it with 'python -m ensurepip'.",
        )
    if found := re.search(r"DO NOT MATCH THE HASHES.*?\n\s*(\S+==\S+|\S+) from", text, re.DOTALL):
        return KitError(
            f"The wheel of {found[1]} has another hash than the lock: it was replaced on its way "
            "or on the index.",
            advice="Nothing of it was used. If the index is right, leave --lock out.",
        )
    if re.search(_OFFLINE, text):
        return KitError(
            "The package index cannot be reached.",
            advice="A kit is built where there is a network: see pip's settings for index and "
            "proxy ('pip config list').",
        )
    # pip's words, and uv's.
    no_wheel = (
        r"No matching distribution found for ([^\s(]+)|"
        r"Because (\S+==\S+) has no wheels with a matching"
    )
    if found := re.search(no_wheel, text):
        return KitError(
            f"The index has no wheel of {found[1] or found[2]} for Python {target.python_minor} on "
            f"{target.machine} with glibc {target.glibc or USUAL_GLIBC}."
        )
    last = [line.strip() for line in text.splitlines() if line.strip()][-1:]
    return KitError(f"pip failed: {_without_addresses(' '.join(last))[:400]}")


_OFFLINE = (
    r"NewConnectionError|ConnectTimeoutError|NameResolutionError|Max retries exceeded|"
    r"error sending request|dns error|Failed to fetch|"
    r"network was disabled|Network connectivity is disabled"
)


def _without_addresses(text: str) -> str:
    return re.sub(r"\w+://\S+", "(address)", text)


def _keep(wheel: Path, folder: Path) -> Path:
    own = folder / sha256(wheel)
    own.mkdir(parents=True, exist_ok=True)
    # First beside its place: the temporary folder may be on another file system.
    part = own / f".{wheel.name}.part"
    with wheel.open("rb") as source, part.open("wb") as kept:
        while block := source.read(1 << 22):
            kept.write(block)
    wheel.unlink()
    return part.replace(own / wheel.name)


def _cached(folder: Path, wanted: str) -> Path | None:
    """The wheel in a folder of the cache. One with another content is removed."""
    for wheel in folder.glob("*.whl"):
        if sha256(wheel) == wanted:
            return wheel
        wheel.unlink()
    return None


def sha256(file: Path) -> str:
    """Of a whole file."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            found.update(block)
    return found.hexdigest()
