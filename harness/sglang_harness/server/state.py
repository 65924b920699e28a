"""Puts a server back to how it was, judged by what the server holds and not by what was done.

A flag such as "this test pushed weights" would miss the push that nobody wrote down. So the
state is asked for: checksums, weight version, served name, the models on offer, whether it is
paused; what differs is put back, and what cannot be put back is said.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang_harness.client import calls
from sglang_harness.errors import HarnessError, Refused, RequestFailed
from sglang_harness.suite.needs import CHECKSUMS

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


class CannotRestore(HarnessError):
    """The server is not as it was, and only another one would be."""


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
        checksums: Checksums | None = None
        fingerprint: tuple[float, ...] = ()
        if CHECKSUMS.lacking(server) is None:
            checksums = client.checksums()
        else:
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
            if changed := now.checksums.changed_since(self.checksums):
                found.append(f"{len(changed)} tensors ({changed[0]}, ...)")
        elif any(
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
    """What putting back took.

    Attributes:
        differed: what was other than at first, in words.
        seconds: for looking and for putting back.
    """

    differed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def is_paused(server: Server) -> bool | None:
    """Whether generation is paused: ``/ready`` answers 503 then (SGLang 0.5.23); ``None``
    where there is no such route."""
    if not server.client.has_route("GET", "/ready"):
        return None
    try:
        server.client.send(calls.ready())
    except Refused as error:
        if error.status == 503:
            return True
        raise
    return False


def restore(server: Server, first: State) -> Restored:
    """Brings ``server`` back to ``first``.

    Running requests are aborted, a pause and an open weight-update session are ended, adapters
    that were not there are unloaded, and other weights are replaced by those on the disk that
    ``first`` was loaded from.

    Raises:
        CannotRestore: it is still not the same, or does not answer.
        ServerDied: it has ended.
    """
    started = time.monotonic()
    try:
        return _restore(server, first, started)
    except RequestFailed as error:
        server.raise_if_dead()
        raise CannotRestore(f"The server cannot be put back: {error.message}.") from error


def _restore(server: Server, first: State, started: float) -> Restored:
    server.raise_if_dead()
    client, done = server.client, Restored()
    paused = is_paused(server)
    # Where nothing tells, continuing what runs is harmless, and asking a paused server hangs.
    if paused or (paused is None and client.has_route("POST", "/continue_generation")):
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
    # The base model goes by another name after an update from disk, and is no adapter.
    base = {now.labels["model_path"], now.labels["served_model_name"]}
    if adapters := set(now.models) - set(first.models) - base:
        for name in sorted(adapters):
            client.unload_lora_adapter(name)
        differing = first.differences(State.of(server))
    if differing:
        if not server.running.owned and first.labels["weight_version"] != "default":
            raise CannotRestore(
                f"Other than at first: {', '.join(differing)}. What was served at first had been "
                f"pushed by somebody ({first.labels['weight_version']}), and lies on no disk."
            )
        client.update_weights_from_disk(
            first.labels["model_path"],
            weight_version=first.labels["weight_version"],
            flush_cache=True,
            timeout=server.spec.limits.start,
        )
        if still := first.differences(State.of(server)):
            raise CannotRestore(f"After its first weights were loaded again: {', '.join(still)}.")
    client.generate([1, 2, 3], sampling={"max_new_tokens": 1}, timeout=ANSWERS_WITHIN)
    done.seconds = time.monotonic() - started
    return done
