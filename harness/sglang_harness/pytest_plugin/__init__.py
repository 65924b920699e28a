"""The pytest plugin: fixtures on a real SGLang server. Thin; what it does lies elsewhere.

Imported by every pytest run where the package is installed, so it imports nothing else until a
test asks for one of its fixtures.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from sglang_harness.pytest_plugin.options import OPTIONS, gather, settle

if TYPE_CHECKING:
    from sglang_harness.client import Generation
    from sglang_harness.pytest_plugin.options import Wanted
    from sglang_harness.runtime import Runtime
    from sglang_harness.server import Server
    from sglang_harness.sharing.rpc import OpenCounter
    from sglang_harness.sharing.shared_server import LocalKeeper, SessionServer, Tally
    from sglang_harness.sharing.xdist import Lender
    from sglang_harness.spec import ServerSpec
    from sglang_harness.weights import PushReport

#: Lines of the server's log that a failing test shows.
LOG_LINES = 60

_INI_TYPES: dict[str, Literal["bool", "linelist", "string"]] = {
    "flag": "bool",
    "list": "linelist",
    "text": "string",
}

_FAILED = pytest.StashKey[bool]()
_SERVERS: pytest.StashKey[list[tuple[str, Server]]] = pytest.StashKey()
_LOST_LOG = pytest.StashKey[str]()
_RUN = pytest.StashKey[str]()
_COUNTER: pytest.StashKey[OpenCounter] = pytest.StashKey()
_IN_ORDER: pytest.StashKey[ExitStack] = pytest.StashKey()
_TALLIES: pytest.StashKey[list[Tally]] = pytest.StashKey()
_SPECS: pytest.StashKey[dict[str, ServerSpec]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sglang", "SGLang servers (sglang-harness)")
    for option in OPTIONS:
        words: dict[str, Any] = {"dest": option.ini, "default": None}
        if option.kind == "flag":
            words |= {"action": "store_const", "const": True}
        elif option.kind == "list":
            words |= {"action": "append", "metavar": "FLAG"}
        else:
            words |= {"metavar": "VALUE"}
        group.addoption(option.flag, help=option.help, **words)
        help = f"{option.flag}: {option.help}"
        parser.addini(option.ini, help, type=_INI_TYPES[option.kind], default=None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU (skipped without one)")
    config.addinivalue_line("markers", "slow: takes minutes; leave out with -m 'not slow'")
    config.stash[_TALLIES] = []
    config.stash[_RUN] = uuid.uuid4().hex[:12]
    given = any(config.getoption(o.ini, None) not in (None, []) for o in OPTIONS)
    if given and not hasattr(config, "workerinput"):
        _refuse_slips(config)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Options in files and in the environment count only for tests that use a server."""
    if hasattr(session.config, "workerinput"):
        return  # a worker's usage error would be told as a crash; its tests tell it in a line
    if any("sglang_spec" in getattr(item, "fixturenames", ()) for item in session.items):
        _refuse_slips(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist's controller keeps the server that its workers share."""
    stash = node.config.stash
    if _COUNTER not in stash:
        from sglang_harness.sharing.rpc import OpenCounter

        def lender() -> Lender:
            from sglang_harness.sharing.xdist import Lender

            return Lender()

        stash[_COUNTER] = OpenCounter(lender)
        stash[_IN_ORDER] = ExitStack()
        stash[_IN_ORDER].enter_context(_sigterm_ends_in_order())
    counter = stash[_COUNTER].counter
    node.workerinput["sglang_counter"] = (counter.socket, counter.key)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker's own figures; one that crashed has none."""
    from sglang_harness.sharing.shared_server import Tally

    for told in getattr(node, "workeroutput", {}).get("sglang", ()):
        node.config.stash[_TALLIES].append(Tally(**told))


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["sglang"] = [vars(tally) for tally in config.stash[_TALLIES]]
    elif _COUNTER in config.stash:
        lender: Any = config.stash[_COUNTER].answering
        config.stash[_COUNTER].close()
        if lender is not None:
            lender.close()
            config.stash[_TALLIES].append(lender.tally)
        config.stash[_IN_ORDER].close()


def _wanted(config: pytest.Config) -> Wanted:
    """What the options ask for. Raises :class:`SpecError`."""

    def ini(name: str) -> Any:
        return config.getini(next(o.ini for o in OPTIONS if o.name == name))

    def command_line(name: str) -> Any:
        return config.getoption(next(o.ini for o in OPTIONS if o.name == name), None)

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
    """A CI job that is called off ends its tests with SIGTERM, which Python dies of on the spot;
    inside, the first one ends the run as ``pytest.exit`` does, so that no container stays. Who
    has a handler of their own keeps it."""
    import signal
    import threading

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # what gives servers back is not interrupted
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
    """Every fixture that may start a server stands on this one."""
    with _sigterm_ends_in_order():
        yield


@pytest.fixture(scope="session")
def sglang_spec(pytestconfig: pytest.Config) -> ServerSpec:
    """What to run, by the options. Override it in a conftest.py to say it in Python."""
    with _one_line(None):
        return _wanted(pytestconfig).spec


@pytest.fixture(scope="session")
def sglang_runtime(pytestconfig: pytest.Config) -> Runtime:
    """How servers come to be, by the options."""
    with _one_line(None):
        return _wanted(pytestconfig).runtime


@pytest.fixture(scope="session")
def _parents_stay(sglang_runtime: Runtime, _in_order: None) -> Iterator[None]:
    """A session may start more than one server: what makes the next start faster is kept."""
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

    shared = getattr(pytestconfig, "workerinput", {}).get("sglang_counter")
    wanted = _wanted(pytestconfig)
    if shared and not wanted.own_server:
        from sglang_harness._base.file_lease import Lease
        from sglang_harness.sharing.rpc import Counter
        from sglang_harness.sharing.xdist import Borrower

        counter = Counter(*shared)
        # The lock lies beside the socket: one of this run alone, gone with it.
        lease = Lease(Path(counter.socket).with_name("lease"), os.environ["PYTEST_XDIST_WORKER"])
        with _one_line(None):
            counter.ask("configure", sglang_spec, sglang_runtime)
        borrowed = SessionServer(Borrower(counter), lease=lease, patience=wanted.lease_timeout)
        pytestconfig.stash[_TALLIES].append(borrowed.keeper.tally)
        yield borrowed
        return
    own = LocalKeeper(sglang_spec, sglang_runtime, run_id=pytestconfig.stash[_RUN])
    pytestconfig.stash[_TALLIES].append(own.tally)
    try:
        yield SessionServer(own)
    finally:
        own.close()


def _another(spec: ServerSpec) -> ServerSpec:
    """For a server beside the session's: a port of its own."""
    return spec.model_copy(update={"port": None})


@contextmanager
def _one_line(item: pytest.Item | None) -> Iterator[None]:
    """Errors of the harness end a test with their words, not with a stack trace."""
    from sglang_harness.errors import HarnessError

    try:
        yield
    except HarnessError as error:
        if item is not None:
            item.stash[_LOST_LOG] = error.log
        raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None


def _lend(item: pytest.Item, name: str, server: Server) -> Server:
    """Remembers which servers a test has used, and leaves out what they cannot give it."""
    item.stash.setdefault(_SERVERS, []).append((name, server))
    if item.get_closest_marker("gpu") and server.device != "gpu":
        pytest.skip("needs a GPU, and the server runs on a CPU")
    return server


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs a GPU does not start a server to find out that there is none."""
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
    """The session's server, lent to one test at a time.

    After the test the server itself is asked what differs (weights, labels, adapters, pause),
    and that is put back; where it cannot be, the next test gets another server.
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
                # A test that failed has told of it already.
                if not item.stash.get(_FAILED, False):
                    raise


@pytest.fixture
def fresh_sglang_server(
    request: pytest.FixtureRequest,
    sglang_spec: ServerSpec,
    sglang_runtime: Runtime,
    _parents_stay: None,
) -> Iterator[Server]:
    """A server of this test's own, for tests that break theirs. It costs a start."""
    from sglang_harness.sharing.shared_server import LocalKeeper

    run = request.config.stash[_RUN]
    own = LocalKeeper(_another(sglang_spec), _startable(sglang_runtime), run_id=run)
    request.config.stash[_TALLIES].append(own.tally)
    try:
        with _one_line(request.node):
            server, _ = own.server()
        yield _lend(request.node, "its own server", server)
    finally:
        own.close()


@pytest.fixture(scope="session")
def _named_servers(_parents_stay: None) -> Iterator[dict[str, LocalKeeper]]:
    servers: dict[str, LocalKeeper] = {}
    try:
        yield servers
    finally:
        for each in servers.values():
            each.close()


@pytest.fixture
def sglang_servers(
    request: pytest.FixtureRequest,
    sglang_spec: ServerSpec,
    sglang_runtime: Runtime,
    _named_servers: dict[str, LocalKeeper],
) -> Callable[..., Server]:
    """Servers by name, each with its own spec: ``sglang_servers("draft", model="tiny:7")``.

    A name is started once, and kept until the session ends; fields that are not given are the
    options'. They are not put back: a name is for the tests that share it on purpose.
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
                    advice="Give it another name.",
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
        pytest.skip("needs a server of its own, and --sglang-url names one that runs already")
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

    The checksums have to show that they arrived; ``logprobs=True`` asks for the oracle too. Other
    keywords are those of :meth:`sglang_harness.weights.WeightPusher.push`, such as ``route``.
    """

    def push(checkpoint: str | Path, version: str | None = None, **options: Any) -> PushReport:
        from sglang_harness.checkpoint import locate

        path = Path(checkpoint).expanduser()
        found = path if path.exists() else locate(str(checkpoint), lambda _: None)
        assert found is not None, f"{checkpoint} is on the hub, not here"
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
    """A failing test shows how its server came up, and what it wrote."""
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
    """What the servers of this run have cost, where there were any."""
    tallies = config.stash[_TALLIES]
    starts = [seconds for tally in tallies for seconds in tally.starts]
    restored = [seconds for tally in tallies for seconds in tally.restored]
    replaced = [why for tally in tallies for why in tally.replaced]
    if not starts and not restored:
        return
    plural = "" if len(starts) == 1 else "s"
    warm = sum(tally.warm for tally in tallies)
    told = f", {warm} of them warm" if warm else ""
    terminalreporter.write_line(
        f"sglang: {len(starts)} server start{plural} ({sum(starts):.1f} s{told}), put back after "
        f"{len(restored)} tests ({sum(restored):.1f} s)"
    )
    for why in replaced:
        terminalreporter.write_line(f"sglang: a server was replaced: {why}")
