"""Makes the lock of a kit: which packages the target lacks, and which wheel of each.

uv resolves for the target's Python and platform; the versions that are on the target already are
its preferences. What the target has is left to the target; then the requirements are followed
through the wheels that remain, and what nothing asks for goes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from sglang_harness._base import bounded
from sglang_harness._base.temporary import within_temporary_folder
from sglang_harness.errors import KitError, MissingExtra
from sglang_harness.kit import index, wheels
from sglang_harness.kit.describe import normalised
from sglang_harness.kit.harness_files import own_requirements
from sglang_harness.kit.lock import COMMON, Lock, Locked, made_for, own_site
from sglang_harness.kit.releases import Catalogue, Release
from sglang_harness.kit.requirements import (
    Package,
    Rules,
    applies,
    close,
    environment,
    parsed,
    pins,
)
from sglang_harness.kit.target import USUAL_GLIBC, Target

#: Seconds that one call of uv may take.
WITHIN = 600.0

#: Names of packages that torch states one version of, and that only torch's wheels are built with.
_WITH_TORCH = ("nvidia-", "cuda-", "triton")

#: The versions of glibc that uv knows a platform for.
_UVS_GLIBC = (17, *range(28, 41))

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Uv:
    """uv, for one target, with pip's settings."""

    program: str
    target: Target
    folder: Path
    settings: dict[str, str]

    def compile(self, wanted: list[str], *, words: list[str], excluded: set[str]) -> None:
        """Raises KitError where there is no solution, or no index."""
        files = {"wanted": wanted, "excluded": sorted(excluded)}
        for name, lines in files.items():
            (self.folder / f"{name}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
        said = [self.program, "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        said += ["--only-binary", ":all:", "--python", sys.executable]
        said += ["--python-version", self.target.python_minor]
        said += ["--python-platform", _platform(self.target)]
        said += ["--excludes", "excluded.txt"]
        said += [*index.uv_words(self.settings), *words, "wanted.txt"]
        try:
            ended = bounded.run(
                said,
                within=WITHIN,
                cwd=self.folder,
                environment=index.uv_environment(self.settings),
            )
        except subprocess.TimeoutExpired:
            raise KitError(f"uv found no solution within {WITHIN / 60:g} minutes.") from None
        except OSError as error:
            raise KitError(f"uv cannot be started: {error}.") from None
        if ended.code != 0:
            raise _unsolved("\n".join([*ended.output, *ended.errors]), self.target)

    def versions(
        self, wanted: list[str], *, preferred: dict[str, str], excluded: set[str]
    ) -> dict[str, str]:
        """The version of every package, by normalised name."""
        file = self.folder / "versions.txt"
        lines = [f"{name}=={version}\n" for name, version in sorted(preferred.items())]
        file.write_text("".join(lines), encoding="utf-8")
        words = ["--output-file", file.name]
        self.compile(wanted, words=words, excluded=excluded)
        found = re.findall(r"^([A-Za-z0-9][\w.-]*)==(\S+)", file.read_text("utf-8"), re.MULTILINE)
        return {normalised(name): version for name, version in found}

    def hashes(self, versions: dict[str, str]) -> dict[str, str]:
        """The sha256 of the one wheel of each package that is for the target.

        Raises:
            KitError: there is no wheel of one, or the index states no hash of it.
        """
        file = self.folder / "pylock.toml"
        file.unlink(missing_ok=True)
        wanted = [f"{name}=={version}" for name, version in sorted(versions.items())]
        words = ["--no-deps", "--format", "pylock.toml", "--output-file", file.name]
        self.compile(wanted, words=words, excluded=set())
        found = {}
        for package in _pylock(file.read_text(encoding="utf-8")):
            name = normalised(package["name"])
            by_file = {_file_name(wheel): wheel for wheel in package.get("wheels", [])}
            chosen = wheels.best(by_file, self.target)
            if chosen is None:
                raise wheels.refused(
                    f"No matching distribution found for {name}=={versions.get(name, '')}",
                    self.target,
                )
            digest = by_file[chosen].get("hashes", {}).get("sha256")
            if digest is None:
                raise KitError(f"The index states no sha256 of {chosen}: it cannot be locked.")
            found[name] = str(digest)
        return found


def resolve(
    target: Target, releases: list[Release], catalogue: Catalogue, with_kernels: bool, say: Say
) -> Lock:
    """The lock for ``target``.

    Args:
        with_kernels: ``False``: a kit for a rehearsal on a CPU, without SGLang's kernels.

    Raises:
        KitError: there is no solution, no wheel, or no index.
        MissingExtra: uv is not installed.
    """
    with within_temporary_folder("scratch") as folder:
        uv = _Uv(_program(), target, folder, index.pip_settings())
        with_torch = _with_torch(uv) if set(target.packages) <= {"torch"} else set()
        target = with_packages(target, with_torch)
        uv = _Uv(uv.program, target, folder, uv.settings)
        chosen: dict[str, dict[str, Locked]] = {}
        # The first one again at the end: with what the others had to take, more is common to all.
        for release in [*releases, *(releases[:1] if len(releases) > 1 else [])]:
            say(f"resolving SGLang {release.version}")
            before = {n: p.version for found in chosen.values() for n, p in found.items()}
            chosen[release.version] = _one(uv, release, catalogue, with_kernels, before, say)
    packages = []
    for release in releases:
        for name, package in chosen[release.version].items():
            common = all(found.get(name) == package for found in chosen.values())
            if not common or release is releases[0]:
                site = COMMON if common else own_site(release.version)
                packages.append(Locked(name, package.version, package.sha256, site))
    versions = tuple(release.version for release in releases)
    return Lock(made_for(target), versions, tuple(packages), tuple(sorted(with_torch)))


def roots(release: Release, catalogue: Catalogue, with_kernels: bool) -> list[str]:
    """What a release's Python has to have, SGLang first and the harness included."""
    return [
        f"sglang=={release.version}",
        *([f"sglang-kernel=={release.kernels}"] if with_kernels else []),
        *catalogue.requirements_added,
        *own_requirements(),
    ]


def rules(release: Release, catalogue: Catalogue, with_kernels: bool) -> Rules:
    """How its requirements are met other than by the index."""
    dropped = {normalised(name) for name in catalogue.requirements_left_out}
    dropped |= {normalised(stand_in.name) for stand_in in catalogue.stand_ins}
    if not with_kernels:
        dropped.add("sglang-kernel")
    replaced = {"torch", "sglang-kernel"} if release.guest else set()
    return Rules(frozenset(dropped), frozenset(replaced))


def with_packages(target: Target, more: Iterable[str]) -> Target:
    """The same target with packages, in unknown versions, that its description does not list."""
    return target.model_copy(update={"packages": {**dict.fromkeys(more), **target.packages}})


def _one(
    uv: _Uv,
    release: Release,
    catalogue: Catalogue,
    with_kernels: bool,
    before: dict[str, str],
    say: Say,
) -> dict[str, Locked]:
    target = uv.target
    rule = rules(release, catalogue, with_kernels)
    wanted = roots(release, catalogue, with_kernels)
    sglang = _sglang(uv, release, say)
    pinned = {
        normalised(r.name)
        for r in sglang.requires
        if pins(r)
        and applies(r.marker, environment(target), ())
        and normalised(r.name) not in rule.replaced
    }
    # What is there in an unknown version counts as fit, and so does all that it needs. torch's own
    # companions are those that it was installed with, whatever the index has of them today.
    unknown = {n for n, v in target.packages.items() if v is None and n not in pinned}
    unknown |= {n for n in target.packages if n.startswith(_WITH_TORCH)}
    known = {n: _public(v) for n, v in target.packages.items() if v is not None and n != "torch"}
    # A guest's own requirements are those of SGLang without its torch and its kernels, which uv
    # would override for everybody, torchvision included.
    direct = [
        _without_marker(requirement)
        for requirement in sglang.requires
        if normalised(requirement.name) not in rule.replaced | rule.dropped
        and applies(requirement.marker, environment(target), ())
    ]
    found = uv.versions(
        [f"torch=={target.torch_release}", *direct, *wanted[1:]],
        preferred={**before, **{n: v for n, v in known.items() if v}},
        excluded={*rule.dropped, *unknown} - {"torch"},
    )
    found["sglang"] = release.version
    lacking = {n: v for n, v in found.items() if n != "torch" and known.get(n) != v}
    hashes = uv.hashes(lacking)
    locked = {n: Locked(n, v, hashes[n], COMMON) for n, v in lacking.items()}
    files = wheels.fetch(list(locked.values()), target, say)
    kit = {n: Package.of_wheel(files[p.sha256]) for n, p in locked.items()}
    closure = close(parsed(wanted), kit, target, rule)
    if closure.lacking:
        raise KitError(
            f"SGLang {release.version} lacks packages: {'; '.join(sorted(closure.lacking))}."
        )
    return {name: package for name, package in locked.items() if name in closure.used}


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _sglang(uv: _Uv, release: Release, say: Say) -> Package:
    """SGLang's own statements, from its wheel, which the kit has anyway."""
    hashes = uv.hashes({"sglang": release.version})
    package = Locked("sglang", release.version, hashes["sglang"], COMMON)
    return Package.of_wheel(wheels.fetch([package], uv.target, say)[package.sha256])


def _with_torch(uv: _Uv) -> set[str]:
    """Names of what pip installs with torch: it is there where torch is."""
    wanted = [f"torch=={uv.target.torch_release}"]
    found = uv.versions(wanted, preferred={}, excluded=set())
    names = set(found) - {"torch"}
    # Every torch with CUDA has its own triton; an index may have a torch without CUDA first.
    return names if uv.target.cuda is None else names | {"triton"}


def _program() -> str:
    try:
        from uv import find_uv_bin
    except ImportError:
        raise MissingExtra("A kit without a lock", "kit") from None
    try:
        return str(find_uv_bin())
    except FileNotFoundError:
        raise MissingExtra("A kit without a lock", "kit") from None


def _platform(target: Target) -> str:
    minor = int((target.glibc or USUAL_GLIBC).split(".")[1])
    known = [number for number in _UVS_GLIBC if number <= minor]
    return f"{target.machine}-manylinux_2_{known[-1] if known else _UVS_GLIBC[0]}"


def _public(version: str) -> str:
    """Without the local part; empty where it is no version that an index can have."""
    try:
        return Version(version).public
    except InvalidVersion:
        return ""


def _pylock(text: str) -> list[dict[str, Any]]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    packages: list[dict[str, Any]] = tomllib.loads(text).get("packages", [])
    return packages


def _file_name(wheel: dict[str, Any]) -> str:
    name = wheel.get("name") or str(wheel.get("url") or wheel.get("path")).rpartition("/")[2]
    return name.partition("#")[0].replace("%2B", "+")


def _unsolved(text: str, target: Target) -> KitError:
    """uv's reason, in one line."""
    known = wheels.refused(text, target)
    if not known.message.startswith("pip failed"):
        return known
    reason = " ".join(
        line.strip(" \u2570\u2500\u25b6\u2502\u00d7") for line in text.splitlines() if line.strip()
    )
    reason = re.sub(r"\w+://\S+", "(address)", reason)
    return KitError(
        f"There is no set of packages for Python {target.python_minor} with torch "
        f"{target.torch_release}: {reason[:500]}"
    )
