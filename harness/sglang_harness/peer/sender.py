"""The trainer's side of a push, in a sidecar: one file, run by the server's own Python.

It cannot import the harness, and needs only torch and, for some routes, the SGLang that is
installed there. Orders come as lines of JSON on standard input, one answer a line goes back:

    open        a folder of safetensors            -> {"tensors": n, "bytes": n}
    ready       room for the largest bucket        -> {"seconds": s}
    pack        a bucket into shared memory        -> {"payloads": [base64 a rank], ...}
    port        a port on loopback, kept free      -> {"port": n}
    join        a process group as its rank 0      -> {"seconds": s}
    broadcast   a bucket, one tensor after another -> {"seconds_read": s, ...}
    leave       the process group                  -> {}
    memory      held above what the imports hold   -> {"peak_bytes": n}
    close       frees everything                   -> {"left": [names in /dev/shm]}

A failed order answers {"error": "..."}. When standard input ends, so does this.
"""

from __future__ import annotations

import base64
import glob
import importlib.util
import io
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import ModuleType
from typing import Any

SHARED_MEMORY = "/dev/shm"  # noqa: S108
BUCKETS = "sglang.srt.weight_sync.tensor_bucket"


class Sender:
    def __init__(self) -> None:
        self.places: dict[str, tuple[str, int, int]] = {}
        self.room: Any = None
        self.shared = False
        self.on_device: dict[int, Any] = {}
        self.segments: list[str] = []
        self.group: Any = None
        self.device: int | None = None
        self.reserved: socket.socket | None = None
        self.imports = resident()["VmRSS"]

    @contextmanager
    def importing(self) -> Iterator[None]:
        """What it adds belongs to Python and its libraries, and not to the peak, which is reset."""
        before = resident()["VmRSS"]
        yield
        self.imports += resident()["VmRSS"] - before
        with suppress(OSError), open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")

    # --- what is sent ---------------------------------------------------------------------

    def open(self, folder: str) -> dict[str, Any]:
        """Finds every tensor of the folder's safetensors files; reads none. Imports torch, which
        takes seconds, while nothing waits for it."""
        with self.importing():
            import torch  # noqa: F401

        self.places = {}
        for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, told in header.items():
                if name != "__metadata__":
                    begin, end = told["data_offsets"]
                    self.places[name] = (path, 8 + length + begin, end - begin)
        if not self.places:
            raise FileNotFoundError(f"no safetensors in {folder}")
        return {
            "tensors": len(self.places),
            "bytes": sum(place[2] for place in self.places.values()),
        }

    def _fill(self, slots: list[Any], room: int, shared: bool) -> float:
        """Reads a bucket straight from the files into one buffer, which is used again."""
        started = time.monotonic()
        self._make_room(room, shared)
        memory = memoryview(self.room.numpy())
        path: str | None = None
        file: Any = None
        try:
            for name, start, nbytes, _dtype, _shape in slots:
                there, offset, size = self.places[name]
                if size != nbytes:
                    raise ValueError(f"{name} has {size} bytes, planned were {nbytes}")
                if there != path:
                    if file is not None:
                        file.close()
                    path, file = there, open(there, "rb", buffering=0)  # noqa: SIM115
                file.seek(offset)
                done = 0
                while done < nbytes:
                    got = file.readinto(memory[start + done : start + nbytes])
                    if not got:
                        raise EOFError(f"{there} ends before {name} does")
                    done += got
        finally:
            if file is not None:
                file.close()
        return time.monotonic() - started

    def ready(self, room: int, shared: bool, devices: list[int] | None = None) -> dict[str, Any]:
        """Everything slow, before the server waits for the first bucket.

        Args:
            devices: as of ``pack``: CUDA's context takes seconds.
        """
        started = time.monotonic()
        self._make_room(room, shared)
        for device in devices or ():
            self._room_on(device, room)
        if shared or devices:
            with self.importing():
                bucket_module()
        return {"seconds": time.monotonic() - started}

    def _make_room(self, room: int, shared: bool) -> None:
        import torch

        if self.room is not None and self.room.numel() >= room and self.shared == shared:
            return
        self.room = None
        self._unlink()
        self.shared = shared
        if not shared:
            self.room = torch.empty(room, dtype=torch.uint8)
            return
        free = os.statvfs(SHARED_MEMORY)
        if free.f_bavail * free.f_frsize < room:
            raise MemoryError(
                f"{SHARED_MEMORY} has {free.f_bavail * free.f_frsize} bytes free, a bucket takes "
                f"{room}: give the server more (shm_size) or make buckets smaller"
            )
        # torch's own default sends a file descriptor, which only a child can receive: an
        # unrelated server dies of it (AuthenticationError, SGLang 0.5.23).
        torch.multiprocessing.set_sharing_strategy("file_system")
        storage = torch.UntypedStorage._new_shared(room)
        self.segments.append(storage._share_filename_cpu_()[1].decode().lstrip("/"))
        self.room = torch.empty(0, dtype=torch.uint8).set_(storage)

    def _tensors(self, slots: list[Any], room: Any) -> Any:
        import torch

        for name, start, nbytes, dtype, shape in slots:
            yield name, room[start : start + nbytes].view(getattr(torch, dtype)).view(shape)

    # --- shared memory and CUDA's handles -------------------------------------------------

    def pack(
        self,
        slots: list[Any],
        extent: int,
        room: int,
        ranks: int,
        flattened: bool = True,
        devices: list[int] | None = None,
    ) -> dict[str, Any]:
        """One payload for each rank: a handle, whose bytes stay here until the next order.

        Args:
            devices: the number of the GPU of each rank, for handles of CUDA.
        """
        from multiprocessing.reduction import ForkingPickler

        import torch.multiprocessing  # noqa: F401 -- teaches that pickler tensors

        read = self._fill(slots, room, shared=devices is None)
        started = time.monotonic()
        payloads = []
        for rank in range(ranks):
            there = self.room if devices is None else self._to_device(devices[rank], extent, room)
            if flattened:
                content: Any = {
                    "flattened_tensor": there[:extent],
                    "metadata": self._metadata(slots),
                }
            else:
                content = list(self._tensors(slots, there))
            packed = io.BytesIO()
            with parents_of(BUCKETS):
                ForkingPickler(packed).dump(content)
            payloads.append(base64.b64encode(packed.getvalue()).decode())
        return {
            "payloads": payloads,
            "seconds_read": read,
            "seconds_pack": time.monotonic() - started,
            "segments": self.segments,
        }

    def _to_device(self, device: int, extent: int, room: int) -> Any:
        """The bucket on one GPU. Not yet tested on a GPU by this project.

        Its handle names the GPU by its number, which is the same for the server: SGLang takes that
        as well as a UUID (``srt/utils/patch_torch.py``, 0.5.15 to 0.5.23), and what would name the
        UUID here takes an import of SGLang, ten seconds and more.
        """
        import torch

        there = self._room_on(device, room)
        there[:extent].copy_(self.room[:extent])
        torch.cuda.synchronize(device)
        return there

    def _room_on(self, device: int, room: int) -> Any:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("no GPU is visible to the peer, and CUDA IPC needs one")
        there = self.on_device.get(device)
        if there is None or there.numel() < room:
            # What CUDA's context holds of the host's memory is no part of a bucket.
            with self.importing():
                there = torch.empty(room, dtype=torch.uint8, device=f"cuda:{device}")
                torch.cuda.synchronize(device)
            self.on_device[device] = there
        return there

    def _metadata(self, slots: list[Any]) -> list[Any]:
        import torch

        kind = bucket_module().FlattenedTensorMetadata
        return [
            kind(
                name=name,
                shape=torch.Size(shape),
                dtype=getattr(torch, dtype),
                start_idx=start,
                end_idx=start + nbytes,
                numel=nbytes,
            )
            for name, start, nbytes, dtype, shape in slots
        ]

    # --- process groups -------------------------------------------------------------------

    def port(self) -> dict[str, Any]:
        """Bound but not listened on until the group is left: the kernel assigns it to no other
        process, and the rendezvous, which sets SO_REUSEADDR, can still listen on it."""
        self._release_port()
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("127.0.0.1", 0))
        return {"port": self.reserved.getsockname()[1]}

    def _release_port(self) -> None:
        if self.reserved is not None:
            self.reserved.close()
            self.reserved = None

    def join(
        self,
        backend: str,
        port: int,
        world: int,
        group: str,
        timeout: float,
        device: int | None = None,
    ) -> dict[str, Any]:
        """Rank 0 of a group whose other ranks are the server's. The rendezvous is SGLang's own
        function, so that both sides agree on it whatever its version.

        Args:
            device: the number of the GPU to send from; none: from memory. Not yet tested on a GPU
                by this project.
        """
        started = time.monotonic()
        self.device = device
        if device is not None:
            import torch

            # Where NCCL makes its connections.
            torch.cuda.set_device(device)
        from sglang.srt.utils import init_custom_process_group

        imported = time.monotonic()
        self.group = init_custom_process_group(
            backend=backend,
            init_method=f"tcp://127.0.0.1:{port}",
            world_size=world,
            rank=0,
            group_name=group,
            timeout=timedelta(seconds=timeout),
        )
        return {
            "seconds_import": imported - started,
            "seconds": time.monotonic() - imported,
        }

    def prepare(self) -> dict[str, Any]:
        """Imports what ``join`` needs, which takes seconds, before anything waits for it."""
        started = time.monotonic()
        with self.importing():
            import sglang.srt.utils  # noqa: F401

        return {"seconds": time.monotonic() - started}

    def broadcast(self, slots: list[Any], room: int) -> dict[str, Any]:
        """One broadcast a tensor, in the order of the names. Returns when all are sent."""
        import torch

        if self.group is None:
            raise RuntimeError("no group was joined")
        read = self._fill(slots, room, shared=False)
        started = time.monotonic()
        for _name, tensor in self._tensors(slots, self.room):
            sent = tensor if self.device is None else tensor.cuda(self.device)
            torch.distributed.broadcast(sent, src=0, group=self.group)
        if self.device is not None:
            torch.cuda.synchronize(self.device)
        return {"seconds_read": read, "seconds_send": time.monotonic() - started}

    def leave(self) -> dict[str, Any]:
        if self.group is not None:
            import torch

            torch.distributed.destroy_process_group(self.group)
            self.group = None
        self._release_port()
        return {}

    # --- the end --------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """The most that it held since it imported something: resident memory above what the
        imports hold (Linux)."""
        return {"peak_bytes": resident()["VmHWM"] - self.imports}

    def close(self) -> dict[str, Any]:
        self.room = None
        self.on_device = {}
        self._release_port()
        return {"left": self._unlink()}

    def _unlink(self) -> list[str]:
        """Unlinks shared memory; a process that has it open keeps it. Returns the names that are
        still there."""
        for name in self.segments:
            try:
                os.unlink(os.path.join(SHARED_MEMORY, name))
            except FileNotFoundError:
                continue
        left = [n for n in self.segments if os.path.exists(os.path.join(SHARED_MEMORY, n))]
        self.segments = []
        return left


def resident() -> dict[str, int]:
    """Bytes of this process's resident memory: now (``VmRSS``) and at most (``VmHWM``)."""
    with open("/proc/self/status") as status:
        told = dict(line.split(":", 1) for line in status)
    return {name: int(told[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def bucket_module() -> Any:
    """SGLang's module of flattened buckets, without importing the rest of SGLang, which takes
    ten seconds and more."""
    if BUCKETS in sys.modules:
        return sys.modules[BUCKETS]
    package = importlib.util.find_spec("sglang")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = os.path.join(folder, *BUCKETS.split(".")[1:]) + ".py"
        if os.path.isfile(path):
            spec = importlib.util.spec_from_file_location(BUCKETS, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[BUCKETS] = module
            spec.loader.exec_module(module)
            return module
    raise ImportError(f"this Python has no {BUCKETS}")


@contextmanager
def parents_of(name: str) -> Iterator[None]:
    """Empty packages above a module, for as long as its classes are pickled: the pickler would
    import the real ones only to find the module that is there already."""
    parts = name.split(".")
    parents = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    made = [parent for parent in parents if parent not in sys.modules]
    for parent in made:
        sys.modules[parent] = ModuleType(parent)
    try:
        yield
    finally:
        for parent in made:
            del sys.modules[parent]


def main() -> None:
    # The output of libraries, and of a daemon that torch starts, must not mix with the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    sender = Sender()
    orders = {
        name: getattr(sender, name)
        for name in (
            "open", "ready", "pack", "port", "prepare", "join", "broadcast", "leave", "memory",
            "close",
        )
    }  # fmt: skip

    def answer(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what).encode() + b"\n")

    answer({"pid": os.getpid(), "uid": os.getuid(), "temporary": os.environ.get("TMPDIR")})
    for line in sys.stdin.buffer:
        order = json.loads(line)
        try:
            answer(orders[order.pop("do")](**order))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    sender.close()
    # Threads of a group that was never left would keep the interpreter alive.
    os._exit(0)


if __name__ == "__main__":
    main()
