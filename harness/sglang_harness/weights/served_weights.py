"""Which weights one server has: those that it was started with, those of the last push, or others;
and how the first ones are restored."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.client import Checksums, calls
from sglang_harness.errors import BadAnswer, HarnessError, ModelError, Refused
from sglang_harness.weights.bracket import Session
from sglang_harness.weights.proof.checksums import Computed, ServedLayout
from sglang_harness.weights.proof.fused_layout import COMPUTED

if TYPE_CHECKING:
    from sglang_harness.oracle import Oracle
    from sglang_harness.weights.target import Target

#: Seconds for a server to show that it still generates.
ANSWERS_WITHIN = 30.0


class WeightsNotRestored(HarnessError):
    """The initial weights could not be loaded again, or are others now."""


class ServedWeights:
    """What is known of one server's weights.

    Attributes:
        folder: a model folder with the weights that are served now; ``None``: it is not known
            which these are.
        computed: checksums computed here, kept for the next push.
        first_checksums: those of the weights that the server was started with; ``None``: not
            known.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self.folder: Path | None = target.model
        self.computed = Computed()
        self.first_checksums: Checksums | None = None
        self._first: tuple[str, str] | None = None
        """Model path and label, as the server stated them at first."""
        self._last_checksums: Checksums | None = None
        self._pushed: tuple[Path, Oracle] | None = None
        """The folder of the last push and its oracle, which lives longer."""

    def identify(
        self, about: Mapping[str, Any], served: ServedLayout
    ) -> tuple[Checksums | None, str]:
        """Finds out which weights are served; returns their checksums, or why there are none.

        Raises what the client raises.
        """
        now, why_none = self.checksums()
        self._remember_first(about, now, served)
        self._recognise(now)
        return now, why_none

    def checksums(self) -> tuple[Checksums | None, str]:
        """Those that the server states now; or why there are none."""
        client = self._target.client
        if not client.has_route("POST", "/weights_checker"):
            return None, "this SGLang has no POST /weights_checker"
        try:
            return client.checksums(), ""
        except Refused as error:
            return None, f"this SGLang cannot compute checksums here ({error.reason})"

    def oracle(self) -> Oracle | None:
        """The reference model with the served weights; ``None`` where these are not known.

        Raises:
            MissingExtra, ModelError: it cannot be loaded.
        """
        from sglang_harness import oracle as oracles

        if self._pushed is not None and self._pushed[0] == self.folder:
            folder, oracle = self._pushed
            if folder.exists():
                oracle.follow(folder)  # another push of the same files made it, in its own folder
            return oracle
        return oracles.for_folder(self.folder) if self.folder else None

    def arrived(self, now: Checksums | None, *, is_scored: bool) -> None:
        """A push went through, after which the server states these checksums.

        Args:
            is_scored: :meth:`scored` was told which weights these are.
        """
        self._last_checksums = now
        if not is_scored:
            self.folder = None

    def scored(self, folder: Path, oracle: Oracle, *, scratch: Path) -> None:
        """From here on these weights are what a next push replaces.

        Args:
            scratch: folders in it are removed once others took their place.
        """
        before, self.folder = self.folder, folder
        self._pushed = folder, oracle
        if before is not None and before.parent == scratch:
            shutil.rmtree(before, ignore_errors=True)

    def reproduced(self, stated: Checksums | None, served: ServedLayout) -> set[str] | None:
        """The parameters whose checksums are those of the model on disk, computed here;
        ``None`` where they cannot be computed."""
        model = self._target.model
        if stated is None or model is None or served.unknown:
            return None
        try:
            computed = self.computed.expected(open_checkpoint(model), served)
        except ModelError:
            return None  # gone or changed since the server read it
        if len(computed.ranks) != len(stated.ranks):
            return set()
        return {
            name
            for name in computed.ranks[0]
            if all(
                now.get(name) == rank[name]
                for now, rank in zip(stated.ranks, computed.ranks, strict=True)
            )
        }

    def generates(self) -> bool:
        """Whether the server generates one token within :data:`ANSWERS_WITHIN` seconds."""
        call = calls.generate("Hello", sampling={"max_new_tokens": 1}, timeout=ANSWERS_WITHIN)
        try:
            return self._target.client.send(call).completion_tokens == 1
        except HarnessError:
            return False

    def restore_first(self, *, timeout: float) -> str:
        """Loads the weights from disk that were served before the first push; returns what the
        server serves then.

        Args:
            timeout: seconds for each call.

        Raises:
            CannotRestore: the server refused, or states other checksums than before.
        """
        assert self._first is not None, "identify() comes before every push"
        path, version = self._first
        client = self._target.client
        session = Session(client, pause="retract", flush=True, bracket=False, timeout=timeout)
        try:
            with session:
                client.update_weights_from_disk(
                    path, weight_version=version, flush_cache=False, timeout=timeout
                )
            if session.closing_errors:
                raise session.closing_errors[0]
            now, _ = self.checksums()
        except HarnessError as error:
            raise WeightsNotRestored(
                f"its initial weights could not be restored ({error.message.rstrip('.')})"
            ) from error
        if self.first_checksums is not None and now != self.first_checksums:
            raise WeightsNotRestored(
                "its initial weights were loaded again, and their checksums differ"
            )
        self.folder = self._target.model
        proof = (
            "verified by checksums"
            if self.first_checksums
            else "unverified: their checksums are not known"
        )
        return f"the initial weights were restored ({path}), {proof}"

    def _remember_first(
        self, about: Mapping[str, Any], now: Checksums | None, served: ServedLayout
    ) -> None:
        """What is restored after a push that failed: the checkpoint that is on disk."""
        if self._first is not None:
            return
        told = self._target.client.model_info()
        if not told.get("model_path"):
            raise BadAnswer("GET /model_info", "the answer has no model_path")
        self._first = (str(told["model_path"]), str(told.get("weight_version")))
        # As it stated when it started, and the same since: no push came between.
        label = str(about.get("weight_version") or "default")
        untouched = self._first == (self._target.running.model_path(), label)
        if untouched or self._are_first(now, served):
            self.first_checksums = now
        else:
            self.folder = None

    def _are_first(self, now: Checksums | None, served: ServedLayout) -> bool:
        """Whether these are the checksums of the model on disk, computed here."""
        known = self.reproduced(now, served)
        if now is None or not known:
            return False
        return known == {name for rank in now.ranks for name in rank if not computed_name(name)}

    def _recognise(self, now: Checksums | None) -> None:
        """Which checkpoint is served now: another client may have pushed."""
        if now is None:
            label = self._target.client.model_info().get("weight_version")
            if self._first is not None and label == self._first[1] == "default":
                self.folder = self._target.model
        elif self.first_checksums is not None and now == self.first_checksums:
            self.folder = self._target.model
        elif self._last_checksums is None or now != self._last_checksums:
            self.folder = None


def computed_name(parameter: str) -> bool:
    """Whether a parameter is a buffer that the server computes, and no weight."""
    return parameter.endswith(COMPUTED)
