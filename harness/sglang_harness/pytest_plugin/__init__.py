"""The pytest plugin: fixtures on a real SGLang server. Thin: the work is done elsewhere.

Imported by every pytest run where the package is installed, so it imports nothing else until a
test asks for one of its fixtures.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from sglang_harness.options import COMMON, at, of_runtimes
from sglang_harness.pytest_plugin.options import gather, settle

if TYPE_CHECKING:
    from sglang_harness.client import Generation
    from sglang_harness.options import Option
    from sglang_harness.pytest_plugin.options import Wanted
    from sglang_harness.runtime import Runtime
    from sglang_harness.server import Server
    from sglang_harness.sharing.owner_process import OwnerProcess
    from sglang_harness.sharing.shared_server import LocalKeeper, SessionServer
    from sglang_harness.sharing.tally import Tally
    from sglang_harness.spec import ServerSpec
    from sglang_harness.weights import PushReport

#: Lines of the server's log that a failing test shows.
LOG_LINES = 60

_INI_TYPES: dict[str, Literal["bool", "linelist", "string"]] = {
    "flag": "bool",
    "list": "linelist",
}

_FAILED = pytest.StashKey[bool]()
_SERVERS: pytest.StashKey[list[tuple[str, Server]]] = pytest.StashKey()
_LOST_LOG = pytest.StashKey[str]()
_RUN = pytest.StashKey[str]()
_OWNER: pytest.StashKey[OwnerProcess] = pytest.StashKey()
_SESSION: pytest.StashKey[SessionServer] = pytest.StashKey()
_IN_ORDER: pytest.StashKey[ExitStack] = pytest.StashKey()
_TALLIES: pytest.StashKey[list[Tally]] = pytest.StashKey()
_SPECS: pytest.StashKey[dict[str, ServerSpec]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    _add(parser, [option for option in COMMON if "pytest" in option.doors])


def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> None:
    """Options of single runtimes are asked of the runtimes, whose modules are not imported where
    nothing of this plugin is used."""
    given = any(word in ("-h", "--help") or word.startswith("--sglang-") for word in args)
    file = early_config.inipath
    if given or (file and "sglang_" in file.read_text(encoding="utf-8", errors="replace")):
        _add(parser, of_runtimes())


def _add(parser: pytest.Parser, added: Iterable[Option]) -> None:
    group = parser.getgroup("sglang", "SGLang servers (sglang-harness)")
    for option in added:
        how: dict[str, Any] = {"dest": option.ini, "default": None}
        if option.kind == "flag":
            how |= {"action": "store_const", "const": True}
        elif option.kind == "list":
            how |= {"action": "append", "metavar": "FLAG"}
        else:
            how |= {"metavar": "VALUE"}
        flag, help = option.flag("pytest"), option.help.replace("%", "%%")
        group.addoption(flag, help=help, **how)
        kind = _INI_TYPES.get(option.kind, "string")
        parser.addini(option.ini, f"{flag}: {option.help}", type=kind, default=None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU (skipped without one)")
    config.addinivalue_line("markers", "slow: takes minutes; leave out with -m 'not slow'")
    config.stash[_TALLIES] = []
    config.stash[_RUN] = uuid.uuid4().hex[:12]
    given = [v for name, v in vars(config.option).items() if name.startswith("sglang_")]
    if any(value not in (None, []) for value in given) and not hasattr(config, "workerinput"):
        _refuse_slips(config)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Options in files and in the environment count only for tests that use a server."""
    if hasattr(session.config, "workerinput"):
        return  # a worker's usage error would look like a crash; its tests report it in a line
    if any("sglang_spec" in getattr(item, "fixturenames", ()) for item in session.items):
        _refuse_slips(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist's controller has a process that owns the server of its workers."""
    stash = node.config.stash
    if _OWNER not in stash:
        from sglang_harness.sharing.owner_process import OwnerProcess

        stash[_OWNER] = OwnerProcess()
        stash[_IN_ORDER] = ExitStack()
        stash[_IN_ORDER].enter_context(_sigterm_ends_in_order())
    client = stash[_OWNER].client
    node.workerinput["sglang_owner"] = (client.socket, client.key)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker's own figures; a worker that crashed has none."""
    from sglang_harness.sharing.tally import Tally

    for told in getattr(node, "workeroutput", {}).get("sglang", ()):
        node.config.stash[_TALLIES].append(Tally(**told))


# Around all others: a worker that waits for a server is answered before xdist ends the workers, and
# the folder that they share is removed afterwards.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    config = session.config
    if _SESSION in config.stash:
        # A test that still has its server now was interrupted.
        config.stash[_SESSION].ending = True
    try:
        _end_owner(config)
    finally:
        # A second Ctrl-C is raised when all others have cleaned up.
        try:
            yield
        finally:
            _remove_owner(config)
            if hasattr(config, "workeroutput"):
                config.workeroutput["sglang"] = [vars(tally) for tally in config.stash[_TALLIES]]


def pytest_unconfigure(config: pytest.Config) -> None:
    """A session that never began has no end, and may have an owner."""
    _end_owner(config)
    _remove_owner(config)


def _end_owner(config: pytest.Config) -> None:
    if (owner := config.stash.get(_OWNER, None)) is not None:
        try:
            with _uninterrupted():
                config.stash[_TALLIES].append(owner.close())
        finally:
            config.stash[_IN_ORDER].close()


def _remove_owner(config: pytest.Config) -> None:
    from sglang_harness.sharing.tally import Tally

    if (owner := config.stash.get(_OWNER, None)) is not None:
        del config.stash[_OWNER]
        config.stash[_TALLIES].append(Tally(left=owner.remove()))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ends a server: a second Ctrl-C, or one that comes now, waits until that is done."""
    from sglang_harness._base.signals import interruptions

    with interruptions() as signals:
        signals.calm()
        yield
    if signals.seen is not None:
        raise pytest.exit.Exception(str(signals.seen), returncode=128 + signals.seen.signal_number)


def _end(*keepers: LocalKeeper) -> None:
    """Ends servers of this process; what could not be removed is told at the end of the run."""
    with _uninterrupted():
        for keeper in keepers:
            keeper.tally.left += keeper.close()


def _wanted(config: pytest.Config) -> Wanted:
    """What the options ask for. Raises :class:`SpecError`."""

    names = {option.name: option.ini for option in at("pytest")}

    def ini(name: str) -> Any:
        try:
            return config.getini(names[name])
        except ValueError:  # of a runtime, and not in the ini file: see above
            return None

    def command_line(name: str) -> Any:
        return config.getoption(names[name], None)

    return settle(gather(command_line, ini, os.environ))


def _refuse_slips(config: pytest.Config) -> None:
    """A mistake in the options is one line and pytest's exit code 4, before any test runs."""
    from sglang_harness.errors import HarnessError

    try:
        _wanted(config)
    except HarnessError as error:
        raise pytest.UsageError(f"sglang-harness: {error}") from None


@contextmanager
def _sigterm_ends_in_order() -> Iterator[None]:
    """A cancelled CI job gets SIGTERM, of which Python dies without any clean-up. Inside, the first
    one ends the run as ``pytest.exit`` does, so that no container stays. A handler that was set
    elsewhere is kept."""
    import signal
    import threading

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # the clean-up is not interrupted
        raise pytest.exit.Exception("SIGTERM", returncode=128 + number)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def _in_order() -> Iterator[None]:
    """Every fixture that may start a server depends on this one."""
    with _sigterm_ends_in_order():
        yield


@pytest.fixture(scope="session")
def sglang_spec(pytestconfig: pytest.Config) -> ServerSpec:
    """What to run, by the options. Override it in a conftest.py to set it in Python."""
    with _one_line(None):
        return _wanted(pytestconfig).spec


@pytest.fixture(scope="session")
def sglang_runtime(pytestconfig: pytest.Config) -> Runtime:
    """How servers are started, by the options."""
    with _one_line(None):
        return _wanted(pytestconfig).runtime


@pytest.fixture(scope="session")
def _parents_stay(sglang_runtime: Runtime, _in_order: None) -> Iterator[None]:
    """A session may start more than one server: preloaded parents, from which the next start is
    faster, are kept."""
    with sglang_runtime.keeping_parents():
        yield


@pytest.fixture(scope="session")
def _sglang_session(
    pytestconfig: pytest.Config,
    sglang_spec: ServerSpec,
    sglang_runtime: Runtime,
    _parents_stay: None,
) -> Iterator[SessionServer]:
    """The session's server: this process's own, or one that xdist's workers share."""
    from sglang_harness.sharing.shared_server import LocalKeeper, SessionServer

    shared = getattr(pytestconfig, "workerinput", {}).get("sglang_owner")
    wanted = _wanted(pytestconfig)
    if shared and not wanted.own_server:
        from sglang_harness._base.file_lease import Lease
        from sglang_harness.sharing.rpc import RpcClient
        from sglang_harness.sharing.xdist import RemoteKeeper

        owner = RpcClient(*shared)
        # The lock is beside the socket: it belongs to this run alone and is removed with it.
        lease = Lease(
            Path(owner.socket).with_name("lease"),
            os.environ["PYTEST_XDIST_WORKER"],
            what="the shared server",
            advice="Wait longer (--sglang-lease-timeout), or use --sglang-own-server.",
        )
        with _one_line(None):
            owner.ask("configure", sglang_spec, sglang_runtime)
        keeper = RemoteKeeper(owner)
        pytestconfig.stash[_TALLIES].append(keeper.tally)
        yield _known(
            pytestconfig, SessionServer(keeper, lease=lease, patience=wanted.lease_timeout)
        )
        return
    own = LocalKeeper(sglang_spec, sglang_runtime, run_id=pytestconfig.stash[_RUN])
    pytestconfig.stash[_TALLIES].append(own.tally)
    try:
        yield _known(pytestconfig, SessionServer(own))
    finally:
        _end(own)


def _known(config: pytest.Config, session_server: SessionServer) -> SessionServer:
    """Remembers the session's server for the end of the session."""
    config.stash[_SESSION] = session_server
    return session_server


def _another(spec: ServerSpec) -> ServerSpec:
    """For a server beside the session's: a port of its own."""
    return spec.model_copy(update={"port": None})


@contextmanager
def _one_line(item: pytest.Item | None) -> Iterator[None]:
    """Errors of the harness end a test with their message, without a stack trace."""
    from sglang_harness.errors import HarnessError

    try:
        yield
    except HarnessError as error:
        if item is not None:
            item.stash[_LOST_LOG] = error.log
        raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None


def _lend(item: pytest.Item, name: str, server: Server) -> Server:
    """Remembers which servers a test has used, and skips it where it needs a GPU they lack."""
    item.stash.setdefault(_SERVERS, []).append((name, server))
    if item.get_closest_marker("gpu") and server.device != "gpu":
        pytest.skip("needs a GPU, and the server runs on a CPU")
    return server


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that needs a GPU before a server is started, where there is none."""
    if item.get_closest_marker("gpu") and "sglang_spec" in getattr(item, "fixturenames", ()):
        from sglang_harness.runtime.device import gpus

        with _one_line(item):
            wanted = _wanted(item.config)
        found, why_none = gpus()
        if not found and wanted.runtime.starts:
            pytest.skip(f"needs a GPU, and {why_none}")


@pytest.fixture
def sglang_server(
    request: pytest.FixtureRequest, _sglang_session: SessionServer
) -> Iterator[Server]:
    """The session's server, used by one test at a time.

    After the test the plugin compares the server with its first state (weights, labels, adapters,
    pause) and restores any difference; where it cannot, the next test gets another server.
    """
    item = request.node
    with _one_line(item):
        borrowing = _sglang_session.lent(item.nodeid)
        server = borrowing.__enter__()
    with _given_back(item, borrowing):
        yield _lend(item, "the session's server", server)


@contextmanager
def _given_back(item: pytest.Item, borrowing: Any) -> Iterator[None]:
    from sglang_harness.errors import ServerDied

    try:
        yield
    finally:
        with _one_line(item):
            try:
                borrowing.__exit__(None, None, None)
            except ServerDied:
                # The report of a test that failed has it already.
                if not item.stash.get(_FAILED, False):
                    raise


@pytest.fixture
def fresh_sglang_server(
    request: pytest.FixtureRequest,
    sglang_spec: ServerSpec,
    sglang_runtime: Runtime,
    _parents_stay: None,
) -> Iterator[Server]:
    """A server for this test alone, for tests that break theirs. It costs a start."""
    from sglang_harness.sharing.shared_server import LocalKeeper

    run = request.config.stash[_RUN]
    own = LocalKeeper(_another(sglang_spec), _startable(sglang_runtime), run_id=run)
    request.config.stash[_TALLIES].append(own.tally)
    try:
        with _one_line(request.node):
            server, _ = own.server()
        yield _lend(request.node, "its own server", server)
    finally:
        _end(own)


@pytest.fixture(scope="session")
def _named_servers(_parents_stay: None) -> Iterator[dict[str, LocalKeeper]]:
    servers: dict[str, LocalKeeper] = {}
    try:
        yield servers
    finally:
        _end(*servers.values())


@pytest.fixture
def sglang_servers(
    request: pytest.FixtureRequest,
    sglang_spec: ServerSpec,
    sglang_runtime: Runtime,
    _named_servers: dict[str, LocalKeeper],
) -> Callable[..., Server]:
    """Servers by name, each with its own spec: ``sglang_servers("draft", model="tiny:7")``.

    A name is started once and kept until the session ends; fields that are not given are the
    options'. They are not restored: a name is for the tests that share it on purpose.
    """
    from sglang_harness.errors import SpecError
    from sglang_harness.sharing.shared_server import LocalKeeper
    from sglang_harness.spec import ServerSpec

    specs: dict[str, ServerSpec] = request.config.stash.setdefault(_SPECS, {})

    def server(name: str, **fields: Any) -> Server:
        with _one_line(request.node):
            options = _another(sglang_spec).model_dump(exclude_unset=True)
            spec = ServerSpec.make(**{**options, **fields})
            if specs.setdefault(name, spec) != spec:
                raise SpecError(
                    f"The server {name!r} was started with another spec.",
                    advice="Use another name for this one.",
                )
            if name not in _named_servers:
                run = request.config.stash[_RUN]
                own = LocalKeeper(spec, _startable(sglang_runtime), run_id=run)
                _named_servers[name] = own
                request.config.stash[_TALLIES].append(own.tally)
            found, _ = _named_servers[name].server()
        return _lend(request.node, f"the server {name!r}", found)

    return server


def _startable(runtime: Runtime) -> Runtime:
    if not runtime.starts:
        pytest.skip("needs a server of its own, and --sglang-url names a running one")
    return runtime


@pytest.fixture
def generate(sglang_server: Server) -> Callable[..., Generation]:
    """``generate(prompt, logprobs=False, **sampling)`` on the session's server.

    Greedy unless ``temperature`` is given: ``generate("Hello", max_new_tokens=4).text``.
    """

    def ask(prompt: Any, *, logprobs: bool = False, **sampling: Any) -> Generation:
        wanted = {"temperature": 0.0, **sampling}
        return sglang_server.client.generate(prompt, sampling=wanted, logprobs=logprobs)

    return ask


@pytest.fixture
def push_weights(sglang_server: Server) -> Callable[..., PushReport]:
    """``push_weights(checkpoint, version=None)``: other weights on the session's server, until
    the test ends.

    The checksums have to show that they arrived; ``logprobs=True`` compares with the reference
    model too. Other keywords are those of :meth:`sglang_harness.weights.WeightPusher.push`, such
    as ``route``.
    """

    def push(checkpoint: str | Path, version: str | None = None, **options: Any) -> PushReport:
        from sglang_harness.checkpoint import locate

        path = Path(checkpoint).expanduser()
        found = path if path.exists() else locate(str(checkpoint), lambda _: None)
        assert found is not None, f"{checkpoint} is a name on the hub, and no folder here"
        wanted = {"version": version, "logprobs": False, **options}
        return sglang_server.weights.push(found, **wanted)

    return push


@pytest.fixture
def gpu_memory(sglang_server: Server) -> Callable[[], dict[str, int]]:
    """``gpu_memory()``: bytes in use now on each of the server's GPUs, by UUID (NVML)."""
    if sglang_server.device != "gpu":
        pytest.skip("GPU memory: the server runs on a CPU")
    from sglang_harness.memory.gpu.nvml import NvmlMemory

    source = NvmlMemory(sglang_server.spec.gpus)
    return lambda: source.read()[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failing test shows the phases of its server's start, and the server's log."""
    report = yield
    if not report.failed:
        return report
    item.stash[_FAILED] = True
    for name, server in item.stash.get(_SERVERS, []):
        phases = ", ".join(f"{p.name} {p.seconds:.1f} s" for p in server.report.phases)
        if phases:
            report.sections.append((f"start of {name}", phases))
        report.sections.append(_log_section(f"log of {name}", server.logs()))
    if log := item.stash.get(_LOST_LOG, ""):
        report.sections.append(_log_section("log of a server that did not come up", log))
        item.stash[_LOST_LOG] = ""
    return report


def _log_section(title: str, log: str) -> tuple[str, str]:
    return f"{title}, last {LOG_LINES} lines", "\n".join(log.splitlines()[-LOG_LINES:])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What the servers of this run have cost, where there were any, and what they left."""
    tallies = config.stash[_TALLIES]
    starts = [seconds for tally in tallies for seconds in tally.starts]
    restored = [seconds for tally in tallies for seconds in tally.restored]
    if starts or restored:
        warm = sum(tally.warm for tally in tallies)
        told = f", {warm} of them warm" if warm else ""
        terminalreporter.write_line(
            f"sglang: {_counted(len(starts), 'server')} started ({sum(starts):.1f} s{told}); state "
            f"restored after {_counted(len(restored), 'test')} ({sum(restored):.1f} s)"
        )
    for tally in tallies:
        for why in tally.replaced:
            terminalreporter.write_line(f"sglang: a server had to be replaced: {why}")
        for why in tally.no_replacement:
            terminalreporter.write_line(f"sglang: its replacement did not come up: {why}", red=True)
        for what in tally.left:
            terminalreporter.write_line(f"sglang: could not be removed: {what}", red=True)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
