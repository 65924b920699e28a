"""A kit as a whole, of small wheels: what is in the archive, and what it refuses to be."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import stat
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import wheel_index
from wheel_index import digest, make_wheel

from sglang_harness.errors import KitError
from sglang_harness.kit import build as building
from sglang_harness.kit.build import build
from sglang_harness.kit.harness_files import own_requirements
from sglang_harness.kit.lock import Lock, Locked, made_for
from sglang_harness.kit.record import KitRecord
from sglang_harness.kit.releases import catalogue
from sglang_harness.kit.request import Request
from sglang_harness.kit.requirements import parsed
from sglang_harness.kit.target import Target

#: What SGLang's own wheel requires, in small.
REQUIRES = (
    "torch==2.11.0",
    "sglang-kernel==0.4.4",
    "flashinfer_python[cu13]==0.6.12",
    "scipy",
    "IPython",
    "numpy",
    "alpha",
    "tomli; python_version < '3.11'",
)

SGLANG = {
    "sglang/__init__.py": "",
    "sglang/srt/server.py": "serves = True\n",
    "sglang/srt/grpc/core.so": b"\x7fELF",
    "sglang/multimodal_gen/model.py": "",
    "sglang-0.5.15.data/purelib/beside.py": "",
    "sglang-0.5.15.data/scripts/sglang": "#!python",
}

KERNELS: dict[str, str | bytes] = {
    "sgl_kernel/__init__.py": "",
    "sgl_kernel/flash_ops.abi3.so": b"large",
    "sgl_kernel/sm90/common_ops.abi3.so": b"for sm90",
    "sgl_kernel/sm100/common_ops.abi3.so": b"for the rest",
}


def target(**changes: object) -> Target:
    there = {r.name.lower(): None for r in parsed(own_requirements())}
    given: dict[str, object] = {
        "schema": 1,
        "python": "3.12.3",
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "gpus": [{"capability": "9.0"}],
        "packages": {**there, "torch": "2.11.0+cu130", "dill": None, "alpha": None},
    }
    return Target.model_validate({**given, **changes})


class Shelf:
    """An index of small wheels, and the lock of what is on it. They are in the cache already: pip
    is another test's subject."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.cache = cache / "kit" / "wheels"
        self.locked: dict[str, Locked] = {}
        self.put("sglang", "0.5.15", requires=REQUIRES, files=SGLANG)
        self.put("sglang-kernel", "0.4.4", requires=["torch==2.11.0"], files=KERNELS)

    def put(self, name: str, version: str, site: str = "site", **words: object) -> None:
        wheel = make_wheel(self.folder, name, version, **words)  # type: ignore[arg-type]
        self.locked[name] = Locked(name, version, digest(wheel), site)
        self.keep(wheel)

    def keep(self, wheel: Path) -> None:
        kept = self.cache / digest(wheel) / wheel.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(wheel.read_bytes())

    def request(self, out: Path, **changes: object) -> Request:
        lock = Lock(made_for(target()), ("0.5.15",), tuple(self.locked.values()))
        request = Request(target(), ["0.5.15"], lock, out)
        return replace(request, **changes)  # type: ignore[arg-type]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    wheel_index.use(monkeypatch, tmp_path / "index", tmp_path / "cache")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    # The real window takes 0.7 GB of memory and is none of these tests' subject.
    monkeypatch.setattr(building, "FILTERS", [{"id": lzma.FILTER_LZMA2, "preset": 1}])
    scripts = tmp_path / "on_target"
    scripts.mkdir()
    (scripts / "gpu-check").write_text("#!/bin/sh\n")
    (scripts / "unpack.py").write_text("")
    monkeypatch.setattr(building, "ON_TARGET", scripts)
    return Shelf(tmp_path / "index", tmp_path / "cache")


def outside(kit: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(kit) as tar:
        return {member.name: member for member in tar}


def inside(kit: Path) -> dict[str, bytes]:
    """The payload's files by name."""
    with tarfile.open(kit) as tar:
        payload = tar.extractfile("sglang-harness-kit/payload.tar.xz")
        assert payload is not None
        with tarfile.open(fileobj=io.BytesIO(payload.read())) as inner:
            found = {}
            for member in inner:
                stream = inner.extractfile(member)
                assert stream is not None
                found[member.name] = stream.read()
            return found


def test_a_kit_has_what_a_server_needs_and_nothing_else(shelf: Shelf, tmp_path: Path):
    kit = build(shelf.request(tmp_path / "kit.tar"))
    assert sorted(outside(kit.file)) == [
        f"sglang-harness-kit/{name}"
        for name in (
            *("README.txt", "describe.py", "gpu-check", "kit.json", "payload.tar.xz"),
            "unpack.py",
        )
    ]
    files = inside(kit.file)
    assert files["site/sglang/srt/server.py"] == b"serves = True\n"
    assert files["site/sgl_kernel/sm90/common_ops.abi3.so"] == b"for sm90"
    assert "site/beside.py" in files
    for file in ("METADATA", "RECORD"):
        assert f"site/sglang-0.5.15.dist-info/{file}" in files
    for absent in (
        "sgl_kernel/flash_ops.abi3.so",
        "sgl_kernel/sm100/common_ops.abi3.so",
        "sglang/multimodal_gen/model.py",
        "sglang/srt/grpc/core.so",
        "sglang-0.5.15.data/scripts/sglang",
    ):
        assert f"site/{absent}" not in files
    assert {name.split("/")[1] for name in files if name.startswith("stand_ins/")} == {
        "IPython",
        "flashinfer",
        "soundfile",
    }
    for needed in (
        "harness/sglang_harness/cli.py",
        "harness/sglang_harness/shipped/docker/versions.env",
        "harness/sglang_harness/shipped/.env",
        "harness/sglang_harness/shipped/compose.yaml",
        "nvml_mock/nvml_mock.c",
    ):
        assert needed in files
    assert not [name for name in files if "__pycache__" in name]
    (points,) = (name for name in files if name.endswith("entry_points.txt"))
    assert b"pytest11" in files[points]


def test_the_record_says_what_the_kit_is_and_needs(shelf: Shelf, tmp_path: Path):
    kit = build(shelf.request(tmp_path / "kit.tar"))
    with tarfile.open(kit.file) as tar:
        stream = tar.extractfile("sglang-harness-kit/kit.json")
        assert stream is not None
        record = KitRecord.model_validate_json(stream.read())
        payload = tar.extractfile("sglang-harness-kit/payload.tar.xz")
        assert payload is not None
        assert hashlib.sha256(payload.read()).hexdigest() == record.payload.sha256
    assert record == kit.record
    assert record.name == "sglang-harness-kit-0.5.15-torch2.11-cp312-sm90"
    assert record.made_for.model_dump() == {
        "python": "3.12",
        "torch": "2.11.0",
        "cuda": 13,
        "machine": "x86_64",
        "glibc": "2.34",
        "architectures": ["sm90"],
    }
    assert {"alpha", "numpy", "dill", "psutil"} <= set(record.needs)
    assert not {"torch", "scipy", "ipython", "tomli"} & set(record.needs)
    (release,) = record.releases
    assert (release.version, release.kernels, release.site) == (
        "0.5.15",
        "sglang-kernel 0.4.4",
        None,
    )
    assert release.server_args == {"attention-backend": "triton", "sampling-backend": "pytorch"}
    assert release.environment == {"SGLANG_IS_FLASHINFER_AVAILABLE": "false"}
    assert [s.name for s in release.stand_ins] == ["flashinfer-python", "ipython", "soundfile"]
    assert record.payload.unpacked_bytes == sum(map(len, inside(kit.file).values()))


def test_the_same_sources_and_lock_make_the_same_bytes(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = build(shelf.request(tmp_path / "first.tar")).file.read_bytes()
    before = os.umask(0o077)
    try:
        monkeypatch.setenv("SGLANG_HARNESS_CACHE", str(tmp_path / "other"))
        monkeypatch.setenv("TZ", "Pacific/Auckland")
        second = build(shelf.request(tmp_path / "second.tar")).file.read_bytes()
    finally:
        os.umask(before)
    assert first == second


def test_owners_times_and_modes_do_not_depend_on_the_machine(shelf: Shelf, tmp_path: Path):
    kit = build(shelf.request(tmp_path / "kit.tar"))
    members = outside(kit.file)
    assert {(m.uid, m.gid, m.uname, m.mtime) for m in members.values()} == {(0, 0, "", 1700000000)}
    assert stat.S_IMODE(members["sglang-harness-kit/gpu-check"].mode) == 0o755
    assert stat.S_IMODE(members["sglang-harness-kit/kit.json"].mode) == 0o644


def test_a_kit_is_built_again_from_the_lock_beside_it(shelf: Shelf, tmp_path: Path):
    kit = build(shelf.request(tmp_path / "kit.tar"))
    assert kit.lock_file == tmp_path / "kit.lock"
    again = build(shelf.request(tmp_path / "again.tar", lock=Lock.read(kit.lock_file)))
    assert again.file.read_bytes() == kit.file.read_bytes()


def test_the_readme_has_each_stand_in_and_what_was_left_out_with_the_reason(
    shelf: Shelf, tmp_path: Path
):
    kit = build(shelf.request(tmp_path / "kit.tar"))
    with tarfile.open(kit.file) as tar:
        stream = tar.extractfile("sglang-harness-kit/README.txt")
        assert stream is not None
        text = stream.read().decode()
    known = catalogue()
    for stand_in in known.stand_ins:
        assert f"{stand_in.name}: {stand_in.reason}" in text
    for name, reason in known.requirements_left_out.items():
        assert f"{name}: {reason}" in text
    assert "sglang-kernel 0.4.4 sha256:" in text


def test_a_package_of_the_target_is_used_in_place_of_a_stand_in(shelf: Shelf, tmp_path: Path):
    there = target()
    there = there.model_copy(update={"packages": {**there.packages, "ipython": "9.1"}})
    kit = build(shelf.request(tmp_path / "kit.tar", target=there))
    assert not [name for name in inside(kit.file) if name.startswith("stand_ins/IPython")]
    assert "ipython" not in [s.name for s in kit.record.releases[0].stand_ins]


def test_each_release_has_its_own_site(shelf: Shelf, tmp_path: Path):
    shelf.locked["sglang"] = replace(shelf.locked["sglang"], site="site-0.5.15")
    make_wheel(
        shelf.folder,
        "sglang",
        "0.5.23",
        requires=["torch==2.14.1", "sglang-kernel==0.4.10", "numpy"],
        files={
            "sglang/__init__.py": "",
            "sglang/srt/mem_cache/rust_tree_core/mem_cache.so": b"for torch 2.14",
        },
    )
    guest = Locked(
        "sglang",
        "0.5.23",
        digest(shelf.folder / "sglang-0.5.23-py3-none-any.whl"),
        "site-0.5.23",
    )
    both = Lock(made_for(target()), ("0.5.15", "0.5.23"), (*shelf.locked.values(), guest))
    kit = build(shelf.request(tmp_path / "kit.tar", lock=both, versions=[]))
    native, second = kit.record.releases
    assert (native.site, second.site) == ("site-0.5.15", "site-0.5.23")
    assert "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK" not in native.environment
    assert second.environment["SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK"] == "1"
    assert second.kernels == "sglang-kernel 0.4.4"
    assert second.caveats[0].startswith("SGLang 0.5.23 is a guest on torch 2.11.0")
    files = inside(kit.file)
    assert "site-0.5.23/sglang/__init__.py" in files
    assert not [name for name in files if "rust_tree_core" in name]


def test_a_rehearsal_kit_has_no_kernels_and_says_so(shelf: Shelf, tmp_path: Path):
    without = tuple(p for p in shelf.locked.values() if p.name != "sglang-kernel")
    there = target(cuda=None, torch="2.11.0+cpu", gpus=[])
    lock = Lock(made_for(there), ("0.5.15",), without)
    kit = build(Request(there, ["0.5.15"], lock, tmp_path / "kit.tar", kernels=False))
    assert kit.record.made_for.architectures == []
    assert kit.record.made_for.cuda is None
    assert kit.record.releases[0].kernels == "none"
    assert kit.record.releases[0].caveats == [
        "a kit without SGLang's kernels, for a rehearsal on a CPU"
    ]


# What a kit refuses to be.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": "aarch64"}, "for x86_64, and the target is aarch64"),
        ({"torch": None}, "The target has no torch"),
        ({"torch": "2.9.1+cu130"}, r"No SGLang .* torch 2\.9\.1.*2\.11\.0, 2\.13\.0, 2\.14\.1"),
        ({"cuda": "12.8"}, "for CUDA 12, and SGLang's kernels on the index are for CUDA 13"),
        ({"cuda": None}, r"torch 2\.11\.0\+cu130 has no CUDA.*--gpu none"),
        ({"gpus": []}, "Which GPU the target has is not known"),
        ({"gpus": [{"capability": "7.5"}]}, r"nothing for the GPU generation sm75.*It has: sm80"),
        ({"implementation": "pypy"}, "for CPython"),
    ],
)
def test_a_target_that_no_kit_can_be_for_is_said_in_one_line(
    shelf: Shelf, tmp_path: Path, changes: dict[str, object], message: str
):
    with pytest.raises(KitError, match=message):
        build(shelf.request(tmp_path / "kit.tar", target=target(**changes)))
    assert not (tmp_path / "kit.tar").exists()


def test_a_lock_that_lacks_a_package_is_refused_by_its_name(shelf: Shelf, tmp_path: Path):
    shelf.put("sglang", "0.5.15", requires=[*REQUIRES, "unheard-of>=2"], files=SGLANG)
    with pytest.raises(KitError, match=r"lacks what SGLang 0\.5\.15 requires: unheard-of>=2"):
        build(shelf.request(tmp_path / "kit.tar"))


def test_a_lock_that_lacks_the_kernels_is_refused(shelf: Shelf, tmp_path: Path):
    del shelf.locked["sglang-kernel"]
    with pytest.raises(KitError, match=r"requires: sglang-kernel==0\.4\.4"):
        build(shelf.request(tmp_path / "kit.tar"))


def test_a_lock_whose_hash_is_of_another_package_is_refused(shelf: Shelf, tmp_path: Path):
    kernels = shelf.locked["sglang-kernel"].sha256
    shelf.locked["sglang"] = replace(shelf.locked["sglang"], sha256=kernels)
    with pytest.raises(KitError, match=r"calls a wheel sglang 0\.5\.15, and it is sglang-kernel"):
        build(shelf.request(tmp_path / "other.tar"))


def test_a_kit_above_the_limit_is_not_left_and_its_largest_parts_are_named(
    shelf: Shelf, tmp_path: Path
):
    with pytest.raises(KitError, match=r"at most 0\.01 MiB are allowed.*the harness"):
        build(shelf.request(tmp_path / "kit.tar", largest=0.01))
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("name", ["../out.py", "/etc/out.py", "a//b.py", "a\\..\\b.py", "C:b.py"])
def test_a_member_that_leads_out_of_its_folder_is_refused(shelf: Shelf, tmp_path: Path, name: str):
    shelf.put("sglang", "0.5.15", requires=REQUIRES, files={**SGLANG, name: ""})
    with pytest.raises(KitError, match="has a member with an unsafe name"):
        build(shelf.request(tmp_path / "kit.tar"))


def test_a_link_in_a_wheel_is_refused(shelf: Shelf, tmp_path: Path):
    wheel = shelf.folder / "sglang-0.5.15-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "a") as archive:
        link = zipfile.ZipInfo("sglang/link.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    shelf.locked["sglang"] = replace(shelf.locked["sglang"], sha256=digest(wheel))
    shelf.keep(wheel)
    with pytest.raises(KitError, match=r"has a link: 'sglang/link\.py'"):
        build(shelf.request(tmp_path / "kit.tar"))


def test_two_packages_with_the_same_file_are_refused_unless_it_is_the_same(
    shelf: Shelf, tmp_path: Path
):
    shelf.put("sglang-kernel", "0.4.4", files={**KERNELS, "sglang/__init__.py": ""})
    build(shelf.request(tmp_path / "kit.tar"))
    shelf.put("sglang-kernel", "0.4.4", files={**KERNELS, "sglang/__init__.py": "x = 1"})
    with pytest.raises(KitError, match=r"sglang and sglang-kernel both bring site/sglang/__init__"):
        build(shelf.request(tmp_path / "kit.tar"))


def test_a_folder_that_is_not_there_is_said_before_anything_is_fetched(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(building.wheels, "fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(KitError, match=r"The folder of .* is not there"):
        build(shelf.request(tmp_path / "nowhere" / "kit.tar"))
    monkeypatch.setattr(building.os, "access", lambda *_: False)
    with pytest.raises(KitError, match=r".* cannot be written"):
        build(shelf.request(tmp_path / "kit.tar"))


def test_the_shipped_record_is_json_with_the_schema(shelf: Shelf, tmp_path: Path):
    kit = build(shelf.request(tmp_path / "kit.tar"))
    assert json.loads(kit.record.as_json())["schema"] == 1
