"""A parent process that has imported SGLang once, and forks one real server for each request.

Nearly all of the time that a tiny SGLang server takes to start on a CPU is imports, made in three
processes: 18 of 20 s, and 8 of 10 s with what the CPU image does about them (0.5.23). This program
makes them once; a server forked from it answers after 2 s.
It runs inside the server's image, under the server's Python and user, and serves nothing itself.

Requests are lines of JSON on standard input, answers and events lines on standard output:

    {"id": 1, "do": "start", "name": "a", "argv": [...], "environment": {...}, "log": PATH,
     "folder": PATH}       -> {"id": 1, "pid": 42, "port": 20000, "started": SECONDS}
    {"id": 2, "do": "end", "name": "a", "within": 30}      SIGTERM; SIGKILL after 30 s
    {"id": 3, "do": "end", "name": "a", "within": 0}       SIGKILL at once
    {"id": 4, "do": "processes", "name": "a"}              -> {"id": 4, "pids": [42, 57, 58]}
    {"id": 5, "do": "memory", "name": "a"}                 -> {"id": 5, "Pss_Anon": BYTES, ...}
    {"id": 6, "do": "ports"}                               -> {"id": 6, "free": 16}
    {"id": 7, "do": "quit"}                                ends this parent and every server

    {"event": "ready", "pid": 7, "sglang": "0.5.23", "threads": 1, "missing": [], "seconds": 8.7}
    {"event": "ended", "name": "a", "status": 0, "out_of_memory": false, "at": SECONDS}
    {"event": "cleared", "name": "a", "left": []}

"status" is what wait(2) told. "ended" comes at once when a server's main process has ended, and
"cleared" when nothing of it is left: no process, no segment in /dev/shm, no file in "folder".
"{port}" in argv becomes a free one of --ports. A request that fails is answered with "error".

    --ports A,B,C   ports to give out, for a container that publishes exactly these
    --listen PATH   take requests from connections to a socket at PATH too, each as above; a
                    server ends with the connection that asked for it. Standard input is ignored.
    --idle SECONDS  with --listen: end after so long without a connection
    --log PATH      where this program itself writes what it has to say, besides the protocol

Without --listen it ends when its standard input ends, or its parent process does; its servers go
with it, however it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import stat
import sys
import time

#: What a server's processes import (SGLang 0.5.20 to 0.5.23). The registry imports model files,
#: all of them or those that the image names first; what a version does not have is told.
MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.models.registry",
)

#: Beginnings of what SGLang and Python name their segments in /dev/shm. torch's (``torch_PID_``)
#: are told apart by their process id: a peer in another container may have some too.
SEGMENTS = ("sglang_loads_", "sgl_shm_", "psm_")

#: Seconds between two looks at what is ending.
TICK = 0.05

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class Channel:
    """One way in and out: standard input and output, or one connection."""

    def __init__(self, read: int, write: int, connection: socket.socket | None = None) -> None:
        self.read, self.write, self.connection = read, write, connection
        self.rest = b""

    def lines(self) -> list[bytes] | None:
        """Whole lines that have come; ``None`` when the other end has gone."""
        try:
            data = os.read(self.read, 1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [line for line in lines if line.strip()]

    def say(self, **words: object) -> None:
        data = json.dumps(words).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self.write, data) :]
        except OSError:
            pass  # gone; its end is noticed where it is read

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()


class Served:
    """One server that was forked."""

    def __init__(
        self, name: str, pid: int, channel: Channel, port: int | None, folder: str
    ) -> None:
        self.name, self.pid, self.channel, self.port, self.folder = name, pid, channel, port, folder
        self.started = time.time()
        self.ended = False
        self.kill_at: float | None = None
        """When (monotonic) it is killed, if it has not ended by then."""
        self.give_up_at = 0.0
        self.looked_at: set[str] = set()
        """Segments that nobody used at the last look."""
        self.seen: set[int] = {pid}
        """Every process of it that was ever seen."""

    def processes(self) -> set[int]:
        return family(self.pid, ended=self.ended)


class Become(Exception):  # not an error: it carries a forked child out of the loop
    """Raised in the child: it leaves the loop and becomes a server."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv


class Parent:
    def __init__(self, options: argparse.Namespace, out: int) -> None:
        self.ports: list[int] = [int(p) for p in options.ports.split(",") if p]
        self.idle: float = options.idle
        self.kept = bool(options.listen)
        self.born_of = os.getppid()
        self.servers: dict[str, Served] = {}
        self.channels: set[Channel] = set()
        self.segments_before = set(segments())
        self.oom_kills = oom_kills()
        self.used = time.monotonic()
        self.quitting = False
        self.selector = selectors.DefaultSelector()
        self.wake, wake_write = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(wake_write, False)
        self.pipe = (self.wake, wake_write)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the pipe is written to
        signal.signal(signal.SIGTERM, self.quit)
        self.selector.register(self.wake, selectors.EVENT_READ)
        self.listener: socket.socket | None = None
        self.owner = Channel(0, out)
        if options.listen:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(options.listen)
            os.chmod(options.listen, 0o777)  # the folder that it lies in is its owner's alone
            self.listener.listen(16)
            self.selector.register(self.listener, selectors.EVENT_READ)
        else:
            self.take(self.owner)

    def take(self, channel: Channel) -> None:
        self.channels.add(channel)
        self.selector.register(channel.read, selectors.EVENT_READ, channel)

    def quit(self, *_: object) -> None:
        self.quitting = True

    # --- the loop ---------------------------------------------------------------------------

    def run(self, ready: dict[str, object]) -> None:
        """Until it is told to end. Raises :class:`Become` in each child."""
        self.ready = ready
        self.owner.say(**ready)
        while not self.quitting:
            ending = any(s.ended or s.kill_at is not None for s in self.servers.values())
            for key, _ in self.selector.select(TICK if ending else 1.0):
                if key.fileobj == self.wake:
                    self.drain()
                elif key.fileobj is self.listener:
                    self.accept()
                else:
                    self.hear(key.data)
            self.reap()
            self.look_after()
            if not self.kept and os.getppid() != self.born_of:
                self.quitting = True
            if self.servers or self.channels:
                self.used = time.monotonic()
            elif self.kept and time.monotonic() - self.used > self.idle:
                self.quitting = True
        self.end_all()

    def drain(self) -> None:
        try:
            while os.read(self.wake, 4096):
                pass
        except BlockingIOError:
            pass

    def accept(self) -> None:
        assert self.listener is not None
        connection, _ = self.listener.accept()
        connection.settimeout(10.0)
        channel = Channel(connection.fileno(), connection.fileno(), connection)
        self.take(channel)
        channel.say(**self.ready)

    def hear(self, channel: Channel) -> None:
        lines = channel.lines()
        if lines is None:
            self.forget(channel)
            return
        for line in lines:
            request: dict[str, object] = {}
            try:
                request = json.loads(line)
                answer = getattr(self, f"do_{request['do']}")(channel, request)
            except (Become, MemoryError):
                raise
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            channel.say(id=request.get("id") if isinstance(request, dict) else None, **answer)

    def forget(self, channel: Channel) -> None:
        """The other end has gone: what it asked for ends."""
        self.selector.unregister(channel.read)
        self.channels.discard(channel)
        for served in self.servers.values():
            if served.channel is channel:
                served.kill_at = 0.0
        channel.close()
        if channel is self.owner:
            self.quitting = True

    # --- requests ---------------------------------------------------------------------------

    def do_start(self, channel: Channel, request: dict[str, object]) -> dict[str, object]:
        name, argv = str(request["name"]), [str(word) for word in request["argv"]]  # type: ignore[attr-defined]
        environment: dict[str, str] = dict(request.get("environment") or {})  # type: ignore[call-overload]
        folder, log = str(request["folder"]), str(request["log"])
        if name in self.servers:
            raise ValueError(f"a server named {name} is there already")
        port = self.free_port() if "{port}" in argv else None
        argv = [str(port) if word == "{port}" else word for word in argv]
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.makedirs(folder)
            os.chmod(folder, 0o1777)
            pid = os.fork()
        except BaseException:
            os.close(written)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if pid == 0:
            self.be_a_server(written, environment, folder)
            raise Become(argv)
        os.close(written)
        self.servers[name] = Served(name, pid, channel, port, folder)
        return {"pid": pid, "port": port, "started": self.servers[name].started}

    def free_port(self) -> int:
        taken = {s.port for s in self.servers.values()}
        for port in self.ports:
            if port not in taken:
                return port
        raise RuntimeError(f"all of the {len(self.ports)} ports are in use")

    def do_end(self, _: Channel, request: dict[str, object]) -> dict[str, object]:
        served = self.servers[str(request["name"])]
        within = float(request["within"])  # type: ignore[arg-type]
        served.seen |= served.processes()
        served.kill_at = time.monotonic() + within
        if within > 0 and not served.ended:
            # To the main process alone: where its children go first, SGLang takes that for a
            # crash and ends with 137 (0.5.23).
            os.kill(served.pid, signal.SIGTERM)
        return {}

    def do_processes(self, _: Channel, request: dict[str, object]) -> dict[str, object]:
        served = self.servers[str(request["name"])]
        members = served.processes()
        return {
            "pids": [
                *([served.pid] if served.pid in members else []),
                *sorted(members - {served.pid}),
            ]
        }

    def do_memory(self, _: Channel, request: dict[str, object]) -> dict[str, object]:
        return memory(self.servers[str(request["name"])].processes())

    def do_ports(self, *_: object) -> dict[str, object]:
        return {"free": len(set(self.ports) - {s.port for s in self.servers.values()})}

    def do_quit(self, *_: object) -> dict[str, object]:
        self.quitting = True
        return {}

    # --- a child's first steps ---------------------------------------------------------------

    def be_a_server(self, log: int, environment: dict[str, str], folder: str) -> None:
        """In the child: what a process that was started by itself would have had."""
        parent = self.ready["pid"]
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it ended before that could be asked for
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        self.selector.close()
        for each in (nothing, log, *self.pipe, self.owner.write):
            os.close(each)
        for channel in self.channels:
            channel.close()
        if self.listener is not None:
            self.listener.close()
        os.environ.update(environment)
        os.environ["TMPDIR"] = folder
        if "tempfile" in sys.modules:
            sys.modules["tempfile"].tempdir = None

    # --- ends -------------------------------------------------------------------------------

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for served in self.servers.values():
                if served.pid == pid and not served.ended:
                    self.has_ended(served, status)

    def has_ended(self, served: Served, status: int) -> None:
        served.ended = True
        served.give_up_at = time.monotonic() + 10.0
        kills = oom_kills()
        killed = os.WIFSIGNALED(status) and kills > self.oom_kills
        self.oom_kills = kills
        served.channel.say(
            event="ended", name=served.name, status=status, out_of_memory=killed, at=time.time()
        )

    def look_after(self) -> None:
        """Kills what is due, and clears away what has ended."""
        now = time.monotonic()
        for served in list(self.servers.values()):
            if served.ended:
                left = self.clear(served)
                if not left or now > served.give_up_at:
                    del self.servers[served.name]
                    served.channel.say(event="cleared", name=served.name, left=left)
            elif served.kill_at is not None and now >= served.kill_at:
                served.seen |= served.processes()
                # The main process first: it would report the others' end as a crash.
                kill([served.pid])

    def clear(self, served: Served) -> list[str]:
        """Ends what is left of a server whose main process has ended; what there still is."""
        members = served.processes()
        served.seen |= members
        kill(members)
        if members:
            return [f"process {pid}" for pid in sorted(members)]
        shutil.rmtree(served.folder, ignore_errors=True)
        left = [served.folder] if os.path.exists(served.folder) else []
        unused = self.unused_segments(served)
        # Twice unused, a tick apart: another server may be about to open one that it has made.
        for name in unused & served.looked_at:
            try:
                os.unlink(f"/dev/shm/{name}")
            except OSError:
                continue
        served.looked_at, unused = unused, unused - served.looked_at
        return [*left, *(f"/dev/shm/{name}" for name in sorted(unused))]

    def unused_segments(self, served: Served) -> set[str]:
        """Segments younger than ``served`` that no process has open."""
        mine = tuple(f"torch_{pid}_" for pid in served.seen)
        young = {
            name
            for name, made in segments().items()
            if name not in self.segments_before
            and name.startswith((*SEGMENTS, *mine))
            and made >= served.started - 1
        }
        return young - segments_in_use() if young else young

    def end_all(self) -> None:
        for served in self.servers.values():
            served.kill_at = 0.0
        until = time.monotonic() + 10.0
        while self.servers and time.monotonic() < until:
            self.look_after()
            self.reap()
            time.sleep(TICK)


def kill(pids: object) -> None:
    for pid in pids:  # type: ignore[attr-defined]
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def family(main: int, *, ended: bool = True) -> set[int]:
    """Processes of a server that live: of its session, or descended from one of it.

    ``main`` is its main process, and the number of its session; ``ended`` tells whether that
    process has ended, and its number may be another's.
    """
    parents: dict[int, int] = {}
    members: set[int] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                # The name in brackets may hold anything, brackets too.
                state, parent, _, session = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if state in "ZX":
            continue
        parents[int(entry)] = int(parent)
        # It is in its session from its first steps on, and not before.
        if int(session) == main or (int(entry) == main and not ended):
            members.add(int(entry))
    grown = True
    while grown:
        more = {p for p, parent in parents.items() if parent in members} - members
        members |= more
        grown = bool(more)
    return members


def memory(pids: set[int]) -> dict[str, object]:
    """Proportional shares of all ``pids`` in bytes, as the kernel counts them."""
    wanted = ("Pss_Anon", "Pss_Shmem", "Pss_File")
    total = dict.fromkeys(wanted, 0)
    read = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
                rollup = file.read()
        except OSError:
            continue
        read += 1
        for line in rollup.splitlines():
            name, _, rest = line.partition(":")
            if name in total:
                total[name] += int(rest.split()[0]) * 1024
    return {**total, "processes": read}


def segments() -> dict[str, float]:
    """This user's segments in /dev/shm, and when each was made."""
    found = {}
    try:
        entries = list(os.scandir("/dev/shm"))
    except OSError:
        return found
    for entry in entries:
        try:
            about = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid():
            found[entry.name] = max(about.st_ctime, about.st_mtime)
    return found


def segments_in_use() -> set[str]:
    """Segments in /dev/shm that a process, as far as this one may look, has mapped or open."""
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/maps", encoding="utf-8", errors="replace") as file:
                for line in file:
                    _, inside, name = line.rstrip("\n").partition("/dev/shm/")
                    if inside:
                        found.add(name)
            for number in os.listdir(f"/proc/{entry}/fd"):
                target = os.readlink(f"/proc/{entry}/fd/{number}")
                if target.startswith("/dev/shm/"):
                    found.add(target.removeprefix("/dev/shm/"))
        except OSError:
            continue
    return found


def oom_kills() -> int:
    """How many processes of this control group the kernel has killed for memory."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        except (OSError, ValueError):
            continue
    return 0


def import_everything() -> list[str]:
    """Imports what servers import; returns what this version does not have, with why."""
    missing = []
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if name == MODULES[0]:
                raise
            missing.append(f"{name}: {error}")
    import multiprocessing

    import torch.multiprocessing

    # SGLang asks for 'spawn', whose processes would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    for module in (multiprocessing, torch.multiprocessing):
        module.set_start_method = lambda *_, **__: None  # type: ignore[attr-defined]
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    if tracker is not None:
        # One that an import started would be shared by all servers, and outlive each.
        tracker._resource_tracker = tracker.ResourceTracker()
        for method in ("ensure_running", "register", "unregister", "getfd"):
            setattr(tracker, method, getattr(tracker._resource_tracker, method))
    return missing


def serve(argv: list[str]) -> None:
    """What ``python -m sglang.launch_server`` does, with the key from the environment."""
    key = os.environ.pop("SGLANG_API_KEY", "")
    # With "=": a key may begin with a dash, and would be taken for another argument.
    sys.argv = ["sglang.launch_server", *argv, *([f"--api-key={key}"] if key else [])]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ports", default="")
    parser.add_argument("--listen", default="")
    parser.add_argument("--idle", type=float, default=3600.0)
    parser.add_argument("--log", default="")
    options = parser.parse_args()
    began = time.monotonic()
    # A scheduler that dies sends SIGQUIT up to whoever started it (0.5.23).
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # What imports print must not stand between the lines of the protocol.
    out = os.dup(1)
    if options.log:
        os.dup2(os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.dup2(2, 1)
    missing = import_everything()
    import gc
    import threading

    import sglang

    gc.collect()
    gc.freeze()  # a child's collector would touch, and so copy, every page of the parent
    parent = Parent(options, out)
    try:
        parent.run(
            {
                "event": "ready",
                "pid": os.getpid(),
                "sglang": getattr(sglang, "__version__", ""),
                # Python's own. (Those of OpenBLAS are there too, and it makes new ones in a child.)
                "threads": threading.active_count(),
                "missing": missing,
                "seconds": round(time.monotonic() - began, 3),
            }
        )
    except Become as child:
        argv = child.argv
    else:
        return
    del parent
    serve(argv)


if __name__ == "__main__":
    main()
