"""The state of a server, and restoring it: judged by what the server holds, not by what was done.

A flag such as "this test pushed weights" would miss a push that nobody recorded. So the server is
asked: checksums, weight version, served name, the models on offer, whether it is paused. What
differs is restored, and what cannot be restored is reported.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang_harness.client import calls
from sglang_harness.errors import HarnessError, NoAnswerInTime, Refused, RequestFailed

if TYPE_CHECKING:
    from sglang_harness.client import Checksums
    from sglang_harness.server import Server

#: What /model_info says of the weights, and has to say again.
LABELS = ("model_path", "served_model_name", "weight_version")

#: Where a server cannot compute checksums, log-probabilities of these ids stand in for them:
#: a single changed tensor moves them, and every vocabulary has the ids.
FINGERPRINT_IDS = (1, 2, 3, 4, 5, 6, 7, 8)

#: Seconds for one token of a server that is to be used again.
ANSWERS_WITHIN = 30.0

#: Seconds in which a server that is used again tells its state; loading weights has its own bound.
LOOKED_AT_WITHIN = 120.0


class CannotRestore(HarnessError):
    """The server differs from its baseline, and could not be restored: it has to be replaced."""


def lacks_checksums(server: Server) -> str | None:
    """Why the server cannot compute checksums of its weights; ``None``: it can. Asked once a
    server: 0.5.20 has the route, but needs CUDA to answer it."""
    if "checksums" not in server.lacks:
        _checksums(server)
    return server.lacks["checksums"]


def _checksums(server: Server) -> Checksums | None:
    """As the server computes them now; ``None`` where it cannot, which is noted the first time."""
    if "checksums" in server.lacks:
        return server.client.checksums() if server.lacks["checksums"] is None else None
    found, reason = None, None
    if not server.client.has_route("POST", "/weights_checker"):
        reason = "this SGLang has no POST /weights_checker"
    else:
        try:
            found = server.client.checksums()
        except Refused as error:
            reason = f"this SGLang cannot compute checksums here ({error.reason})"
    server.lacks["checksums"] = reason
    return found


@dataclass(frozen=True)
class State:
    """What tells one state of a server from another.

    Attributes:
        labels: :data:`LABELS` as ``/model_info`` answers them.
        models: names on offer: the base model and adapters.
        checksums: of every tensor; ``None`` where this server cannot compute them.
        fingerprint: log-probabilities in nats, in their place.
        paused: it takes no requests; ``None`` where it has no ``/ready`` to ask.
    """

    labels: dict[str, str]
    models: tuple[str, ...]
    checksums: Checksums | None
    fingerprint: tuple[float, ...]
    paused: bool | None

    @classmethod
    def of(cls, server: Server, *, paused: bool | None = False) -> State:
        """Asks ``server``, which must not be paused."""
        client = server.client
        told = client.model_info()
        checksums = _checksums(server)
        fingerprint: tuple[float, ...] = ()
        if checksums is None:
            client.flush_cache()
            fingerprint = client.generate(
                list(FINGERPRINT_IDS),
                sampling={"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
                logprobs=True,
                timeout=ANSWERS_WITHIN,
            ).logprobs
        return cls(
            labels={name: str(told.get(name)) for name in LABELS},
            models=tuple(sorted(client.models())),
            checksums=checksums,
            fingerprint=fingerprint,
            paused=paused,
        )

    def differences(self, now: State) -> list[str]:
        """What is other than in this state, in words; empty where nothing is."""
        found = []
        if now.paused:
            found.append("paused")
        if self.checksums is not None and now.checksums is not None:
            if len(now.checksums.ranks) != len(self.checksums.ranks):
                found.append(f"{len(now.checksums.ranks)} ranks state checksums")
            elif changed := now.checksums.changed_since(self.checksums):
                found.append(f"{len(changed)} tensors ({changed[0]}, ...)")
        elif len(self.fingerprint) != len(now.fingerprint) or any(
            # As reproducible as one batch of one request is on one machine.
            not abs(a - b) <= 1e-4
            for a, b in zip(self.fingerprint, now.fingerprint, strict=True)
        ):
            found.append("weights (by log-probabilities)")
        found += [
            f"{name} {now.labels[name]}" for name in LABELS if self.labels[name] != now.labels[name]
        ]
        if self.models != now.models:
            found.append(f"models {', '.join(now.models)}")
        return found


@dataclass
class Restored:
    """What restoring took.

    Attributes:
        differed: what differed from the baseline, in words; empty: nothing did.
        seconds: for comparing and for restoring.
    """

    differed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def is_paused(server: Server) -> bool | None:
    """Whether generation is paused: ``/ready`` answers 503 then (SGLang 0.5.23); ``None``
    where the server does not have that route."""
    if not server.client.has_route("GET", "/ready"):
        return None
    try:
        server.client.send(calls.ready())
    except Refused as error:
        if error.status == 503:
            return True
        if error.status in (404, 405):
            # A route counts as offered where the server's answers do not tell which it has.
            return None
        raise
    return False


def unresponsive(server: Server) -> str | None:
    """Asks for one token, bounded on its own: why the server does not generate any more, or
    ``None`` where it does.

    Raises:
        ServerDied: it has ended.
    """
    try:
        with server.client.cleanup(ANSWERS_WITHIN):
            server.client.generate([1, 2, 3], sampling={"max_new_tokens": 1})
    except NoAnswerInTime:
        return f"the server does not generate any more: no token within {ANSWERS_WITHIN:g} s"
    except RequestFailed as error:
        return f"the server does not generate any more: {error.message}"
    return None


def restore(server: Server, first: State) -> Restored:
    """Restores ``server`` to ``first``, whatever bound is set on its client's calls.

    Running requests are aborted, a pause and an open weight-update session are ended, adapters
    that were not there are unloaded, and other weights are replaced by those on the disk that
    ``first`` was loaded from.

    Raises:
        CannotRestore: it still differs, or does not answer.
        ServerDied: it has ended.
    """
    started, client = time.monotonic(), server.client
    server.raise_if_dead()
    try:
        with client.cleanup(LOOKED_AT_WITHIN):
            done, differing = _undo(server, first)
        if differing:
            _load_again(server, first, differing)
        with client.cleanup(ANSWERS_WITHIN):
            client.generate([1, 2, 3], sampling={"max_new_tokens": 1})
    except RequestFailed as error:
        server.raise_if_dead()
        raise CannotRestore(f"The server cannot be restored: {error.message}.") from error
    done.seconds = time.monotonic() - started
    return done


def _undo(server: Server, first: State) -> tuple[Restored, list[str]]:
    """Ends and unloads what can be undone without loading weights; what differs after that."""
    client, done = server.client, Restored()
    paused = is_paused(server)
    # Where nothing tells, continuing what runs is harmless, and asking a paused server hangs.
    if paused:
        client.resume()
    elif paused is None and client.has_route("POST", "/continue_generation"):
        with suppress(Refused):
            client.resume()
    if paused:
        done.differed.append("paused")
    if client.has_route("POST", "/end_weight_update"):
        try:
            # Refused where none is open, which does no harm (SGLang 0.5.21 to 0.5.23).
            client.send(calls.end_weight_update())
            done.differed.append("a weight-update session was open")
        except Refused:
            pass
    try:
        client.flush_cache()
    except Refused:
        # Requests still run that nobody waits for any more.
        done.differed.append("running requests")
        client.abort_all()
        client.flush_cache()
    now = State.of(server)
    differing = first.differences(now)
    done.differed += differing
    # The base model has another name after an update from disk, and is not an adapter.
    base = {now.labels["model_path"], now.labels["served_model_name"]}
    if adapters := set(now.models) - set(first.models) - base:
        for name in sorted(adapters):
            client.unload_lora_adapter(name)
        differing = first.differences(State.of(server))
    return done, differing


def _load_again(server: Server, first: State, differing: list[str]) -> None:
    if not server.running.owned and first.labels["weight_version"] != "default":
        raise CannotRestore(
            f"These differ from the baseline: {', '.join(differing)}. The weights served at "
            f"first had been pushed ({first.labels['weight_version']}) and are on no disk."
        )
    client, patience = server.client, server.spec.limits.start
    with client.cleanup(patience):
        client.update_weights_from_disk(
            first.labels["model_path"],
            weight_version=first.labels["weight_version"],
            flush_cache=True,
            timeout=patience,
        )
    with client.cleanup(LOOKED_AT_WITHIN):
        still = first.differences(State.of(server))
    if still:
        raise CannotRestore(
            f"After the weights it started with were loaded again, these still differ: "
            f"{', '.join(still)}."
        )
