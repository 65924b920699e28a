"""The folder of the results: every file in it is whole at any time, and none holds a secret."""

from __future__ import annotations

import os
import re
import tarfile
from datetime import date
from pathlib import Path

from sglang_harness._base.secrets import Redactor, named_as_secrets
from sglang_harness._base.whole_file import write_whole
from sglang_harness.errors import HarnessError, SpecError
from sglang_harness.gpu_check.results import ARCHIVE, PARTS, RESULTS, SUMMARY, Results

#: Weights: never in the archive, whatever wrote them there.
CHECKPOINTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".npy", ".npz"})
#: A larger file is left out of the archive, which is made to be carried away.
LARGEST = 16 << 20


class Record:
    """Writes the results of one run.

    Args:
        folder: see :func:`new_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._secrets = named_as_secrets(os.environ)
        self._redactor = Redactor(*self._secrets)

    def keep_secret(self, value: str) -> None:
        """From now on ``value`` is written nowhere, and is removed from what was written."""
        if value:
            self._secrets.append(value)
            self._redactor = Redactor(*self._secrets)

    def redact(self, text: str) -> str:
        return self._redactor.text(text)

    def write(self, results: Results, summary: str) -> None:
        """Writes everything that there is by now.

        Raises:
            HarnessError: it cannot be written.
        """
        data = Results.model_validate(self._redactor.data(results.model_dump(by_alias=True)))
        try:
            text = data.model_dump_json(by_alias=True, indent=1)
            write_whole(self.folder / RESULTS, text + "\n")
            write_whole(self.folder / SUMMARY, self.redact(summary))
            self._clean()
            self._pack()
        except OSError as error:
            raise HarnessError(
                f"The results cannot be written to {self.folder}: {error.strerror or error}."
            ) from None

    def _clean(self) -> None:
        """Removes secrets from the files that parts have written."""
        for path in self._files():
            if left_out(path):
                continue
            data = path.read_bytes()
            text = data.decode("utf-8", "surrogateescape")
            clean = self.redact(text)
            if clean != text:
                path.write_bytes(clean.encode("utf-8", "surrogateescape"))

    def _files(self) -> list[Path]:
        own = {self.folder / name for name in (RESULTS, SUMMARY, ARCHIVE)}
        return sorted(
            p for p in self.folder.rglob("*") if p.is_file() and not p.is_symlink() and p not in own
        )

    def _pack(self) -> None:
        beside = self.folder / f".{ARCHIVE}.part"
        try:
            with tarfile.open(beside, "w:gz") as archive:
                for path in [self.folder / RESULTS, self.folder / SUMMARY, *self._files()]:
                    if path != beside and not left_out(path):
                        name = Path(self.folder.name) / path.relative_to(self.folder)
                        archive.add(path, str(name), recursive=False)
            beside.replace(self.folder / ARCHIVE)
        finally:
            beside.unlink(missing_ok=True)


def left_out(file: Path) -> bool:
    """Whether a file is kept out of the archive."""
    return file.suffix in CHECKPOINTS or file.stat().st_size > LARGEST


def new_folder(wanted: Path) -> Path:
    """Makes the folder for the results of one run.

    Raises:
        SpecError: it cannot be made or written to, or holds the results of an earlier run.
    """
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        earlier = (wanted / RESULTS).exists()
        (wanted / PARTS).mkdir(exist_ok=True)
        write_whole(wanted / SUMMARY, "gpu-check has begun.\n") if not earlier else None
    except OSError as error:
        raise SpecError(
            f"{wanted} cannot be written to: {error.strerror or error}.",
            advice="Name another folder with --out.",
        ) from None
    if earlier:
        raise SpecError(
            f"{wanted} holds the results of an earlier run.",
            advice="Name another folder with --out, or remove it.",
        )
    return wanted.resolve()


def default_folder(device: str, checkout: Path | None, today: date | None = None) -> Path:
    """A folder that is not there yet: ``DEVICE-DATE``, or the same with ``-2``, ``-3``, ...

    Args:
        device: name of the GPU, or ``cpu``.
        checkout: of this project; its ``bench/results`` is where results of GPUs belong.
    """
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "gpu"
    day = (today or date.today()).isoformat()
    base = Path.cwd() / f"gpu-check-{name}-{day}"
    if checkout is not None:
        base = checkout / "bench" / "results" / f"{name}-{day}"
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
