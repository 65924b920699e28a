"""Unpacks the kit that this file lies in, and runs gpu-check from it.

    unpack.py [--unpack-to FOLDER] [--device gpu|cpu] [options of 'sglang-harness gpu-check']

Runs under the Python of the host that has torch, with nothing but its standard library. What the
host lacks is found before anything is written, said in one line, and is exit code 3.

In FOLDER (beside this file when none is given) are afterwards, for each version of SGLang:

    venv-VERSION/             a Python that sees this kit's packages first, then the host's
    python-VERSION            that one, with the libraries and variables that it needs
    python-VERSION.caveats    what results of it have to be read with, a sentence a line
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

HERE = Path(__file__).resolve().parent
NOT_RUN = 3
MIB = 1 << 20

#: Variables of Python that do not reach what runs from the kit. PYTHONPATH: its folders are behind
#: the kit's. PYTHONHOME: a virtual environment is not one with it. PYTHONOPTIMIZE: it removes the
#: assertions that checks are made of.
NOT_HANDED_ON = ("PYTHONPATH", "PYTHONHOME", "PYTHONOPTIMIZE")

#: Beside the payload itself: what Python compiles of it, and what SGLang compiles while it serves.
BESIDE_PAYLOAD = 512 * MIB

#: Seconds for what can hang: a driver in trouble, an import of torch from a slow disk, another
#: unpacking into the same folder.
DESCRIBE_WITHIN, TORCH_WITHIN, OTHER_WITHIN, COMPILE_WITHIN = 60.0, 300.0, 600.0, 120.0
FITS_WITHIN = 60.0

#: What unpacking writes into its folder, beside what the payload has.
LOCK, COMPLETE, UNPACKING = "payload.lock", "complete", "unpacking"

#: Where drivers put libcuda.so.1 that no loader's configuration names: the container toolkit,
#: distributions, WSL, the compatibility package.
DRIVER_FOLDERS = (
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
    "/usr/local/cuda/compat",
)


class NotRun(Exception):
    """This host, or this kit, is not fit for a run. The message is one line."""


def main(words: list[str]) -> NoReturn:
    """Never returns: becomes gpu-check, or exits."""
    asked, others = _parse(words)
    try:
        kit = _read_kit()
        folder = Path(asked.unpack_to or HERE / _default_folder(asked.device)).absolute()
        host = describe()
        refuse(kit, host, asked.device)
        environment = unpack(kit, host, folder, asked.device)
    except NotRun as error:
        print(f"not run: {error}", file=sys.stderr)
        sys.exit(NOT_RUN)
    except KeyboardInterrupt:
        sys.exit(130)
    primary = _venv(folder, kit["releases"][0]["version"]) / "bin" / "python"
    command = [str(primary), "-m", "sglang_harness", "gpu-check", "--kit", str(folder), *others]
    if not asked.no_run:
        try:
            os.execve(primary, command, environment)  # noqa: S606
        except OSError as error:
            print(f"not run: {primary} cannot be started ({error.strerror}).", file=sys.stderr)
            sys.exit(NOT_RUN)
    sys.exit(0)


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    options = argparse.ArgumentParser(
        prog="gpu-check",
        description="Unpacks this kit once and runs gpu-check from it.",
        epilog="Every other option goes to 'sglang-harness gpu-check': --budget SECONDS, "
        "--out FOLDER, --part NAME, --release VERSION, --slow FACTOR, --list and others.",
        allow_abbrev=False,
    )
    options.add_argument("--python", help="the Python that has torch (default: python3)")
    options.add_argument("--unpack-to", metavar="FOLDER", help="default: beside this kit's files")
    options.add_argument("--no-run", action="store_true", help="only unpack")
    options.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="cpu: a rehearsal without a GPU"
    )
    asked, others = options.parse_known_args(words)
    return asked, [*others, "--device", asked.device]


def _default_folder(device: str) -> str:
    # A rehearsal's Pythons see the stand-in for the kernels first: never the same folder.
    return "unpacked" if device == "gpu" else "unpacked-cpu"


def _read_kit() -> dict[str, Any]:
    file = HERE / "kit.json"
    try:
        kit = json.loads(file.read_text(encoding="utf-8"))
        if kit["schema"] != 1:
            raise NotRun(f"{file} has the schema {kit['schema']!r}, and 1 was expected.")
    except OSError as error:
        raise NotRun(f"{file} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise NotRun(f"{file} is damaged: copy the kit again.") from None
    assert isinstance(kit, dict)
    return kit


# --- the host -------------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """This host, as ``describe.py`` beside this file sees it with this Python."""
    script = HERE / "describe.py"
    try:
        done = subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            text=True,
            timeout=DESCRIBE_WITHIN,
            env={
                **os.environ,
                "PYTHONDONTWRITEBYTECODE": "1",
                # NVML lies where the driver's other libraries do.
                "LD_LIBRARY_PATH": _joined(
                    os.environ.get("LD_LIBRARY_PATH", ""), *_folder_of_driver()
                ),
            },
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"{script} did not describe this host in {DESCRIBE_WITHIN:g} s.") from None
    except OSError as error:
        raise NotRun(f"{script} cannot be run ({error.strerror}).") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise NotRun(f"{script} could not describe this host ({last}).")
    try:
        # What starts with this Python may print as well, before.
        host = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        raise NotRun(f"{script} described this host in words that are not JSON.") from None
    assert isinstance(host, dict)
    if host["torch"] is None or host["cuda"] is None:
        host["torch"], host["cuda"] = _torch_by_import(host["torch"], host["cuda"])
    return host


def _torch_by_import(torch: str | None, cuda: str | None) -> tuple[str | None, str | None]:
    """torch's version and its CUDA's, asked of torch itself: its files did not tell both. An import
    takes seconds to minutes, so it is asked only where the answer decides a refusal."""
    code = (
        "import importlib.util, json\n"
        "if importlib.util.find_spec('torch') is None:\n"
        "    print(json.dumps([None, None]))\n"
        "else:\n"
        "    import torch\n"
        "    print(json.dumps([torch.__version__, torch.version.cuda]))\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=TORCH_WITHIN,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"torch was not imported by {sys.executable} in {TORCH_WITHIN:g} s.") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NotRun(f"torch cannot be imported by {sys.executable} ({last}).")
    try:
        told = json.loads((done.stdout.strip().splitlines() or [""])[-1])
    except ValueError:
        raise NotRun(f"torch of {sys.executable} did not tell its version.") from None
    return (told[0] or torch, told[1] or cuda)


def refuse(kit: dict[str, Any], host: dict[str, Any], device: str) -> None:
    """Raises :class:`NotRun` for a host that the kit was not made for. Cheapest questions first;
    nothing is written."""
    made = kit["made_for"]
    if device == "gpu" and not made["architectures"]:
        raise NotRun("the kit has no kernels for GPUs: it is for a rehearsal, --device cpu.")
    python = ".".join(host["python"].split(".")[:2])
    here = f"{host['implementation']} {python}"
    if here != f"cpython {made['python']}":
        raise NotRun(
            f"the kit was made for CPython {made['python']}, and {sys.executable} is {here}: "
            "name another with --python."
        )
    if host["machine"] != made["machine"]:
        raise NotRun(f"the kit was made for {made['machine']}, and this is {host['machine']}.")
    if host["glibc"] is None or _numbers(host["glibc"]) < _numbers(made["glibc"]):
        found = f"glibc {host['glibc']}" if host["glibc"] else "another C library"
        raise NotRun(f"the kit needs glibc {made['glibc']} or newer, and this host has {found}.")
    _refuse_torch(made, host, device)
    if device == "gpu":
        _refuse_gpus(made, host)
    missing = [name for name in kit["needs"] if name not in host["packages"]]
    if missing:
        raise NotRun(
            f"{sys.executable} lacks {len(missing)} of the packages that the kit expects here: "
            f"{', '.join(missing)}. Build the kit for this host: 'sglang-harness kit --target' "
            "with what describe.py prints here."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _refuse_torch(made: dict[str, Any], host: dict[str, Any], device: str) -> None:
    torch, cuda = host["torch"], host["cuda"]
    if torch is None:
        raise NotRun(
            f"{sys.executable} has no torch, and the kit was made for torch {made['torch']}: "
            "name the Python that has it with --python."
        )
    if torch.partition("+")[0] != made["torch"]:
        raise NotRun(f"the kit was made for torch {made['torch']}, and {torch} is installed here.")
    if device == "cpu":
        return
    if cuda is None:
        raise NotRun(f"torch {torch} here is a build without CUDA.")
    if int(cuda.split(".")[0]) != made["cuda"]:
        raise NotRun(
            f"the kit was made for a torch with CUDA {made['cuda']}, and torch {torch} here has "
            f"CUDA {cuda}."
        )


def _refuse_gpus(made: dict[str, Any], host: dict[str, Any]) -> None:
    if not host["gpus"]:
        raise NotRun(f"no GPU: {host.get('driver_trouble') or 'the driver lists none'}")
    if len(_without_kernels(made, host)) == len(host["gpus"]):
        raise NotRun(
            f"the kit has kernels for {', '.join(made['architectures'])}, and the GPU here is "
            f"{', '.join(_without_kernels(made, host))}."
        )


def _only_with_kernels(made: dict[str, Any], host: dict[str, Any]) -> dict[str, str]:
    """The variable that leaves the GPUs that the kit has kernels for, where others are there too;
    empty where all have, or where this host's driver told no UUIDs."""
    without = _without_kernels(made, host)
    uuids = [
        g.get("uuid") for g in host["gpus"] if not _without_kernels(made, {**host, "gpus": [g]})
    ]
    if not without or not all(uuids):
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, uuids))}


def _without_kernels(made: dict[str, Any], host: dict[str, Any]) -> list[str]:
    """The GPUs that the kit has no kernels for, such as ``NVIDIA A100 (sm80)``."""
    named = [(g["name"], "sm" + g["capability"].replace(".", "")) for g in host["gpus"]]
    return [f"{name} ({sm})" for name, sm in named if sm not in made["architectures"]]


# --- unpacking ------------------------------------------------------------------------------------


def unpack(kit: dict[str, Any], host: dict[str, Any], folder: Path, device: str) -> dict[str, str]:
    """Unpacks into ``folder`` what is not there yet, and makes a Python for each release.

    Returns:
        the environment that gpu-check runs in.
    """
    _refuse_odd_names(folder)
    owner = f"{kit['payload']['sha256']} {device}"
    _make_folder(folder)
    with _only_one(folder, owner):
        if not _is_complete(folder, owner):
            began = time.monotonic()
            _check_disk(kit, folder)
            payload = _check_payload(kit)
            _say(f"unpacking {kit['payload']['unpacked_bytes'] // MIB} MiB into {folder}")
            _extract(payload, kit, folder)
            _compile(folder)
            _write(folder / COMPLETE, owner + "\n")
            _say(f"unpacked in {time.monotonic() - began:.0f} s")
        # What follows is made anew each time: this Python may be another one than last time.
        _write(folder / "kit.json", (HERE / "kit.json").read_text(encoding="utf-8"))
        for release in kit["releases"]:
            _make_python(kit, release, host, folder, device)
    return {
        **_caches(folder),
        **(_only_with_kernels(kit["made_for"], host) if device == "gpu" else {}),
        **{k: v for k, v in os.environ.items() if k not in NOT_HANDED_ON},
        "LD_LIBRARY_PATH": _joined(*_libraries(), os.environ.get("LD_LIBRARY_PATH", "")),
        "PATH": _joined(os.environ.get("PATH", os.defpath), *_tools(host)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_HARNESS_CACHE": os.environ.get("SGLANG_HARNESS_CACHE") or str(folder / "cache"),
    }


def _say(text: str) -> None:
    print(f"gpu-check: {text}", file=sys.stderr, flush=True)


def _refuse_odd_names(folder: Path) -> None:
    # A line break would end a line of a .pth file; a colon would end an entry of a search path.
    if any(c in str(folder) for c in "\n\r:"):
        raise NotRun(f"the folder {str(folder)!r} has a line break or a colon in its name.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise NotRun(
                f"{folder} is on a file system that is mounted noexec, from which no library can "
                "be loaded: name a folder on another with --unpack-to."
            )
        names = {path.name for path in folder.iterdir()}
        # The lock is the first thing that unpacking writes.
        if names and LOCK not in names:
            raise NotRun(
                f"{folder} is not empty, and what is in it is no kit: name another with "
                "--unpack-to."
            )
        (folder / LOCK).open("a").close()
    except OSError as error:
        raise NotRun(
            f"{folder} cannot be written ({error.strerror}): name a folder that can with "
            "--unpack-to."
        ) from None


@contextlib.contextmanager
def _only_one(folder: Path, owner: str) -> Iterator[None]:
    """Holds ``folder`` for this process, and refuses one that has something else in it."""
    with (folder / LOCK).open("r+") as lock:
        until, told = time.monotonic() + OTHER_WITHIN, False
        while not _locked(lock):
            if not told:
                _say(f"another process is unpacking into {folder}: waiting for it")
                told = True
            if time.monotonic() > until:
                raise NotRun(f"another process has been unpacking into {folder} for too long.")
            time.sleep(0.2)
        of = lock.read().strip()
        if of and of != owner:
            theirs, _, for_device = of.partition(" ")
            what = "another kit" if theirs != owner.split()[0] else f"--device {for_device}"
            raise NotRun(f"{folder} was unpacked for {what}: name another with --unpack-to.")
        if not of:
            lock.write(owner + "\n")
            lock.flush()
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # A file system without locks: what is complete can still be used, and two at once cannot.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise NotRun(f"{lock.name} cannot be locked ({error.strerror}).") from None
    return True


def _is_complete(folder: Path, owner: str) -> bool:
    try:
        return (folder / COMPLETE).read_text().strip() == owner
    except OSError:
        return False


def _check_disk(kit: dict[str, Any], folder: Path) -> None:
    needed = kit["payload"]["unpacked_bytes"] + BESIDE_PAYLOAD
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NotRun(
            f"the kit needs {needed // MIB} MiB of disk in {folder}, and {free // MIB} MiB are "
            "free: name another folder with --unpack-to."
        )


def _check_payload(kit: dict[str, Any]) -> Path:
    payload = HERE / str(kit["payload"]["file"])
    summed = hashlib.sha256()
    try:
        with payload.open("rb") as file:
            while chunk := file.read(MIB):
                summed.update(chunk)
    except OSError as error:
        raise NotRun(f"{payload} cannot be read ({error.strerror}).") from None
    if summed.hexdigest() != kit["payload"]["sha256"]:
        raise NotRun(f"{payload} is damaged (its SHA-256 differs): copy the kit again.")
    return payload


def _extract(payload: Path, kit: dict[str, Any], folder: Path) -> None:
    """Extracts beside its place, and then moves there: what was cut short is never taken for
    whole."""
    beside = folder / UNPACKING
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        with _opened(payload) as archive:
            left = kit["payload"]["unpacked_bytes"]
            for member in archive:
                _refuse_member(member)
                left -= member.size
                if left < 0:
                    raise NotRun(f"{payload} has more in it than kit.json says: copy it again.")
                if hasattr(tarfile, "data_filter"):
                    archive.extract(member, beside, filter="data")
                else:
                    archive.extract(member, beside)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise NotRun(f"{payload} cannot be unpacked ({error}).") from None
    except OSError as error:
        raise NotRun(f"unpacking into {folder} failed ({error.strerror or error}).") from None
    for made in beside.iterdir():
        place = folder / made.name
        if place.is_dir():
            shutil.rmtree(place)
        made.replace(place)
    beside.rmdir()


@contextlib.contextmanager
def _opened(payload: Path) -> Iterator[tarfile.TarFile]:
    """The archive as a stream. A Python that was built without lzma has ``xz`` do its part."""
    try:
        import lzma
    except ImportError:
        if shutil.which("xz") is None:
            raise NotRun(
                f"{sys.executable} was built without lzma, and there is no xz: one is needed to "
                "unpack."
            ) from None
        running = subprocess.Popen(["xz", "-dc", str(payload)], stdout=subprocess.PIPE)
        try:
            with tarfile.open(fileobj=running.stdout, mode="r|") as archive:
                yield archive
        finally:
            running.kill()
            running.wait()
        return
    try:
        with tarfile.open(payload, mode="r|xz") as archive:
            yield archive
    except lzma.LZMAError as error:
        raise tarfile.TarError(str(error)) from None


def _refuse_member(member: tarfile.TarInfo) -> None:
    """Raises for what a kit never has: links, devices, paths that lead out of the folder."""
    parts = Path(member.name).parts
    if not (member.isfile() or member.isdir()) or member.name.startswith("/") or ".." in parts:
        raise NotRun(f"the payload has {member.name!r} in it, which no kit has: copy it again.")


def _compile(folder: Path) -> None:
    """Python's bytecode of everything, on all cores: a server imports SGLang in three processes at
    once. Nothing depends on it, so it is not waited for beyond its bound."""
    every = [*sorted(folder.glob("site*")), folder / "harness", folder / "stand_ins"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "compileall", "-q", "-j", "0", *every],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=COMPILE_WITHIN,
        )


# --- a Python for each release --------------------------------------------------------------------


def _make_python(
    kit: dict[str, Any], release: dict[str, Any], host: dict[str, Any], folder: Path, device: str
) -> None:
    version = release["version"]
    made = _venv(folder, version)
    link = made / "bin" / "python"
    if not (made / "pyvenv.cfg").exists() or not link.exists() or _moved(link):
        try:
            venv.EnvBuilder(with_pip=False, symlinks=True, clear=True).create(made)
        except (OSError, ValueError, subprocess.CalledProcessError, SystemExit) as error:
            raise NotRun(f"{sys.executable} cannot make a virtual environment ({error}).") from None
    places = [release.get("site"), "site", "stand_ins", "harness"]
    lines = [str(folder / place) for place in places if place and (folder / place).is_dir()]
    if device == "cpu":
        # With the files *.pth of the stand-ins, which patch what a CPU lacks.
        stand_ins = folder / "harness" / "sglang_harness" / "shipped" / "docker" / "stand_ins"
        lines.insert(0, f"import site; site.addsitedir({str(stand_ins)!r})")
    # As venv makes it. Debian's own Python would state another folder for itself.
    packages = made / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    _write(packages / "kit.pth", "".join(f"{line}\n" for line in [*lines, *_path_of_host()]))
    unfit = _unfit(link, [str(folder / place) for place in places if place], kit["needs"])
    caveats = _caveats(kit, release, host, device, unfit)
    _write(folder / f"python-{version}.caveats", "".join(caveats))
    only = _only_with_kernels(kit["made_for"], host) if device == "gpu" else {}
    _write(folder / f"python-{version}", _wrapper(release, host, folder, only), mode=0o755)


#: Prints what the kit's packages require of the host's, and is not there in such a version.
_FITS = """
import importlib.metadata as metadata, json, re, sys
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version
places, needs = json.loads(sys.argv[1])
unfit = set()
for package in metadata.distributions(path=places):
    for line in package.requires or ():
        wanted = Requirement(line)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name not in needs or wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        there = metadata.version(name)
        try:
            fits = wanted.specifier.contains(Version(there).public, prereleases=True)
        except InvalidVersion:
            fits = not wanted.specifier
        if not fits:
            by = package.metadata["Name"] + " " + package.version
            unfit.add(f"this host has {name} {there}, and {by} requires {name}{wanted.specifier}")
print(json.dumps(sorted(unfit)))
"""


def _unfit(python: Path, places: list[str], needs: list[str]) -> list[str]:
    """What the kit's packages require of this host's and do not find, a sentence each. A kit that
    was made by names alone does not know their versions."""
    try:
        done = subprocess.run(
            [str(python), "-c", _FITS, json.dumps([places, needs])],
            capture_output=True,
            text=True,
            timeout=FITS_WITHIN,
            env={k: v for k, v in os.environ.items() if k not in NOT_HANDED_ON},
            cwd="/",
        )
        if done.returncode == 0:
            unfit = [str(line) for line in json.loads(done.stdout.strip().splitlines()[-1])]
        else:
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            unfit = [f"whether this host's packages fit the kit's is not known ({why})"]
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        why = type(error).__name__
        unfit = [f"whether this host's packages fit the kit's is not known ({why})"]
    for line in unfit:
        _say(line)
    return unfit


def _venv(folder: Path, version: str) -> Path:
    return folder / f"venv-{version}"


def _moved(link: Path) -> bool:
    """Whether a venv's Python is another one than this."""
    return link.resolve() != Path(sys.executable).resolve()


def _path_of_host() -> list[str]:
    """Where this Python imports from, apart from its standard library, which the new one has too,
    and from this file's folder."""
    own = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    own |= {path / "lib-dynload" for path in own} | {HERE}
    found = [path for path in dict.fromkeys(sys.path) if path and Path(path).is_dir()]
    return [path for path in found if Path(path).resolve() not in own]


def _libraries() -> list[str]:
    """Folders of libraries that the kit's kernels and the memory saver link to: those of NVIDIA's
    wheels, and the driver's where the loader does not find it."""
    found = [str(p) for place in _path_of_host() for p in Path(place).glob("nvidia/*/lib")]
    return list(dict.fromkeys([*found, *_folder_of_driver()]))


def _folder_of_driver() -> list[str]:
    """The folder of the driver's libraries; empty where the loader finds them, or they are not
    there."""
    if _loads("libcuda.so.1"):
        return []
    return [p for p in DRIVER_FOLDERS if Path(p, "libcuda.so.1").exists()][:1]


def _tools(host: dict[str, Any]) -> list[str]:
    """Folders of programs: nvcc's, and this Python's, where ninja from a wheel lies."""
    nvcc = host["tools"].get("nvcc")
    return [str(Path(sys.executable).parent), *([str(Path(nvcc).parent)] if nvcc else [])]


def _cuda_home(host: dict[str, Any]) -> str | None:
    """A CUDA toolkit that compiles and links. SGLang's compiler (tvm-ffi) takes the folder above
    the first nvcc on PATH, which is none where that nvcc is a link or a script elsewhere."""
    nvcc = host["tools"].get("nvcc")
    if nvcc is None:
        return None
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(place) for place in named if place]
    places += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")]
    for place in places:
        if (place / "bin" / "nvcc").exists() and (place / "lib64" / "libcudart.so").exists():
            return str(place)
    return None


def _lacks_to_compile(host: dict[str, Any]) -> list[str]:
    """What is missing to compile kernels with, by name."""
    lacks = [name for name in ("nvcc", "c++", "ninja") if not host["tools"].get(name)]
    if "nvcc" not in lacks and _cuda_home(host) is None:
        lacks.append("libcudart.so beside nvcc")
    return lacks


def _joined(*places: str) -> str:
    """A search path, each place once."""
    every = [place for part in places for place in part.split(os.pathsep) if place]
    return os.pathsep.join(dict.fromkeys(every))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _caches(folder: Path) -> dict[str, str]:
    """Variables that keep what is compiled on this host with the kit."""
    compiled = folder / "compiled"
    places = {
        "TVM_FFI_CACHE_DIR": compiled / "tvm-ffi",
        "TRITON_CACHE_DIR": compiled / "triton",
        "TORCHINDUCTOR_CACHE_DIR": compiled / "inductor",
        "TORCH_EXTENSIONS_DIR": compiled / "torch-extensions",
        "SGLANG_CACHE_DIR": compiled / "sglang",
        "SGLANG_JIT_CACHE_DIR": compiled / "sglang" / "jit",  # SGLang 0.5.23's own, for tvm-ffi's
    }
    return {name: str(place) for name, place in places.items()}


def _wrapper(
    release: dict[str, Any], host: dict[str, Any], folder: Path, more: dict[str, str]
) -> str:
    """A script of the shell. What whoever runs it has set wins; the search paths are completed."""
    variables = {
        **_caches(folder),
        **({"CUDA_HOME": home} if (home := _cuda_home(host)) else {}),
        **more,
        **release["environment"],
    }
    libraries, tools = shlex.quote(_joined(*_libraries())), shlex.quote(_joined(*_tools(host)))
    python = shlex.quote(str(_venv(folder, release["version"]) / "bin" / "python"))
    lines = [
        "#!/bin/sh",
        f"# Made by unpack.py: the Python of this kit that has SGLang {release['version']}.",
        "unset PYTHONHOME PYTHONOPTIMIZE",
        f"libraries={libraries}",
        'libraries="$libraries${LD_LIBRARY_PATH:+${libraries:+:}$LD_LIBRARY_PATH}"',
        '[ -z "$libraries" ] || export LD_LIBRARY_PATH="$libraries"',
        f'export PATH="${{PATH:+$PATH:}}"{tools}',
    ]
    for name, value in variables.items():
        lines.append(f'[ -n "${{{name}+set}}" ] || export {name}={shlex.quote(str(value))}')
    return "\n".join([*lines, f'exec {python} "$@"', ""])


def _caveats(
    kit: dict[str, Any],
    release: dict[str, Any],
    host: dict[str, Any],
    device: str,
    unfit: list[str],
) -> list[str]:
    """One sentence a line."""
    told = [f"a stand-in for {s['name']}: {s['reason']}" for s in release["stand_ins"]]
    told += [*release["caveats"], *unfit]
    if device == "cpu":
        told.append("a rehearsal on the CPU: sgl_kernel is a stand-in, and no GPU was seen")
    else:
        told += [f"no kernels for {gpu}" for gpu in _without_kernels(kit["made_for"], host)]
        if lacks := _lacks_to_compile(host):
            told.append(
                f"there is no {', no '.join(lacks)}: kernels that SGLang compiles while it serves "
                "cannot be compiled"
            )
    lines = [" ".join(line.split()) for line in told]
    return [f"{line[:1].upper()}{line[1:].rstrip('.')}.\n" for line in lines]


def _write(file: Path, text: str, *, mode: int = 0o644) -> None:
    """Whole or not at all: another process may be reading it."""
    beside = file.with_name(f"{file.name}.new")
    # As the import system reads paths of a .pth file: not necessarily UTF-8.
    beside.write_bytes(os.fsencode(text) if file.suffix == ".pth" else text.encode())
    beside.chmod(mode)
    beside.replace(file)


if __name__ == "__main__":
    main(sys.argv[1:])
