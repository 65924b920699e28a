"""What a check is, and the one engine that runs one.

A check is one question in three parts that never mix: ``needs`` (what the target must have),
``observe`` (asks the server and returns what it saw, as plain typed data) and ``judge`` (a
pure function of that data). So a judge is tested without a server, a saved run can be judged
again, and the evidence is complete by construction.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_harness.errors import Interrupted, SpecError, TimeIsOver
from sglang_harness.errors import NotProvided as NotProvided  # part of this module's interface
from sglang_harness.server.state import unresponsive
from sglang_harness.suite.blame import blame, place
from sglang_harness.verdict import CheckResult, Figure, Outcome

if TYPE_CHECKING:
    from sglang_harness.oracle import Oracle
    from sglang_harness.server import Server
    from sglang_harness.spec import Argument


class Observation(BaseModel):
    """What a check saw. Written into the verdict as it is, and read back to judge again."""

    model_config = ConfigDict(extra="forbid")


O = TypeVar("O", bound=Observation)  # noqa: E741


@dataclass(frozen=True)
class Mismatch:
    """One thing that is not as it has to be."""

    where: str
    expected: str
    got: str
    by: str = ""
    """By how much, where that can be said."""

    def __str__(self) -> str:
        by = f" ({self.by})" if self.by else ""
        return f"{self.where}: expected {self.expected}, got {self.got}{by}"


@dataclass(frozen=True)
class Need:
    """Something that a check cannot do without.

    ``lacking`` returns why the *target* lacks it (which puts the check outside the profile),
    or ``None``. What the *harness* lacks is raised by ``observe`` as ``NotProvided``.
    """

    name: str
    lacking: Callable[[Server], str | None] = field(compare=False)


class OwnServer(Protocol):
    """Starts another server in the same image; it is gone when the ``with`` block ends."""

    def __call__(
        self,
        *,
        model: str = "tiny",
        server_args: Mapping[str, Argument] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> AbstractContextManager[Server]:
        """
        Args:
            model: as :class:`sglang_harness.ServerSpec` takes it. The seeded tiny model, so
                that nobody waits for a large one to load again.
            server_args: SGLang's flags in place of those of the run, which are for the run's
                model; ``None``: those of the run. The harness's own for the device come too.
            environment: variables beside those of the run.

        Raises:
            DidNotComeUp: it died at its start, or never answered.
            NotProvided: the model cannot be made here.
            SpecError, EngineError, ImageError, ModelError: it could not be started.
        """


@dataclass
class Context:
    """What ``observe`` works with.

    Attributes:
        seed: makes prompts, perturbations and samples the same in every run.
        own_server: starts another server in the same image, for a check that may kill it or
            needs one that runs otherwise.
        scratch: a folder for what the check makes, removed after the run.
    """

    server: Server
    seed: int
    own_server: OwnServer
    scratch: Path
    variants: dict[int, Any] = field(default_factory=dict)

    @cached_property
    def oracle(self) -> Oracle:
        """The reference for the served model.

        Raises:
            MissingExtra: torch is missing.
            NotProvided: the model is not on this machine.
        """
        from sglang_harness import oracle

        if self.server.model is None:
            raise NotProvided(
                f"The oracle cannot read {self.server.spec.model}: it is on the hub, not here.",
                advice="Give the model as a folder.",
            )
        return oracle.for_folder(self.server.model)

    @staticmethod
    def oracle_of(server: Server, *, adapter: Path | None = None) -> Oracle:
        """The reference for a server that a check started for itself; kept by the caller alone.

        Args:
            adapter: a LoRA adapter on this machine that it answers with.

        Raises:
            MissingExtra: torch, transformers or PEFT is missing.
            NotProvided: the model is not on this machine.
        """
        from sglang_harness import oracle

        if server.model is None:
            raise NotProvided(f"The oracle cannot read {server.spec.model}: it is not here.")
        return oracle.Oracle(server.model, adapter=adapter)

    @cached_property
    def dtype(self) -> str:
        """The dtype that the server computes in, as its launch configuration states it."""
        return dtype_of(self.server)

    def empty_prefix_cache(self) -> None:
        """Before an answer that must not come out of the cache. A server that is only looked
        at keeps its cache: then such an answer is still judged, with less force."""
        if self.server.may_change:
            self.server.client.flush_cache()

    def random(self, salt: str) -> random.Random:
        return random.Random(f"{self.seed}:{salt}")  # noqa: S311 -- reproducible on purpose


def dtype_of(server: Server) -> str:
    """The dtype that a server computes in, as its launch configuration states it."""
    return str(server.client.server_info().get("dtype", "auto"))


class Check(ABC, Generic[O]):
    """One question with a yes or no answer; see the module.

    Attributes:
        id: ``subject/what-must-hold``, stable.
        sentence: the required behaviour, as one sentence.
        profile: ``quick`` checks also run in ``full``.
        own_server: may kill its server, or needs one that runs otherwise: it starts its own.
        alike: checks of the same word ask for the same server of their own, so they are asked one
            after another; empty where none is alike.
        ends_its_server: was seen to end or hang its server with some version: it is asked after
            those whose server can be handed on.
        after_stop: asked when the server has been stopped.
        changes: modifies the server until it has restored it, so it is not asked of a server
            that this run did not start unless that is allowed.
        gate: where it fails, what the checks after it would see means nothing: they are not run.
    """

    id: ClassVar[str]
    sentence: ClassVar[str]
    observation: ClassVar[type[Observation]]
    needs: ClassVar[tuple[Need, ...]] = ()
    profile: ClassVar[Literal["quick", "full"]] = "quick"
    own_server: ClassVar[bool] = False
    alike: ClassVar[str] = ""
    ends_its_server: ClassVar[bool] = False
    after_stop: ClassVar[bool] = False
    changes: ClassVar[bool] = False
    gate: ClassVar[bool] = False

    @abstractmethod
    def observe(self, context: Context) -> O:
        """Asks the server; leaves it as it was."""

    @abstractmethod
    def judge(self, seen: O) -> list[Mismatch]:
        """Everything that is not as it has to be; empty for a pass. Pure."""

    def figures(self, seen: O) -> list[Figure]:
        """Numbers that fall off on the way. Pure."""
        del seen
        return []


_REGISTRY: dict[str, Check[Any]] = {}


def register(check: type[Check[Any]]) -> type[Check[Any]]:
    """Class decorator: adds a check to the suite.

    Raises:
        SpecError: its id is taken, or is not ``subject/name``.
    """
    if check.id.count("/") != 1:
        raise SpecError(f"The check id {check.id!r} is not of the form subject/name.")
    if check.id in _REGISTRY:
        raise SpecError(f"Two checks have the id {check.id!r}.")
    _REGISTRY[check.id] = check()
    return check


def registered() -> dict[str, Check[Any]]:
    """All checks by id, in the order of their registration."""
    return dict(_REGISTRY)


def run_check(check: Check[Any], context: Context) -> tuple[CheckResult, list[Figure]]:
    """Observes and judges. Never raises for what a server or the harness does wrong; whose
    fault an error is: see :func:`sglang_harness.suite.blame.blame`."""
    started = time.monotonic()

    def result(outcome: Outcome, message: str = "", seen: Observation | None = None) -> CheckResult:
        redactor = context.server.redactor
        return CheckResult(
            id=check.id,
            outcome=outcome,
            seconds=time.monotonic() - started,
            message=redactor.text(message),
            evidence=None if seen is None else redactor.data(_plain(seen)),
        )

    try:
        seen = check.observe(context)
    except TimeIsOver as error:
        return result(*_slow_or_stuck(check, context, error)), []
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        # Also SystemExit, and what extension modules in Rust raise when they panic.
        return result(*blame(error)), []
    if not isinstance(seen, Observation):
        return result(Outcome.ERROR, f"it observed a {type(seen).__name__}, no Observation"), []
    return _judged(check, seen, result)


def _plain(seen: Observation) -> dict[str, Any]:
    """The observation in types that JSON has, as far as pydantic knows how."""
    try:
        return seen.model_dump(mode="json")
    except ValueError:
        return seen.model_dump()


def _slow_or_stuck(check: Check[Any], context: Context, error: TimeIsOver) -> tuple[Outcome, str]:
    if check.own_server:
        # Asked where that server is at hand: see ServerPool.
        return blame(error)
    try:
        stuck = unresponsive(context.server)
    except Exception as worse:
        return blame(worse)
    return blame(error) if stuck is None else (Outcome.FAIL, f"{error.message}; {stuck}")


def judge_again(check: Check[Any], saved: CheckResult) -> CheckResult:
    """Judges a saved observation again, without server, model or torch.

    Raises:
        SpecError: the evidence does not fit the check as it is now.
    """
    if saved.evidence is None:
        return saved
    try:
        seen = check.observation.model_validate(saved.evidence)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(
            f"The evidence of {saved.id} does not fit this version of the check: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from None

    def result(outcome: Outcome, message: str = "", seen: Observation | None = None) -> CheckResult:
        del seen
        return saved.model_copy(
            update={"outcome": outcome, "message": message, "known_defect": None}
        )

    return _judged(check, seen, result)[0]


def _judged(
    check: Check[Any], seen: Observation, result: Callable[..., CheckResult]
) -> tuple[CheckResult, list[Figure]]:
    try:
        mismatches, figures = check.judge(seen), check.figures(seen)
    except Exception as error:
        message = f"the judge failed: {type(error).__name__} in {place(error)}: {error}"
        return result(Outcome.ERROR, message, seen), []
    if mismatches:
        shown = [str(m) for m in mismatches[:5]]
        if len(mismatches) > 5:
            shown.append(f"and {len(mismatches) - 5} more")
        return result(Outcome.FAIL, "; ".join(shown), seen), figures
    return result(Outcome.PASS, "", seen), figures


def expect(where: str, expected: Any, got: Any) -> Iterator[Mismatch]:
    """A mismatch unless the two are equal."""
    if expected != got:
        yield Mismatch(where, repr(expected), repr(got))
