"""How a path on this machine looks from inside a server's container."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import docker
from docker.errors import DockerException
from docker.types import Mount

from sglang_harness._base import temporary
from sglang_harness._base.permissions import link_or_copy
from sglang_harness._base.teardown import Teardown
from sglang_harness._base.temporary import temporary_folder
from sglang_harness.errors import EngineError
from sglang_harness.runtime import engine

EXCHANGE = PurePosixPath("/exchange")
MODELS = PurePosixPath("/models")


class SameMachine:
    """A local path is the server's path."""

    folder: Path | None = None
    """None is needed."""

    def share(self, path: Path) -> PurePosixPath:
        return PurePosixPath(path.resolve())

    def unshare(self, inside: PurePosixPath) -> None:
        """Nothing: no copy was made."""


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
            # The server's user opens its contents by name; other users of this machine do not
            # know the names and cannot list them.
            folder.chmod(0o711)
        self.folder = folder
        self._inside = inside
        self._model_inside = model_inside or MODELS / (model.name if model else "")
        self._copies: dict[PurePosixPath, Path] = {}

    def mounts(self) -> list[Mount]:
        mounts = [Mount(str(self._inside), str(self.folder), type="bind", read_only=True)]
        if self._model is not None:
            inside = str(self._model_inside)
            mounts.append(Mount(inside, str(self._model), type="bind", read_only=True))
        return mounts

    def share(self, path: Path) -> PurePosixPath:
        """The path inside; copied or linked into the exchange folder if it is elsewhere."""
        path = path.resolve()
        if path.is_relative_to(self.folder):
            return self._inside / path.relative_to(self.folder)
        if self._model is not None and path.is_relative_to(self._model.resolve()):
            return self._model_inside / path.relative_to(self._model.resolve())
        copy = self.folder / f"{path.name}-{uuid.uuid4().hex}"
        inside = self._inside / copy.name
        self._copies[inside] = copy
        copy_readable(path, copy)
        return inside

    def unshare(self, inside: PurePosixPath) -> None:
        """See :class:`sglang_harness.runtime.Reach`."""
        if (copy := self._copies.pop(inside, None)) is not None:
            remove_copy(copy)

    def close(self) -> list[str]:
        """Removes the folder with everything in it; returns what could not be removed."""
        return temporary.remove(self.folder)


def copy_readable(source: Path, target: Path) -> None:
    """Copies a file or folder so that every user who knows ``target`` can read it; files on the
    same file system are linked, so that a checkpoint takes its disk once. Where that fails, such
    as on a full disk, nothing of ``target`` stays."""
    try:
        if source.is_dir():
            shutil.copytree(
                source, target, copy_function=lambda a, b: link_or_copy(Path(a), Path(b))
            )
            for each in (target, *target.rglob("*")):
                if each.is_dir():
                    each.chmod(0o755)
        else:
            link_or_copy(source, target)
    except BaseException:
        with suppress(EngineError):
            remove_copy(target)
        raise


def remove_copy(copy: Path) -> None:
    """Removes a file or folder; nothing where it is gone.

    Raises:
        EngineError: it could not be removed.
    """
    try:
        if copy.is_dir():
            shutil.rmtree(copy)
        else:
            copy.unlink(missing_ok=True)
    except OSError as error:
        raise EngineError(f"The copy {copy} could not be removed: {error}.") from None


class VolumeReach:
    """A named volume, filled over the engine's API: works for an engine anywhere.

    Raises:
        EngineError: the engine refused; nothing is left on it.
    """

    folder: Path | None = None
    """It is on the engine's disk alone."""

    def __init__(self, client: docker.DockerClient, image: str, labels: dict[str, str]) -> None:
        self._client = client
        self._image = image
        self._labels = labels
        self._copies: set[PurePosixPath] = set()
        self.name = f"sglang-harness-{uuid.uuid4().hex[:8]}"
        self._volume: Any = None
        self._helper: Any = None
        try:
            self._volume = client.volumes.create(name=self.name, labels=labels)
            # Never started: the engine fills a volume through any container that mounts it.
            self._helper = client.containers.create(
                image, ["true"], entrypoint=[], labels=labels, mounts=[self._mount()]
            )
        except BaseException as error:
            self.close()
            if isinstance(error, DockerException):
                raise EngineError(
                    f"The engine could not make a volume for the model: {error}."
                ) from None
            raise

    def _mount(self, *, read_only: bool = False) -> Mount:
        return Mount(str(EXCHANGE), self.name, type="volume", read_only=read_only)

    def mounts(self) -> list[Mount]:
        return [self._mount(read_only=True)]

    def share(self, path: Path) -> PurePosixPath:
        inside = PurePosixPath(f"{path.name}-{uuid.uuid4().hex[:6]}")
        self._copies.add(EXCHANGE / inside)
        try:
            return self.upload(path, inside)
        except BaseException:
            # The engine may have written a part of it.
            with suppress(EngineError):
                self.unshare(EXCHANGE / inside)
            raise

    def unshare(self, inside: PurePosixPath) -> None:
        """See :class:`sglang_harness.runtime.Reach`. Takes a container's start: the engine's API
        adds files to a volume and removes none."""
        if inside not in self._copies:
            return
        try:
            self._client.containers.run(
                self._image,
                [str(inside)],
                entrypoint=["rm", "-rf", "--"],
                # The copies are root's, as the engine writes them.
                user="0:0",
                cap_drop=["ALL"],
                security_opt=["no-new-privileges:true"],
                network_mode="none",
                read_only=True,
                remove=True,
                labels=self._labels,
                mounts=[self._mount()],
            )
        except (DockerException, OSError) as error:
            raise EngineError(
                f"The copy {inside} in the volume {self.name} could not be removed: {error}."
            ) from None
        self._copies.discard(inside)

    def upload(self, path: Path, name: PurePosixPath) -> PurePosixPath:
        """Copies a file or folder into the volume; returns its path inside the server.

        Raises:
            EngineError: the engine refused.
        """

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
                raise EngineError(f"The engine could not copy {path} into the volume {self.name}.")
        return EXCHANGE / name

    def close(self) -> list[str]:
        """Removes the volume with everything in it; returns what could not be removed."""
        with Teardown() as down:
            if self._helper is not None:
                helper = self._helper
                down.step(
                    f"helper container of the volume {self.name}",
                    lambda: engine.discard(lambda: helper.remove(force=True)),
                )
            if self._volume is not None:
                volume = self._volume
                down.step(
                    f"volume {self.name}",
                    lambda: engine.discard(lambda: volume.remove(force=True)),
                )
        return down.failures
