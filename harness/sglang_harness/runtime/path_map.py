"""How a path on this machine looks from inside a server's container."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path, PurePosixPath

import docker
from docker.errors import NotFound
from docker.types import Mount

from sglang_harness._base import temporary
from sglang_harness._base.permissions import make_readable
from sglang_harness._base.temporary import temporary_folder
from sglang_harness.errors import EngineError

EXCHANGE = PurePosixPath("/exchange")
MODELS = PurePosixPath("/models")


class SameMachine:
    """A local path is the server's path."""

    def share(self, path: Path) -> PurePosixPath:
        return PurePosixPath(path.resolve())


class FolderReach:
    """Local folders, bind-mounted read-only: the model and a folder for exchange.

    Args:
        folder: for exchange, where it is there already; ``None``: a new one.
        inside: where the server sees it.
        model_inside: where the server sees the model.
    """

    def __init__(
        self,
        model: Path | None,
        *,
        folder: Path | None = None,
        inside: PurePosixPath = EXCHANGE,
        model_inside: PurePosixPath | None = None,
    ) -> None:
        self._model = model
        if folder is None:
            folder = temporary_folder("exchange")
            folder.chmod(0o755)
        self.folder = folder
        self._inside = inside
        self._model_inside = model_inside or MODELS / (model.name if model else "")

    def mounts(self) -> list[Mount]:
        mounts = [Mount(str(self._inside), str(self.folder), type="bind", read_only=True)]
        if self._model is not None:
            inside = str(self._model_inside)
            mounts.append(Mount(inside, str(self._model), type="bind", read_only=True))
        return mounts

    def share(self, path: Path) -> PurePosixPath:
        """The path inside; copied into the exchange folder where it lies elsewhere."""
        path = path.resolve()
        if path.is_relative_to(self.folder):
            return self._inside / path.relative_to(self.folder)
        if self._model is not None and path.is_relative_to(self._model.resolve()):
            return self._model_inside / path.relative_to(self._model.resolve())
        copy = self.folder / f"{path.name}-{uuid.uuid4().hex[:6]}"
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copy2(path, copy)
        make_readable(copy)
        return self._inside / copy.name

    def close(self) -> None:
        temporary.remove(self.folder)


class VolumeReach:
    """A named volume, filled over the engine's API: works for an engine anywhere."""

    def __init__(self, client: docker.DockerClient, image: str, labels: dict[str, str]) -> None:
        self._client = client
        self._volume = client.volumes.create(
            name=f"sglang-harness-{uuid.uuid4().hex[:8]}", labels=labels
        )
        self.name = str(self._volume.name)
        # Never started: the engine fills a volume through any container that mounts it.
        self._helper = client.containers.create(
            image,
            ["true"],
            entrypoint=[],
            labels=labels,
            mounts=[Mount(str(EXCHANGE), self._volume.name, type="volume")],
        )

    def mounts(self) -> list[Mount]:
        return [Mount(str(EXCHANGE), self._volume.name, type="volume", read_only=True)]

    def share(self, path: Path) -> PurePosixPath:
        return self.upload(path, PurePosixPath(f"{path.name}-{uuid.uuid4().hex[:6]}"))

    def upload(self, path: Path, name: PurePosixPath) -> PurePosixPath:
        """Copies a file or folder into the volume; returns its path inside the server."""

        def readable(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mode |= 0o555 if member.isdir() else 0o444
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            return member

        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w", dereference=True) as tar:
                tar.add(path, arcname=str(name), filter=readable)
            packed.seek(0)
            if not self._helper.put_archive(str(EXCHANGE), io.BufferedReader(packed)):
                raise EngineError(f"The engine did not take {path} into the volume.")
        return EXCHANGE / name

    def close(self) -> None:
        with suppress(NotFound):
            self._helper.remove(force=True)
        with suppress(NotFound):
            self._volume.remove(force=True)
