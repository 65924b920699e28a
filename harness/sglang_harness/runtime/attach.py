"""A server that this run did not start: only an address. It is never started or ended here, and
its log is not accessible."""

from __future__ import annotations

import socket
import threading
import uuid
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import EngineError, SpecError
from sglang_harness.memory import MemorySource
from sglang_harness.runtime import Order, Sidecar, Started
from sglang_harness.runtime.death import Death, DeathWatch, Unknown
from sglang_harness.runtime.path_map import copy_readable, remove_copy
from sglang_harness.spec import Argument

#: Seconds between two attempts to connect to the server, to notice its end.
LOOK_EVERY = 1.0


@dataclass(frozen=True)
class SharedFolder:
    """A folder of this machine that the server sees too, as ``inside``."""

    local: Path
    inside: PurePosixPath
    copies: dict[PurePosixPath, Path] = field(default_factory=dict, compare=False)
    """What :meth:`share` copied: the folder made for it, by the path that it returned."""

    @classmethod
    def parse(cls, text: str) -> SharedFolder:
        """``LOCAL:INSIDE``, or one path that is the same on both sides.

        Raises:
            SpecError: the local folder is not there, or the path inside is not absolute.
        """
        local, _, inside = text.partition(":")
        folder = Path(local).expanduser()
        if not local or not folder.is_dir():
            raise SpecError(
                f"--share {text!r}: {local or 'the part before the colon'} is not a folder of this "
                "machine.",
                advice="Write LOCAL:INSIDE, a folder here and its path as the server sees it.",
            )
        path = PurePosixPath(inside or folder.resolve())
        if not path.is_absolute():
            raise SpecError(f"--share {text!r}: {inside} is not an absolute path.")
        return cls(folder.resolve(), path)

    def share(self, path: Path) -> PurePosixPath:
        """See :class:`sglang_harness.runtime.Reach`; copied where it lies elsewhere."""
        path = path.resolve()
        if path.is_relative_to(self.local):
            return self.inside / path.relative_to(self.local)
        copy = self.local / f"sglang-harness-{uuid.uuid4().hex}" / path.name
        inside = self.inside / copy.relative_to(self.local)
        self.copies[inside] = copy.parent
        copy.parent.mkdir()
        # Others who see the folder cannot list it, and do not know the name.
        copy.parent.chmod(0o711)
        copy_readable(path, copy)
        return inside

    def unshare(self, inside: PurePosixPath) -> None:
        """See :class:`sglang_harness.runtime.Reach`."""
        if (copy := self.copies.get(inside)) is not None:
            remove_copy(copy)
            del self.copies[inside]

    def clear(self) -> list[str]:
        """Removes what :meth:`share` has copied; returns what could not be removed, with why."""
        with Teardown() as down:
            while self.copies:
                copy = self.copies.popitem()[1]
                down.step(str(copy), partial(remove_copy, copy))
        return down.failures


@dataclass(frozen=True)
class Attachment:
    """The runtime for a server that runs already: it starts nothing and ends nothing.

    Attributes:
        url: its base URL, without a key in it.
        api_key: what it asks for; from the environment, never from an argument.
        allow_changes: the server may be changed, as far as its state can be restored. Off, it is
            only read.
        shared: a folder that both sides see, for weights from disk.
        model: the served checkpoint on this machine, for the reference model; ``None``: found by
            the path that the server states, where that is here too.

    Raises:
        SpecError: the URL is invalid, or holds a secret.
    """

    url: str
    api_key: str | None = None
    allow_changes: bool = False
    shared: SharedFolder | None = None
    model: Path | None = None

    name = "attach"
    starts = False
    decides_gpus = True
    decides_model = True

    @property
    def caveats(self) -> tuple[str, ...]:
        how = "with reversible changes" if self.allow_changes else "read-only"
        return (
            f"Attached {how} to an existing server: startup, shutdown and memory were not "
            "observed.",
        )

    def for_another_server(self) -> Attachment:
        """Raises :class:`SpecError`: there is only the one."""
        raise SpecError(
            f"The server at {self.url} runs already, and another one cannot be started from its "
            "address.",
            advice="Leave --url out, and say with --image or --runtime how to start servers.",
        )

    def keeping_parents(self) -> AbstractContextManager[None]:
        """Nothing is started, so nothing is kept."""
        return nullcontext()

    def prepare(self, order: Order) -> AttachedServer:
        """Asks the server what it is. Changes nothing.

        Raises:
            AttachError: nothing answers, it wants another key, or it is not SGLang.
        """
        assert order.identify is not None, "Server.start gives it"
        about = order.identify(self.url, self.api_key)
        model = order.model
        if "model" not in order.spec.model_fields_set:
            here = Path(about.model_path)
            model = self.model or (here if here.is_dir() else None)
        running = AttachedServer(
            self,
            run_id=order.run_id,
            device=about.device,
            model_path=about.model_path,
            model=model,
        )
        order.say(f"attached to SGLang {about.version} at {running.address} ({about.device})")
        return running

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port
        except ValueError:
            usable = False
        if not usable:
            raise SpecError(
                f"--url {self.url!r} is not a valid server URL.",
                advice="Write it as http://127.0.0.1:30000.",
            )
        if parts.username or parts.password or parts.query:
            raise SpecError(
                "--url contains a user, a password or a query, which may be a secret.",
                advice="Put the server's key into the variable SGLANG_API_KEY.",
            )


class AttachedServer:
    """A server that this run did not start, as a :class:`sglang_harness.runtime.Running`."""

    runtime = "attach"
    started = Started("elsewhere")
    owned = False
    shared_folder: Path | None = None
    """What both sides see is not this server's alone: ``reach`` puts copies there that others
    cannot find."""

    def __init__(
        self,
        attachment: Attachment,
        *,
        run_id: str,
        device: Literal["cpu", "gpu"],
        model_path: str,
        model: Path | None,
    ) -> None:
        self.run_id = run_id
        self.device: Literal["cpu", "gpu"] = device
        self.model = model
        self.arguments: dict[str, Argument] = {}
        self.may_change = attachment.allow_changes
        self.address = attachment.url.rstrip("/")
        self.api_key = attachment.api_key
        self._attachment = attachment
        self._model_path = model_path
        self._left: list[str] = []
        self._over = threading.Event()
        self.watch = DeathWatch(self._wait_for_death)

    def start(self) -> None:
        """Does nothing: it runs already."""

    def _wait_for_death(self) -> Death | Unknown:
        parts = urlsplit(self.address)
        where = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        refused = 0
        while not self._over.wait(LOOK_EVERY):
            try:
                socket.create_connection(where, timeout=5).close()
                refused = 0
            except ConnectionRefusedError:
                refused += 1
            except OSError:
                # A slow or broken connection is not a death; the calls will tell.
                continue
            if refused >= 2:
                why = f"nothing listens at {self.address} any more (its log is not accessible)"
                return Death(None, False, why, "", ())
        return Unknown("this run has detached from it")

    def memory(self) -> list[MemorySource]:
        return []

    def cores(self) -> list[int]:
        return []

    def why_no_files(self) -> str | None:
        if self._attachment.shared is None:
            return "no folder is shared with this server (--share)"
        return None

    @property
    def reach(self) -> SharedFolder:
        if self._attachment.shared is None:
            raise EngineError(
                "No folder is shared with this server.",
                advice="Name one that both sides see with --share LOCAL:INSIDE.",
            )
        return self._attachment.shared

    def why_no_sidecar(self) -> str | None:
        return "this run did not start the server"

    def start_sidecar(self, script: str) -> Sidecar:
        """Raises :class:`EngineError`."""
        del script
        raise EngineError(
            f"No sidecar can be started: {self.why_no_sidecar()}.",
            advice="Push from disk or in the body of the request.",
        )

    def model_path(self) -> str:
        return self._model_path

    def logs(self, *, tail: int | None = None) -> str:
        """Empty: the log is not accessible."""
        del tail
        return ""

    def inspect(self) -> dict[str, Any]:
        return {
            "url": self.address,
            "model_path": self._model_path,
            "changes_allowed": self._attachment.allow_changes,
        }

    def host_pids(self) -> list[int]:
        return []

    def end(self, *, at_once: bool = False) -> int | None:
        """Detaches; the server keeps running."""
        del at_once
        self.watch.expected = True
        self._over.set()
        if self._attachment.shared is not None:
            self._left += self._attachment.shared.clear()
        return None

    def left_behind(self) -> list[str]:
        return self._left
