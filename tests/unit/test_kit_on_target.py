"""A kit on the host that it is for: what is refused before anything is written, and what lies in
its folder afterwards.

Small made-up kits with real archives, unpacked by this Python: ``describe.py`` is the kit's own,
with what it says of torch and the GPU replaced where that is the question.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sglang_harness.kit import describe
from sglang_harness.kit.on_target import unpack
from sglang_harness.kit.record import KitRecord

ON_TARGET = Path(unpack.__file__).parent
PYTHON = ".".join(map(str, sys.version_info[:2]))
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_bytes": 80 << 30}
A100 = {"name": "NVIDIA A100-SXM4-40GB", "capability": "8.0", "memory_bytes": 40 << 30}
TOOLS = {"nvcc": "/usr/local/cuda/bin/nvcc", "c++": "/usr/bin/c++", "ninja": "/usr/bin/ninja"}
#: Seconds for anything that takes a fraction of one.
SOON = 60.0

#: Says what it was started with in place of the harness.
HARNESS = """
import json, os, sys
print(json.dumps({"words": sys.argv[1:], "prefix": sys.prefix, "environment": dict(os.environ)}))
"""
PAYLOAD = {
    "harness/sglang_harness/__init__.py": "",
    "harness/sglang_harness/__main__.py": HARNESS,
    "harness/sglang_harness/shipped/docker/stand_ins/sgl_kernel.py": "what = 'the stand-in'\n",
    "harness/sglang_harness/shipped/docker/stand_ins/patched.pth": "import sys; sys.patched = 1\n",
    "site/sgl_kernel.py": "what = 'the real one'\n",
    "site/shared.py": "what = 'of all releases'\n",
    "site-0.0.1/sglang.py": "version = '0.0.1'\n",
    "site-0.0.2/sglang.py": "version = '0.0.2'\n",
    "site-0.0.2/shared.py": "what = 'of 0.0.2'\n",
    "stand_ins/empty.py": "what = 'empty'\n",
}


class Kit:
    """A kit in a folder, which a test changes before it is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name in ("gpu-check", "unpack.py"):
            shutil.copy(ON_TARGET / name, folder / name)
        self.host: dict[str, Any] = {"torch": "2.11.0+cu130", "cuda": "13.0", "gpus": [H100]}
        self.without: list[str] = []
        self.record: dict[str, Any] = {
            "schema": 1,
            "name": "made-up",
            "harness": {"version": "0.0.1", "revision": None},
            "packages": [],
            "made_for": {
                "python": PYTHON, "torch": "2.11.0", "cuda": 13, "machine": os.uname().machine,
                "glibc": "2.17", "architectures": ["sm90"],
            },
            "needs": ["pytest"],
            "releases": [
                {
                    "version": "0.0.1", "kernels": "sglang-kernel 0.4.4", "site": "site-0.0.1",
                    "server_args": {}, "environment": {"SGLANG_ANSWER": "it's 42 $HOME"},
                    "stand_ins": [{"name": "IPython", "reason": "imported\nand never called."}],
                    "caveats": [],
                },
                {
                    "version": "0.0.2", "kernels": "sglang-kernel 0.4.4", "site": "site-0.0.2",
                    "server_args": {}, "environment": {}, "stand_ins": [],
                    "caveats": ["it asks for other kernels"],
                },
            ],
        }  # fmt: skip
        self.pack(PAYLOAD)

    def pack(self, files: dict[str, str], *members: tarfile.TarInfo) -> None:
        """Makes the payload anew."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:xz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
            for member in members:
                archive.addfile(member)
        (self.folder / "payload.tar.xz").write_bytes(data.getvalue())
        self.record["payload"] = {
            "file": "payload.tar.xz",
            "sha256": hashlib.sha256(data.getvalue()).hexdigest(),
            "unpacked_bytes": sum(len(text.encode()) for text in files.values()),
        }

    def words(self, *words: str) -> list[str]:
        """The command, with everything that it reads in place."""
        (self.folder / "kit.json").write_text(json.dumps(self.record))
        text = Path(describe.__file__).read_text().partition("def main()")[0]
        (self.folder / "describe.py").write_text(
            f"{text}\nhost = describe()\nhost.update({self.host!r})\n"
            f"for name in {self.without!r}:\n    host['packages'].pop(name, None)\n"
            "print(json.dumps(host))\n"
        )
        return [str(self.folder / "gpu-check"), "--python", sys.executable, *words]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(*words),
            capture_output=True,
            text=True,
            timeout=SOON,
            env={**os.environ, **environment},
        )

    def refused(self, *words: str, **environment: str) -> str:
        """The one line of a refusal."""
        done = self.run(*words, **environment)
        assert (done.returncode, done.stdout) == (3, ""), done.stdout + done.stderr
        (line,) = (
            each for each in done.stderr.splitlines() if not each.startswith("gpu-check: unpacking")
        )
        assert line.startswith("not run: ")
        return line.removeprefix("not run: ")

    def started(self, *words: str, **environment: str) -> dict[str, Any]:
        """What gpu-check was started with."""
        done = self.run(*words, **environment)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert isinstance(told, dict)
        return told


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path / "sglang-harness-kit")


def told_by(python: Path, code: str) -> str:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- refused before anything is written -----------------------------------------------------------


def another_python(kit: Kit) -> None:
    kit.record["made_for"]["python"] = "3.99"


def another_machine(kit: Kit) -> None:
    kit.record["made_for"]["machine"] = "riscv64"


def an_older_libc(kit: Kit) -> None:
    kit.record["made_for"]["glibc"] = "9.1"


def another_libc(kit: Kit) -> None:
    kit.host["glibc"] = None


def another_torch(kit: Kit) -> None:
    kit.host["torch"] = "2.11.1+cu130"


def another_cuda(kit: Kit) -> None:
    kit.host["cuda"] = "12.8"


def no_gpu(kit: Kit) -> None:
    kit.host |= {"gpus": [], "driver_trouble": "libnvidia-ml.so.1: no such file"}


def no_gpu_in_the_drivers_list(kit: Kit) -> None:
    kit.host |= {"gpus": [], "driver_trouble": None}


def another_gpu(kit: Kit) -> None:
    kit.host["gpus"] = [A100]


def fewer_packages(kit: Kit) -> None:
    kit.record["needs"] = ["pytest", "numpy", "triton"]
    kit.without = ["numpy", "triton"]


def little_disk(kit: Kit) -> None:
    kit.record["payload"]["unpacked_bytes"] = 1 << 50


def a_damaged_payload(kit: Kit) -> None:
    payload = kit.folder / "payload.tar.xz"
    payload.write_bytes(payload.read_bytes()[:-20])


def a_payload_that_is_gone(kit: Kit) -> None:
    (kit.folder / "payload.tar.xz").unlink()


def no_kernels(kit: Kit) -> None:
    kit.record["made_for"] |= {"architectures": [], "cuda": None}


def another_schema(kit: Kit) -> None:
    kit.record["schema"] = 2


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (another_python, f"the kit was made for CPython 3.99, and {sys.executable} is cpython"),
        (another_machine, "the kit was made for riscv64, and this is"),
        (an_older_libc, "the kit needs glibc 9.1 or newer, and this host has glibc 2."),
        (another_libc, "this host has another C library."),
        (another_torch, "the kit was made for torch 2.11.0, and 2.11.1+cu130 is installed here."),
        (another_cuda, "CUDA 13, and torch 2.11.0+cu130 here has CUDA 12.8."),
        (no_gpu, "no GPU: libnvidia-ml.so.1: no such file"),
        (no_gpu_in_the_drivers_list, "no GPU: the driver lists none"),
        (another_gpu, "kernels for sm90, and the GPU here is NVIDIA A100-SXM4-40GB (sm80)."),
        (fewer_packages, "lacks 2 of the packages that the kit expects here: numpy, triton."),
        (little_disk, f"the kit needs {(1 << 30) + 512} MiB of disk in"),
        (a_damaged_payload, "payload.tar.xz is damaged (its SHA-256 differs): copy the kit again."),
        (a_payload_that_is_gone, "payload.tar.xz cannot be read (No such file or directory)."),
        (no_kernels, "the kit has no kernels for GPUs: it is for a rehearsal, --device cpu."),
        (another_schema, "kit.json has the schema 2, and 1 was expected."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_host_that_it_was_not_made_for_is_one_line(
    spoil: Callable[[Kit], None], why: str, kit: Kit
):
    spoil(kit)
    line = kit.refused()
    assert why in line
    left = {path.name for path in (kit.folder / "unpacked").glob("*")}
    assert left <= {unpack.LOCK}, "something was unpacked"


@pytest.mark.parametrize("spoil", [no_gpu, another_gpu, another_cuda, no_kernels])
def test_a_rehearsal_needs_no_gpu(spoil: Callable[[Kit], None], kit: Kit):
    spoil(kit)
    assert kit.started("--device", "cpu")["words"][-2:] == ["--device", "cpu"]


@pytest.mark.parametrize("spoil", [another_torch, another_python, fewer_packages])
def test_a_rehearsal_needs_everything_else(spoil: Callable[[Kit], None], kit: Kit):
    spoil(kit)
    kit.refused("--device=cpu")


def test_a_kits_record_that_is_cut_short_is_one_line(kit: Kit):
    words = kit.words()
    file = kit.folder / "kit.json"
    file.write_text(file.read_text()[:100])
    done = subprocess.run(words, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 3
    assert done.stderr == f"not run: {file} is damaged: copy the kit again.\n"


def test_one_gpu_with_kernels_is_enough_and_the_other_is_a_caveat(kit: Kit):
    kit.host["gpus"] = [H100, A100]
    kit.started()
    caveats = (kit.folder / "unpacked" / "python-0.0.1.caveats").read_text()
    assert "No kernels for NVIDIA A100-SXM4-40GB (sm80)." in caveats.splitlines()


def test_where_gpus_differ_those_without_kernels_are_left_out(kit: Kit):
    kit.host["gpus"] = [{**A100, "uuid": "GPU-a"}, {**H100, "uuid": "GPU-b"}]
    told = kit.started()
    assert told["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-b", "the first one has no kernels"
    python = kit.folder / "unpacked" / "python-0.0.1"
    assert told_by(python, "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])") == "GPU-b"
    told = kit.started(CUDA_VISIBLE_DEVICES="GPU-a")
    assert told["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-a", "a person's choice counts"


def test_where_every_gpu_has_kernels_none_is_chosen(kit: Kit):
    kit.host["gpus"] = [{**H100, "uuid": "GPU-a"}, {**H100, "uuid": "GPU-b"}]
    assert "CUDA_VISIBLE_DEVICES" not in kit.started()["environment"]


def test_a_driver_that_the_loader_does_not_find_is_asked_for_its_gpus_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "libcuda.so.1").write_text("")
    (tmp_path / "describe.py").write_text(
        "import json, os\n"
        "print(json.dumps({'torch': '2', 'cuda': '13', 'path': os.environ['LD_LIBRARY_PATH']}))\n"
    )
    monkeypatch.setattr(unpack, "HERE", tmp_path)
    monkeypatch.setattr(unpack, "DRIVER_FOLDERS", (str(tmp_path), str(driver)))
    monkeypatch.setattr(unpack, "_loads", lambda _: False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    assert unpack.describe()["path"] == f"/mine:{driver}"


# --- the host's packages --------------------------------------------------------------------------


def host_package(tmp_path: Path, version: str) -> dict[str, str]:
    """A path of the host that has an old package in this version."""
    about = tmp_path / "path" / f"old_one-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: old_one\nVersion: {version}\n")
    return {"PYTHONPATH": str(tmp_path / "path")}


SGLANG = """Metadata-Version: 2.1
Name: sglang
Version: 0.0.1
Requires-Dist: Old.One>=2
Requires-Dist: old-one<1; python_version < "3"
Requires-Dist: left-out==7
"""


@pytest.mark.parametrize(("version", "fits"), [("1.5", False), ("2.1+local", True)])
def test_a_package_of_the_host_in_an_unfit_version_is_a_caveat_with_what_is_required(
    kit: Kit, tmp_path: Path, version: str, fits: bool
):
    kit.pack({**PAYLOAD, "site-0.0.1/sglang-0.0.1.dist-info/METADATA": SGLANG})
    kit.record["needs"] = ["old-one", "packaging"]
    done = kit.run(**host_package(tmp_path, version))
    assert done.returncode == 0, done.stderr
    unfit = "this host has old-one 1.5, and sglang 0.0.1 requires old-one>=2"
    folder = kit.folder / "unpacked"
    caveats = (folder / "python-0.0.1.caveats").read_text()
    assert ("requires" not in caveats) if fits else (f"T{unfit[1:]}.\n" in caveats)
    assert "requires" not in (folder / "python-0.0.2.caveats").read_text()
    assert (f"gpu-check: {unfit}" in done.stderr.splitlines()) is not fits


# --- which torch there is -------------------------------------------------------------------------


def with_torch(tmp_path: Path, **files: str) -> dict[str, str]:
    """A path that has a torch with these files."""
    for name, text in files.items():
        (tmp_path / "path" / "torch").mkdir(parents=True, exist_ok=True)
        (tmp_path / "path" / "torch" / f"{name}.py").write_text(text)
    return {"PYTHONPATH": str(tmp_path / "path")}


VERSION = "__version__ = '2.11.0+cu130'\ncuda: str | None = '13.0'\n"


def test_torch_is_not_imported_where_its_files_tell_its_version(kit: Kit, tmp_path: Path):
    kit.host = {"gpus": [H100]}
    torch = with_torch(tmp_path, __init__="raise SystemExit('imported')\n", version=VERSION)
    kit.started(**torch)


def test_torch_is_asked_where_its_files_do_not_tell(kit: Kit, tmp_path: Path):
    kit.host = {"gpus": [H100]}
    code = (
        "from types import SimpleNamespace\n"
        "__version__, version = '2.11.0', SimpleNamespace(cuda='13.0')\n"
    )
    kit.started(**with_torch(tmp_path, __init__=code))


def test_a_torch_that_cannot_be_imported_is_one_line_with_its_reason(kit: Kit, tmp_path: Path):
    kit.host = {"gpus": [H100]}
    torch = with_torch(tmp_path, __init__="raise OSError('libcudart.so.13: no such file')\n")
    line = kit.refused(**torch)
    assert f"torch cannot be imported by {sys.executable} (OSError: libcudart.so.13" in line


def test_a_torch_without_cuda_is_one_line(kit: Kit, tmp_path: Path):
    kit.host = {"gpus": [H100]}
    code = (
        "from types import SimpleNamespace\n"
        "__version__, version = '2.11.0+cpu', SimpleNamespace(cuda=None)\n"
    )
    torch = with_torch(tmp_path, __init__=code)
    assert kit.refused(**torch) == "torch 2.11.0+cpu here is a build without CUDA."


def test_a_python_without_torch_is_one_line(kit: Kit, tmp_path: Path):
    kit.host = {"gpus": [H100], "torch": None, "cuda": None}
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True, timeout=SOON)
    kit.record["needs"] = []
    line = kit.refused("--python", str(bare / "bin" / "python"))
    assert "bare/bin/python has no torch, and the kit was made for torch 2.11.0" in line


def test_what_a_python_prints_as_it_starts_does_not_hide_the_host(kit: Kit, tmp_path: Path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text("print('welcome')")
    done = kit.run("--no-run", PYTHONPATH=str(tmp_path / "path"))
    assert done.returncode == 0, done.stderr


# --- which Python ---------------------------------------------------------------------------------


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo 3.9", "is Python 3.9, and 3.10 is the oldest that a kit is made for"),
        ("exit 1", "does not run Python code"),
    ],
)
def test_a_python_that_cannot_read_unpack_py_is_one_line(
    text: str, why: str, kit: Kit, tmp_path: Path
):
    assert why in kit.refused("--python", script(tmp_path / "python", text))


def test_a_python_that_is_not_there_is_one_line(kit: Kit):
    line = kit.refused("--python=/nonexistent/python")
    assert line.startswith("there is no /nonexistent/python here")
    assert kit.refused("--python").startswith("--python needs a value")


SYSTEMS_OWN = Path("/usr/bin/python3")


@pytest.mark.skipif(not SYSTEMS_OWN.exists(), reason=f"there is no {SYSTEMS_OWN}")
def test_the_systems_own_python_serves_as_well(kit: Kit):
    kit.record["needs"] = []
    kit.record["made_for"]["python"] = told_by(
        SYSTEMS_OWN, "import sys; print('%d.%d' % sys.version_info[:2])"
    )
    kit.started("--python", str(SYSTEMS_OWN))
    told_by(kit.folder / "unpacked" / "python-0.0.1", "import sglang, shared, sgl_kernel")


def test_the_python_may_be_named_by_a_variable(kit: Kit):
    words = [word for word in kit.words() if word not in ("--python", sys.executable)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=SOON,
        env={**os.environ, "BASE_PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr


# --- what is unpacked -----------------------------------------------------------------------------


def test_gpu_check_is_started_in_the_primary_releases_python(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
):
    # A person's own setting would win, and torch makes one in a process that has compiled.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    told = kit.started("--budget", "480", "--out", "here", PYTHONPATH="/somewhere")
    folder = kit.folder / "unpacked"
    assert told["words"] == [
        *("gpu-check", "--kit", str(folder), "--budget", "480", "--out", "here"),
        *("--device", "gpu"),
    ]
    assert told["prefix"] == str(folder / "venv-0.0.1")
    environment = told["environment"]
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["SGLANG_HARNESS_CACHE"] == str(folder / "cache")
    compiled = str(folder / "compiled" / "inductor")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == compiled, "else it is left in /tmp"
    assert "PYTHONPATH" not in environment, "it would be looked into before the kit's packages"
    assert "SGLANG_ANSWER" not in environment, "another release's servers would have it"
    assert json.loads((folder / "kit.json").read_text()) == kit.record


def test_variables_that_would_hide_the_kit_or_remove_assertions_do_not_reach_it(kit: Kit):
    kit.record["needs"] = []
    base: str = sys._base_executable  # type: ignore[attr-defined]
    words = {"PYTHONHOME": f"{sys.base_prefix}:{sys.base_exec_prefix}", "PYTHONOPTIMIZE": "1"}
    told = kit.started("--python", base, **words)
    folder = kit.folder / "unpacked"
    assert told["prefix"] == str(folder / "venv-0.0.1")
    assert not {"PYTHONHOME", "PYTHONOPTIMIZE"} & set(told["environment"])
    done = subprocess.run(
        [folder / "python-0.0.1", "-c", "import sglang, sys; print(sys.flags.optimize)"],
        capture_output=True,
        text=True,
        timeout=SOON,
        env={**os.environ, **words},
    )
    assert done.stdout == "0\n", done.stderr


def test_gpu_check_is_found_from_another_folder_with_cdpath(kit: Kit):
    words = kit.words("--no-run")
    for path in (".", str(kit.folder.parent)):
        done = subprocess.run(
            [f"{kit.folder.name}/gpu-check", *words[1:]],
            capture_output=True,
            text=True,
            timeout=SOON,
            cwd=kit.folder.parent,
            env={**os.environ, "CDPATH": path},
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["unpack.py", "describe.py", "kit.json"])
def test_a_kit_that_was_not_copied_whole_is_one_line(kit: Kit, name: str):
    words = kit.words()
    (kit.folder / name).write_text("")
    done = subprocess.run(words, capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"not run: there is no {name} in {kit.folder}: ")
    assert done.stderr.count("\n") == 1


def test_a_folder_that_no_library_can_be_loaded_from_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = os.statvfs(tmp_path)
    flags = real.f_flag | os.ST_NOEXEC
    mounted = os.statvfs_result((*tuple(real)[:8], flags, real.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda _: mounted)
    with pytest.raises(unpack.NotRun, match=r"mounted noexec.*--unpack-to"):
        unpack._make_folder(tmp_path / "unpacked")
    assert list(tmp_path.rglob("*")) == [tmp_path / "unpacked"]


def test_each_release_has_its_own_packages_before_those_of_all_and_of_the_host(kit: Kit):
    kit.started()
    code = "import sglang, shared, sgl_kernel, empty, sglang_harness, pytest; print({})"
    for version, shared in (("0.0.1", "of all releases"), ("0.0.2", "of 0.0.2")):
        python = kit.folder / "unpacked" / f"python-{version}"
        told = told_by(python, code.format("sglang.version, '|', shared.what, '|', empty.what"))
        assert told == f"{version} | {shared} | empty"
        assert told_by(python, code.format("sgl_kernel.what")) == "the real one"


def test_a_rehearsal_sees_the_stand_in_for_the_kernels_first_and_patches_what_a_cpu_lacks(
    kit: Kit,
):
    kit.started("--device", "cpu")
    python = kit.folder / "unpacked-cpu" / "python-0.0.1"
    assert told_by(python, "import sgl_kernel; print(sgl_kernel.what)") == "the stand-in"
    assert told_by(python, "import sys; print(sys.patched)") == "1"
    (caveat,) = (
        line
        for line in python.with_name("python-0.0.1.caveats").read_text().splitlines()
        if "rehearsal" in line
    )
    assert "no GPU was seen" in caveat


def test_a_release_s_python_has_its_variables_and_whoever_set_one_before_wins(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
):
    kit.started()
    python = kit.folder / "unpacked" / "python-0.0.1"
    asks = "import os; print(os.environ['SGLANG_ANSWER'], os.environ['TVM_FFI_CACHE_DIR'])"
    compiled = kit.folder / "unpacked" / "compiled" / "tvm-ffi"
    assert told_by(python, asks) == f"it's 42 $HOME {compiled}"
    monkeypatch.setenv("SGLANG_ANSWER", "mine")
    assert told_by(python, asks) == f"mine {compiled}"


def test_a_release_s_python_finds_the_libraries_of_nvidias_wheels_and_the_compilers(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("cu13", "nccl"):
        (tmp_path / "path" / "nvidia" / name / "lib").mkdir(parents=True)
    kit.host["tools"] = {**TOOLS, "nvcc": "/opt/cuda/bin/nvcc"}
    kit.started(PYTHONPATH=str(tmp_path / "path"))
    python = kit.folder / "unpacked" / "python-0.0.1"
    asks = "import os; print(os.environ[{!r}])"
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    libraries = told_by(python, asks.format("LD_LIBRARY_PATH")).split(":")
    theirs = [str(tmp_path / "path" / "nvidia" / name / "lib") for name in ("cu13", "nccl")]
    assert sorted(libraries[:2]) == theirs
    assert libraries[-1] == "/mine"
    path = told_by(python, asks.format("PATH")).split(":")
    assert path[-2:] == [str(Path(sys.executable).parent), "/opt/cuda/bin"]


def test_a_toolkit_is_the_one_that_links_wherever_nvcc_is_a_link_to_it(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    toolkit = tmp_path / "cuda-13.0"
    for file in ("bin/nvcc", "lib64/libcudart.so"):
        (toolkit / file).parent.mkdir(parents=True)
        (toolkit / file).touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    kit.host["tools"] = {**TOOLS, "nvcc": str(tmp_path / "bin" / "nvcc")}
    kit.started()
    python = kit.folder / "unpacked" / "python-0.0.1"
    assert told_by(python, "import os; print(os.environ['CUDA_HOME'])") == str(toolkit)
    assert "cannot be compiled" not in python.with_name("python-0.0.1.caveats").read_text()


def test_what_is_missing_to_compile_with_is_named(kit: Kit, tmp_path: Path):
    (tmp_path / "nvcc").touch()
    kit.host["tools"] = {**TOOLS, "nvcc": str(tmp_path / "nvcc"), "ninja": None}
    with_no_toolkit = (
        ""
        if Path("/usr/local/cuda/lib64/libcudart.so").exists()
        else (", no libcudart.so beside nvcc")
    )
    kit.started()
    caveats = (kit.folder / "unpacked" / "python-0.0.1.caveats").read_text()
    assert f"There is no ninja{with_no_toolkit}: kernels that SGLang compiles" in caveats


def test_caveats_are_a_sentence_a_line(kit: Kit):
    kit.host["tools"] = {**TOOLS, "nvcc": None}
    kit.started()
    folder = kit.folder / "unpacked"
    assert (folder / "python-0.0.1.caveats").read_text().splitlines() == [
        "A stand-in for IPython: imported and never called.",
        "There is no nvcc: kernels that SGLang compiles while it serves cannot be compiled.",
    ]
    assert (folder / "python-0.0.2.caveats").read_text().splitlines()[0] == (
        "It asks for other kernels."
    )


def test_the_second_run_unpacks_nothing(kit: Kit):
    kit.started()
    (kit.folder / "payload.tar.xz").unlink()
    file = kit.folder / "unpacked" / "site" / "shared.py"
    before = file.stat().st_ino
    assert "unpacking" not in kit.run().stderr
    assert file.stat().st_ino == before


def test_another_python_of_the_same_kind_gets_new_environments(kit: Kit, tmp_path: Path):
    kit.started()
    path = tmp_path / "more"
    path.mkdir()
    (path / "added.py").touch()
    kit.started(PYTHONPATH=str(path))
    told_by(kit.folder / "unpacked" / "python-0.0.1", "import added")


def test_the_folders_may_have_spaces_quotes_and_letters_of_any_alphabet(tmp_path: Path):
    kit = Kit(tmp_path / "a kit's “folder” $HOME")
    to = tmp_path / "un packed 'ü' #1"
    told = kit.started("--unpack-to", str(to))
    assert told["prefix"] == str(to / "venv-0.0.1")
    assert told_by(to / "python-0.0.1", "import sglang; print(sglang.version)") == "0.0.1"
    kit.started("--unpack-to", str(tmp_path / "rehearsal 'ü'"), "--device", "cpu")
    told_by(tmp_path / "rehearsal 'ü'" / "python-0.0.1", "import sys; sys.patched")


def test_a_folder_whose_name_cannot_be_in_a_search_path_is_one_line(kit: Kit, tmp_path: Path):
    assert "has a line break or a colon" in kit.refused("--unpack-to", str(tmp_path / "a:b"))
    assert "has a line break or a colon" in kit.refused("--unpack-to", f"{tmp_path}/a\nb")


def test_a_folder_of_another_kit_is_left_alone(kit: Kit, tmp_path: Path):
    to = tmp_path / "to"
    kit.started("--unpack-to", str(to))
    other = Kit(tmp_path / "other")
    other.pack({**PAYLOAD, "site/more.py": ""})
    assert f"{to} was unpacked for another kit" in other.refused("--unpack-to", str(to))
    assert f"{to} was unpacked for --device gpu" in kit.refused(
        *("--unpack-to", str(to), "--device", "cpu")
    )
    assert (to / "site" / "shared.py").exists()
    assert not (to / "site" / "more.py").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(kit: Kit, tmp_path: Path):
    to = tmp_path / "home"
    to.mkdir()
    (to / "thesis.txt").touch()
    assert "is not empty, and what is in it is no kit" in kit.refused("--unpack-to", str(to))
    assert [path.name for path in to.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written_is_one_line(kit: Kit, tmp_path: Path):
    (tmp_path / "file").touch()
    line = kit.refused("--unpack-to", str(tmp_path / "file" / "to"))
    assert line.endswith(
        "cannot be written (Not a directory): name a folder that can with --unpack-to."
    )


def test_a_kit_on_a_medium_that_cannot_be_written_unpacks_elsewhere(kit: Kit, tmp_path: Path):
    kit.words()
    before = sorted(kit.folder.iterdir())
    kit.started("--unpack-to", str(tmp_path / "to"))
    assert sorted(kit.folder.iterdir()) == before, "nothing is written beside it"


# --- cut short, and two at once -------------------------------------------------------------------


def test_what_was_killed_half_way_starts_again(kit: Kit):
    many = {f"site/many/m{n}.py": f"x = {n}\n" * 200 for n in range(4000)}
    kit.pack({**PAYLOAD, **many})
    folder = kit.folder / "unpacked"
    process = subprocess.Popen(kit.words(), start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + SOON
        while not (folder / "unpacking" / "site" / "many" / "m100.py").exists():
            assert process.poll() is None, "it ended"
            assert time.monotonic() < until, f"waited {SOON:g} s for 100 files"
            time.sleep(0.001)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "complete").exists()
    assert not (folder / "site").exists(), "half of it would be taken for all"
    kit.started()
    assert len(list((folder / "site" / "many").glob("m*.py"))) == 4000
    assert not (folder / "unpacking").exists()


def test_two_at_once_unpack_once_and_both_run(kit: Kit):
    kit.pack({**PAYLOAD, **{f"site/many/m{n}.py": "x = 1\n" * 200 for n in range(2000)}})
    words = kit.words()
    both = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [each.communicate(timeout=SOON) for each in both]
    assert [each.returncode for each in both] == [0, 0], ended
    assert "".join(errors for _, errors in ended).count("gpu-check: unpacking") == 1
    for output, _ in ended:
        assert json.loads(output)["words"][0] == "gpu-check"


def test_nothing_is_left_running(kit: Kit):
    kit.started()
    left = [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if any(str(kit.folder) in word for word in p.info["cmdline"] or [])
    ]
    assert left == []


# --- what a payload must not have -----------------------------------------------------------------


def link(name: str, to: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("/tmp/out-of-it"),
        tarfile.TarInfo("site/../../out-of-it"),
        link("site/link", "/etc/passwd", tarfile.SYMTYPE),
        link("site/link", "site/shared.py", tarfile.LNKTYPE),
        link("site/pipe", "", tarfile.FIFOTYPE),
        link("site/device", "", tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_a_member_that_no_kit_has_is_refused(member: tarfile.TarInfo, kit: Kit):
    kit.pack(PAYLOAD, member)
    assert f"the payload has {member.name!r} in it, which no kit has" in kit.refused()
    assert not (kit.folder / "unpacked" / "site").exists()


def test_a_payload_with_more_in_it_than_was_said_is_refused(kit: Kit):
    kit.record["payload"]["unpacked_bytes"] -= 1
    assert "has more in it than kit.json says" in kit.refused()


def test_a_payload_that_is_no_archive_is_refused(kit: Kit):
    (kit.folder / "payload.tar.xz").write_bytes(b"x" * 1000)
    kit.record["payload"]["sha256"] = hashlib.sha256(b"x" * 1000).hexdigest()
    assert "payload.tar.xz cannot be unpacked (" in kit.refused()


@pytest.mark.skipif(shutil.which("xz") is None, reason="there is no xz here")
def test_a_python_without_lzma_has_xz_unpack(kit: Kit, tmp_path: Path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "lzma.py").write_text("raise ImportError('not built')\n")
    kit.started(PYTHONPATH=str(tmp_path / "path"))
    told_by(kit.folder / "unpacked" / "python-0.0.1", "import sglang")
    shutil.rmtree(kit.folder / "unpacked")
    (tmp_path / "bin").mkdir()
    for name in ("sh", "dirname", "env"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    line = kit.refused(PYTHONPATH=str(tmp_path / "path"), PATH=str(tmp_path / "bin"))
    assert "was built without lzma, and there is no xz" in line


# --- what the rest of the project reads -----------------------------------------------------------


def test_the_record_of_these_kits_is_the_one_that_kits_are_built_with(kit: Kit):
    told = json.loads(KitRecord.model_validate(kit.record).as_json())
    assert told == kit.record


def test_unpack_py_needs_nothing_beyond_the_standard_library():
    tree = ast.parse(Path(unpack.__file__).read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} <= sys.stdlib_module_names
