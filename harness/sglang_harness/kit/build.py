"""Builds a kit: resolves or takes the lock, fetches, verifies that nothing is missing, and writes
the archive.

The same sources and the same lock make the same bytes: names are ordered, and owners, times and
modes do not depend on the machine.
"""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO

import sglang_harness
from sglang_harness._base import headroom
from sglang_harness._base.temporary import within_temporary_folder
from sglang_harness.errors import KitError, NotEnoughRoom
from sglang_harness.kit import contents, harness_files, readme, resolve, wheels
from sglang_harness.kit.contents import Entry
from sglang_harness.kit.lock import Lock, own_site
from sglang_harness.kit.record import (
    HarnessBuilt,
    KitRecord,
    MadeFor,
    PackageRecord,
    Payload,
    ReleaseRecord,
    StandInUsed,
)
from sglang_harness.kit.releases import Catalogue, Release, catalogue
from sglang_harness.kit.request import Request
from sglang_harness.kit.requirements import Package, close, parsed
from sglang_harness.kit.target import USUAL_GLIBC, Target

MIB = 1 << 20

#: The folder that an archive unpacks to.
FOLDER = "sglang-harness-kit"

PAYLOAD = "payload.tar.xz"

#: How the payload is compressed. With a window of 64 MiB the files that two releases share are
#: stored once. Unpacking takes 65 MiB of memory.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9}]

#: Memory that packing takes, in bytes; measured with the shipped target: 877 MiB.
PACKING_TAKES = 900 * MIB

#: What runs on the target before the harness can.
ON_TARGET = resources.files(__package__) / "on_target"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Kit:
    """A kit that was built.

    Attributes:
        lock_file: what was put in, to build it again.
        parts: bytes of what is inside by part, as far as they can be told apart (each compressed
            on its own), the largest first.
    """

    file: Path
    lock_file: Path
    record: KitRecord
    size: int
    parts: list[tuple[str, int]]

    def summary(self) -> list[str]:
        """What a person wants to know of it."""
        largest = ", ".join(f"{part} {size / MIB:.1f}" for part, size in self.parts[:6])
        releases = ", ".join(f"{r.version} ({r.kernels})" for r in self.record.releases)
        made_for = self.record.made_for
        gpus = ", ".join(made_for.architectures) or "no GPU"
        return [
            f"{self.file}: {self.size / MIB:.1f} MiB, for Python {made_for.python}, torch "
            f"{made_for.torch}, {gpus}",
            f"  SGLang {releases}",
            f"  largest inside, in MiB: {largest}",
            f"  to build it again: --lock {self.lock_file}",
            "  on the host: tar xf it, then sglang-harness-kit/gpu-check --python PYTHON",
        ]


def build(request: Request, say: Say = lambda _: None) -> Kit:
    """Builds it.

    Raises:
        KitError: the target is none that a kit can be for, a package cannot be had, something is
            missing or does not fit, or the archive would be too large. No archive is left.
    """
    known = catalogue()
    target = request.target
    _refuse(target)
    releases = known.choose(target.torch_release or "", request.versions)
    if request.kernels:
        _refuse_gpu(target, known)
    kernel_patterns, architectures = (
        known.kernel_files(target.architectures) if request.kernels else ([], [])
    )
    _room(request.out)
    lock = request.lock
    if lock is None:
        lock = resolve.resolve(target, releases, known, request.kernels, say)
    lock.fits(target, releases)
    files = wheels.fetch(list(lock.packages), target, say)
    needs = _verified(lock, files, releases, known, target, request.kernels)
    used = known.stand_ins_for(target)

    def of_wheels() -> Iterator[Entry]:
        for package in lock.packages:
            of = [r for r in releases if package.site == own_site(r.version)] or releases[:1]
            patterns = contents.patterns_for(package.name, known, of, kernel_patterns)
            yield from contents.of_wheel(package, files[package.sha256], patterns)

    entries = contents.ordered([*of_wheels(), *contents.of_stand_ins(used), *contents.of_harness()])
    name = _name(releases[0], target)
    made_at = harness_files.built_at()
    out = request.out or Path(f"{name}.tar")
    with within_temporary_folder("scratch") as folder:
        say(f"packing {len(entries)} files")
        payload = folder / PAYLOAD
        unpacked = _pack(entries, payload, made_at)
        record = KitRecord(
            name=name,
            harness=HarnessBuilt(
                version=sglang_harness.__version__, revision=harness_files.revision()
            ),
            made_for=MadeFor(
                python=target.python_minor,
                torch=target.torch_release or "",
                cuda=target.cuda_major,
                machine=target.machine,
                glibc=wheels.needed_glibc(f.name for f in files.values()) or USUAL_GLIBC,
                architectures=architectures,
            ),
            payload=Payload(file=PAYLOAD, sha256=wheels.sha256(payload), unpacked_bytes=unpacked),
            needs=sorted(needs),
            releases=[
                _release(release, lock, known, target, architectures, request.kernels)
                for release in releases
            ],
            packages=[
                PackageRecord(name=p.name, version=p.version, sha256=p.sha256, site=p.site)
                for p in sorted(lock.packages, key=lambda p: (p.site, p.name))
            ],
        )
        whole = folder / "kit.tar"
        _archive(whole, record, payload, known, made_at)
        size = whole.stat().st_size
        parts = _parts(entries)
        if size > request.largest * MIB:
            largest = ", ".join(f"{part} {bytes_ / MIB:.1f}" for part, bytes_ in parts[:5])
            raise KitError(
                f"The kit would have {size / MIB:.1f} MiB, and at most {request.largest:g} MiB "
                f"are allowed. The largest parts, in MiB: {largest}.",
                advice="Build it with fewer releases (--sglang-version), or allow more with "
                "--largest.",
            )
        lock_file = out.with_name(out.name.removesuffix(".tar") + ".lock")
        _put(whole, out)
        lock_file.write_text(lock.text(), encoding="utf-8")
    return Kit(out, lock_file, record, size, parts)


def _refuse(target: Target) -> None:
    """Hosts that no kit can be for."""
    if target.machine != "x86_64":
        raise KitError(
            f"A kit is for x86_64, and the target is {target.machine}.",
            advice="SGLang's kernels for it are other wheels, which nobody has tried in a kit.",
        )
    if target.implementation != "cpython":
        raise KitError(f"A kit is for CPython, and the target's Python is {target.implementation}.")
    if target.torch_release is None:
        raise KitError(
            "The target has no torch, and a kit does not bring it: torch and its CUDA libraries "
            "have 2 GB and more.",
            advice="Describe the Python that has torch: sglang-harness kit describe --python.",
        )


def _refuse_gpu(target: Target, known: Catalogue) -> None:
    """Hosts that there are no kernels for."""
    if target.cuda_major is None:
        raise KitError(
            f"The target's torch {target.torch} has no CUDA.",
            advice="Describe the Python whose torch has, or say --gpu none for a rehearsal on a "
            "CPU.",
        )
    if target.cuda_major != known.cuda:
        raise KitError(
            f"The target's torch is for CUDA {target.cuda_major}, and SGLang's kernels on the "
            f"index are for CUDA {known.cuda}."
        )
    if not target.architectures:
        raise KitError(
            "Which GPU the target has is not known.",
            advice="Add --gpu with its generation, such as --gpu sm90 for an H100.",
        )


def _room(out: Path | None) -> None:
    """Memory for packing. Disk is little: what the archive has, twice."""
    memory = headroom.memory()
    if memory.available < PACKING_TAKES:
        raise NotEnoughRoom(
            f"Packing a kit takes {PACKING_TAKES / MIB:.0f} MiB of memory, and "
            f"{memory.limited_by} has {memory.available / MIB:.0f} MiB left."
        )
    folder = (out or Path("kit.tar")).absolute().parent
    if not folder.is_dir():
        raise KitError(f"The folder of {out} is not there.")
    if not os.access(folder, os.W_OK):
        raise KitError(f"{folder} cannot be written.", advice="Name another place with --out.")


def _verified(
    lock: Lock,
    files: dict[str, Path],
    releases: list[Release],
    known: Catalogue,
    target: Target,
    kernels: bool,
) -> set[str]:
    """Follows every requirement of every release; returns what the target has to have."""
    complete = resolve.with_packages(target, lock.with_torch)
    needs: set[str] = set()
    for release in releases:
        kit: dict[str, Package] = {}
        for package in lock.of(release.version):
            found = Package.of_wheel(files[package.sha256])
            if (found.name, found.version) != (package.name, package.version):
                raise KitError(
                    f"The lock calls a wheel {package.name} {package.version}, and it is "
                    f"{found.name} {found.version}."
                )
            kit[package.name] = found
        wanted = parsed(resolve.roots(release, known, kernels))
        closure = close(wanted, kit, complete, resolve.rules(release, known, kernels))
        if closure.lacking:
            raise KitError(
                f"The kit lacks what SGLang {release.version} requires: "
                f"{'; '.join(sorted(closure.lacking))}.",
                advice="Leave --lock out, and what is missing is added.",
            )
        needs |= closure.needs
    return needs - {"torch"}


def _release(
    release: Release,
    lock: Lock,
    known: Catalogue,
    target: Target,
    architectures: list[str],
    kernels: bool,
) -> ReleaseRecord:
    used = known.stand_ins_for(target)
    environment: dict[str, str] = {}
    for stand_in in used:
        environment |= stand_in.environment
    environment |= release.environment
    own = own_site(release.version)
    caveats = list(release.caveats)
    if kernels:
        caveats.append(f"kernels of {', '.join(architectures)} only")
    else:
        caveats.append("a kit without SGLang's kernels, for a rehearsal on a CPU")
    return ReleaseRecord(
        version=release.version,
        kernels=f"sglang-kernel {release.kernels}" if kernels else "none",
        site=own if any(p.site == own for p in lock.packages) else None,
        server_args=known.server_args,
        environment=environment,
        stand_ins=[StandInUsed(name=s.name, reason=s.reason) for s in used],
        caveats=caveats,
    )


def _name(primary: Release, target: Target) -> str:
    torch = ".".join((target.torch_release or "").split(".")[:2])
    python = "cp" + target.python_minor.replace(".", "")
    gpus = "-".join(target.architectures) if target.architectures else "cpu"
    return f"sglang-harness-kit-{primary.version}-torch{torch}-{python}-{gpus}"


def _pack(entries: list[Entry], to: Path, made_at: int) -> int:
    """Writes the payload; returns the bytes that it has unpacked."""
    unpacked = 0
    opened: dict[Path, zipfile.ZipFile] = {}
    with ExitStack() as stack:
        file = stack.enter_context(to.open("wb"))
        packer = stack.enter_context(lzma.LZMAFile(file, "w", filters=FILTERS))
        tar = stack.enter_context(
            tarfile.open(fileobj=packer, mode="w|", format=tarfile.GNU_FORMAT)
        )
        try:
            for entry in entries:
                data = entry.data(opened)
                _add(tar, entry.name, data, made_at)
                unpacked += len(data)
        except (OSError, zipfile.BadZipFile) as error:
            raise KitError(f"{entry.name} of {entry.part} cannot be read: {error}.") from None
        finally:
            for archive in opened.values():
                archive.close()
    return unpacked


def _archive(to: Path, record: KitRecord, payload: Path, known: Catalogue, made_at: int) -> None:
    own = resources.files(__package__)
    files: list[tuple[str, bytes, int]] = [
        ("README.txt", readme.text(record, known).encode(), 0o644),
        ("describe.py", (own / "describe.py").read_bytes(), 0o644),
        ("kit.json", record.as_json().encode(), 0o644),
    ]
    for script, mode in (("gpu-check", 0o755), ("unpack.py", 0o644)):
        source = ON_TARGET / script
        if not source.is_file():
            raise KitError(f"{script}, which runs on the target, is not in this package.")
        files.append((script, source.read_bytes(), mode))
    with tarfile.open(to, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, mode in sorted(files):
            _add(tar, f"{FOLDER}/{name}", data, made_at, mode)
        with payload.open("rb") as stream:
            info = _info(f"{FOLDER}/{PAYLOAD}", payload.stat().st_size, made_at, 0o644)
            tar.addfile(info, stream)


def _add(tar: tarfile.TarFile, name: str, data: bytes, made_at: int, mode: int = 0o644) -> None:
    stream: IO[bytes] = io.BytesIO(data)
    tar.addfile(_info(name, len(data), made_at, mode), stream)


def _info(name: str, size: int, made_at: int, mode: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, made_at, mode
    return info


def _parts(entries: list[Entry]) -> list[tuple[str, int]]:
    sizes: Counter[str] = Counter()
    members: dict[Path, dict[str, int]] = {}
    for entry in entries:
        if isinstance(entry.source, bytes):
            sizes[entry.part] += len(entry.source)
        elif not entry.member:
            sizes[entry.part] += entry.source.stat().st_size
        else:
            if entry.source not in members:
                with zipfile.ZipFile(entry.source) as archive:
                    members[entry.source] = {
                        m.filename: m.compress_size for m in archive.infolist()
                    }
            version = entry.source.name.split("-")[1]
            sizes[f"{entry.part} {version}"] += members[entry.source][entry.member]
    return sizes.most_common()


def _put(whole: Path, out: Path) -> None:
    """The archive in its place, as a whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    try:
        with whole.open("rb") as source, part.open("wb") as target:
            while block := source.read(1 << 22):
                target.write(block)
        part.replace(out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise KitError(f"{out} cannot be written: {error.strerror}.") from None
