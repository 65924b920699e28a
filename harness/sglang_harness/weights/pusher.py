"""One call for a person: ``server.weights.push("checkpoint.pt", route="tensor")``."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.client import Checksums, calls
from sglang_harness.errors import (
    BadAnswer,
    HarnessError,
    MissingExtra,
    ModelError,
    NoAnswerInTime,
    PeerFailed,
    ReadOnly,
    Refused,
    ServerDied,
    SpecError,
)
from sglang_harness.peer import Peer
from sglang_harness.weights import routes
from sglang_harness.weights.bracket import Pause, Session
from sglang_harness.weights.proof import conclusion
from sglang_harness.weights.proof.checksums import Computed, Served
from sglang_harness.weights.proof.conclusion import Gathered
from sglang_harness.weights.proof.fused_layout import COMPUTED
from sglang_harness.weights.proof.witnesses import ask_tokens
from sglang_harness.weights.report import BucketSent, PushFailed, PushReport
from sglang_harness.weights.routes.base import Job, Route
from sglang_harness.weights.routes.buckets import Bucket, plan
from sglang_harness.weights.source.fitted import open_for
from sglang_harness.weights.source.model_folder import model_folder

if TYPE_CHECKING:
    from sglang_harness.weights.target import Target

#: Bytes of one bucket. Trainers use 512 MiB and more; a server's /dev/shm has 1 GiB by default.
BUCKET = 256 << 20

_EVERYTHING = 1 << 62

#: Seconds for a server to show that it still generates.
ANSWERS_WITHIN = 30.0


class WeightPusher:
    """Pushes checkpoints to one server, and finds out whether they arrived.

    Attributes:
        unfit: why the server must not be used any more after a push that failed; ``None``.
        last: the last push.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._peer: Peer | None = None
        self._scratch: Path | None = None
        self._first: tuple[str, str] | None = None
        self._first_checksums: Checksums | None = None
        self._last_checksums: Checksums | None = None
        self._computed = Computed()
        self._served_folder: Path | None = target.model
        self._pushed_last: tuple[Path, Any] | None = None
        """The folder of the last push, and its oracle."""
        self._own = 0
        self.unfit: str | None = None
        self.last: PushReport | None = None

    # --- the door ---------------------------------------------------------------------------

    def push(
        self,
        checkpoint: Path | str,
        *,
        route: str | Route = "tensor",
        version: str | None = None,
        pause: Pause | None = "retract",
        flush: bool = True,
        abort_all_requests: bool = False,
        bucket_bytes: int = BUCKET,
        strict: bool = False,
        logprobs: bool = True,
        allow: tuple[str, ...] = (),
        timeout: float | None = None,
    ) -> PushReport:
        """Pushes a checkpoint and looks for two witnesses that it arrived.

        Args:
            checkpoint: a file or folder of any layout that the harness reads.
            route: a name of :func:`.route.names`, or a route of the caller's own.
            version: the label; one of its own where not given, as without any the server goes
                on to state the label of the old weights.
            pause: ``retract`` takes running requests back and computes them anew with the new
                weights; ``in_place`` lets them go on with a cache of the old ones; ``abort``
                ends them; ``None`` does not pause.
            flush: empty the prefix cache before and after.
            abort_all_requests: have the server end every request before each bucket.
            bucket_bytes: at most so many bytes travel together.
            strict: fill every parameter with noise before the push, so that an old tensor whose
                successor never arrived cannot hide.
            logprobs: ask for the second witness, which loads the checkpoint into transformers.
            allow: patterns of names that the checkpoint may lack, or have beside the model's.
            timeout: seconds for the server's answer to one bucket.

        Returns:
            A report whose outcome is ``good``; or ``unproven``, where a witness can say nothing
            on this server, with the reason.

        Raises:
            SpecError: no such route, or not to this server.
            ModelError, CheckpointMismatch: the checkpoint cannot be read, or does not fit; then
                nothing was sent, because a wrong shape kills a server (SGLang 0.5.23).
            PushFailed: it did not arrive. Its report says what is new, what is old, what is
                unknown, and what the server serves now.
        """
        target = self._target
        chosen = routes.make(route) if isinstance(route, str) else route
        if not target.may_change:
            raise ReadOnly(f"A push by '{chosen.name}'")
        if self.unfit:
            raise SpecError(f"The server is unfit: {self.unfit}.", advice="Start it anew.")
        if reason := chosen.lacking(target):
            raise SpecError(f"The route '{chosen.name}' does not lead to this server: {reason}.")
        source = open_for(target.model, Path(checkpoint), allow)
        about = target.client.server_info()
        served = Served.of(target.model, about, target.device)
        infos = list(source.tensors.values())
        job = Job(
            target=target,
            source=source,
            buckets=plan(infos, _EVERYTHING if chosen.in_one_piece else bucket_bytes),
            ranks=served.ranks,
            version=version or self._label(),
            timeout=timeout or target.spec.limits.check,
            abort_all_requests=abort_all_requests,
            any_peer=self._any_peer,
        )  # fmt: skip
        before, why_none = self._know_what_is_served(about, served)
        bracket = chosen.needs_session and target.client.has_route("POST", "/begin_weight_update")
        session = Session(
            target.client, pause=pause, flush=flush, bracket=bracket, timeout=job.timeout
        )
        push = Gathered(chosen, job, served, strict, session, time.monotonic())
        if not served.unknown:
            push.expected = self._computed.expected(source, served)
        push.before, push.why_no_checksums = before, why_none
        if strict and push.before is not None and push.expected is not None:
            brought = push.expected.ranks[0].keys()
            kept = [n for n in push.before.ranks[0] if n not in brought and not _computed(n)]
            if kept:
                raise SpecError(
                    f"'strict' wipes every parameter, and this checkpoint does not bring {kept[0]}"
                    f" ({len(kept)} are missing).",
                    advice="Push without 'strict'.",
                )
        try:
            self._send(push)
            if push.error is None:
                self._look(push, logprobs)
            return self._conclude(push, pause, flush)
        except BaseException as error:
            if not isinstance(error, PushFailed):
                self.unfit = f"a push was broken off ({type(error).__name__})"
            raise
        finally:
            for folder in job.staged:
                shutil.rmtree(folder, ignore_errors=True)

    def served_checkpoint(self) -> Path | None:
        """A folder with the weights that are served now; ``None``: which these are is not known,
        as after a push by somebody else."""
        about = self._target.client.server_info()
        self._know_what_is_served(about, Served.of(self._target.model, about, self._target.device))
        folder = self._served_folder
        return folder if folder is not None and folder.exists() else None

    def _know_what_is_served(
        self, about: Mapping[str, Any], served: Served
    ) -> tuple[Checksums | None, str]:
        """The checksums now; or why there are none."""
        now, why_none = self._checksums()
        self._remember_first(about, now, served)
        self._recognise(now)
        return now, why_none

    def _label(self) -> str:
        self._own += 1
        return f"harness-{uuid.uuid4().hex[:6]}-{self._own}"

    def _any_peer(self) -> Peer:
        if self._peer is None or self._peer.ended:
            self._peer = Peer(self._target.running)
        return self._peer

    # --- sending ----------------------------------------------------------------------------

    def _send(self, push: Gathered) -> None:
        """Everything up to the closed bracket; what went wrong is in ``push.error``."""
        route, job = push.route, push.job
        try:
            route.open(job)
            push.started = time.monotonic()
            push.session.restart_clock(push.started)
            with push.session:
                push.entered = True
                if push.strict:
                    push.session.step("wipe", lambda: self._wipe(push))
                for bucket in job.buckets:
                    self._send_bucket(push, bucket)
        except HarnessError as error:
            push.error = error
        finally:
            push.seconds = time.monotonic() - push.started
            if isinstance(push.error, PeerFailed | NoAnswerInTime | ServerDied):
                self._drop_peer(job)
            else:
                job.notes += route.close()
                if self._peer is not None and self._peer.busy:
                    self._drop_peer(job)
                elif job.beside is not None:
                    with suppress(HarnessError):
                        push.peer_peak_bytes = job.beside.peak_bytes()
        if push.error is None and push.session.closing_errors:
            push.error = push.session.closing_errors[0]

    def _send_bucket(self, push: Gathered, bucket: Bucket) -> None:
        common: dict[str, Any] = {
            "number": bucket.number,
            "tensors": bucket.names,
            "bytes": bucket.nbytes,
            "weight_version": push.job.version,
        }
        started = time.monotonic()

        def send() -> None:
            try:
                sent = push.route.send(bucket)
            except HarnessError as error:
                push.buckets.append(
                    BucketSent(
                        **common,
                        outcome="refused" if isinstance(error, Refused) else "unknown",
                        server=time.monotonic() - started,
                        detail=error.message,
                    )
                )
                raise
            times = {n: getattr(sent, n) for n in ("read", "pack", "hand_over", "server")}
            push.buckets.append(BucketSent(**common, outcome="done", detail=sent.message, **times))

        push.session.step(f"bucket {bucket.number}", send)

    def _wipe(self, push: Gathered) -> None:
        """Every parameter becomes noise; checksums show that it did."""
        client = self._target.client
        client.check_weights("reset_tensors")
        if push.before is None:
            push.job.notes.append("wiped, but without checksums nothing shows that it worked")
            return
        wiped = client.checksums()
        kept = [n for n, s in wiped.ranks[0].items() if push.before.ranks[0].get(n) == s]
        if kept:
            raise BadAnswer("POST /weights_checker", f"reset_tensors left {kept[0]} as it was")

    def _drop_peer(self, job: Job) -> None:
        if self._peer is not None:
            job.notes += self._peer.end()
            self._peer = None

    # --- looking ----------------------------------------------------------------------------

    def _look(self, push: Gathered, logprobs: bool) -> None:
        client = self._target.client
        try:
            push.after, why = self._checksums()
            push.why_no_checksums = push.why_no_checksums or why
            push.stated["/model_info"] = _text(client.model_info().get("weight_version"))
            answer = client.generate("Hello", sampling={"max_new_tokens": 1})
            push.stated["answers"] = answer.weight_version
            if logprobs:
                self._ask(push)
            else:
                push.why_no_logprobs = "not asked for"
            self._last_checksums = push.after
        except HarnessError as error:
            push.error = error

    def _ask(self, push: Gathered) -> None:
        from sglang_harness import oracle as oracles

        model = self._target.model
        if model is None:
            push.why_no_logprobs = "the model's config and tokenizer are not on this machine"
            return
        folder = self._room() / uuid.uuid4().hex[:8]
        try:
            model_folder(push.job.source, model, folder)
            new = oracles.for_folder(folder)
            old = self._oracle_of_the_served(oracles)
            # A reference model that was released, or is streamed, reads its files again.
            push.tokens = ask_tokens(self._target.client, new, old)
        except (MissingExtra, ModelError) as error:
            push.why_no_logprobs = error.message
            return
        # From here on these are the weights that a next push replaces.
        before, self._served_folder = self._served_folder, folder
        self._pushed_last = folder, new
        if before is not None and before.parent == self._scratch:
            shutil.rmtree(before, ignore_errors=True)

    def _oracle_of_the_served(self, oracles: Any) -> Any:
        """The oracle of what is served now; ``None`` where nobody knows what that is."""
        if self._pushed_last is not None and self._pushed_last[0] == self._served_folder:
            return self._pushed_last[1]  # its folder may be gone: :meth:`close`
        return oracles.for_folder(self._served_folder) if self._served_folder else None

    def _checksums(self) -> tuple[Checksums | None, str]:
        client = self._target.client
        if not client.has_route("POST", "/weights_checker"):
            return None, "this SGLang has no POST /weights_checker"
        try:
            return client.checksums(), ""
        except Refused as error:
            return None, f"this SGLang cannot compute checksums here ({error.reason})"

    def _remember_first(
        self, about: Mapping[str, Any], now: Checksums | None, served: Served
    ) -> None:
        """What is put back after a push that failed: the checkpoint that is on disk."""
        if self._first is not None:
            return
        told = self._target.client.model_info()
        self._first = (str(told["model_path"]), str(told.get("weight_version")))
        # Told when it started, and not told otherwise since: nobody has pushed.
        label = str(about.get("weight_version") or "default")
        untouched = self._first == (self._target.running.model_path(), label)
        if untouched or self._are_first(now, served):
            self._first_checksums = now
        else:
            self._served_folder = None

    def _are_first(self, now: Checksums | None, served: Served) -> bool:
        """Whether these are the checksums of the model on disk, computed here."""
        known = self._reproduced(now, served)
        if now is None or not known:
            return False
        return known == {name for rank in now.ranks for name in rank if not _computed(name)}

    def _reproduced(self, stated: Checksums | None, served: Served) -> set[str] | None:
        """The parameters whose checksums are those of the model on disk, computed here;
        ``None`` where they cannot be computed."""
        model = self._target.model
        if stated is None or model is None or served.unknown:
            return None
        computed = self._computed.expected(open_checkpoint(model), served)
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

    def _recognise(self, now: Checksums | None) -> None:
        """Which checkpoint is served now: somebody may have pushed beside this pusher."""
        if now is None:
            label = self._target.client.model_info().get("weight_version")
            if self._first is not None and label == self._first[1] == "default":
                self._served_folder = self._target.model
        elif self._first_checksums is not None and now == self._first_checksums:
            self._served_folder = self._target.model
        elif self._last_checksums is None or now != self._last_checksums:
            self._served_folder = None

    # --- the end of a push -------------------------------------------------------------------

    def _conclude(self, push: Gathered, pause: Pause | None, flush: bool) -> PushReport:
        findings = conclusion.find(push, lambda: self._known_here(push))
        new: set[str] = set()
        old: set[str] = set()
        put_back = None
        if findings.outcome == "failed":
            silent = isinstance(push.error, ServerDied | NoAnswerInTime)
            if push.after is None and not push.sent_nothing and not silent:
                with suppress(HarnessError):
                    push.after, _ = self._checksums()
            new, old = conclusion.states(push)
            put_back = self._put_back(push)
        self.last = report = conclusion.report(
            push,
            findings,
            new=new,
            old=old,
            pause=pause,
            flush=flush,
            put_back=put_back,
            unfit=self.unfit,
        )
        if report.outcome == "failed":
            raise PushFailed(report) from push.error
        return report

    def _known_here(self, push: Gathered) -> set[str] | None:
        """See :func:`judge_checksums`."""
        return self._reproduced(self._first_checksums, push.served)

    # --- after a failure ---------------------------------------------------------------------

    def _put_back(self, push: Gathered) -> str | None:
        """Known weights on a server that answers; or the server is marked unfit."""
        if self._target.running.watch.death is not None or isinstance(push.error, ServerDied):
            self.unfit = "it died"
            return None
        if push.session.left_open:
            self.unfit = f"{' and '.join(push.session.left_open)}, and could not be closed"
            return None
        if not self._generates():
            self.unfit = f"it generates nothing within {ANSWERS_WITHIN:g} s"
            return None
        if push.sent_nothing:
            return "nothing was sent: it serves what it served before"
        assert self._first is not None
        path, version = self._first
        client = self._target.client
        again = Session(
            client, pause="retract", flush=True, bracket=False, timeout=push.job.timeout
        )
        try:
            with again:
                client.update_weights_from_disk(
                    path, weight_version=version, flush_cache=False, timeout=push.job.timeout
                )
            if again.closing_errors:
                raise again.closing_errors[0]
            now, _ = self._checksums()
        except HarnessError as error:
            self.unfit = f"its first weights could not be put back ({error.message})"
            return None
        if self._first_checksums is not None and now != self._first_checksums:
            self.unfit = "its first weights were put back, and their checksums differ"
            return None
        self._served_folder = self._target.model
        proof = "by their checksums" if self._first_checksums else "by the server's word alone"
        return f"it serves its first weights again ({path}), {proof}"

    def _generates(self) -> bool:
        call = calls.generate("Hello", sampling={"max_new_tokens": 1}, timeout=ANSWERS_WITHIN)
        try:
            return self._target.client.send(call).completion_tokens == 1
        except HarnessError:
            return False

    # --- what it keeps -----------------------------------------------------------------------

    def _room(self) -> Path:
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="sglang-harness-weights-"))
        return self._scratch

    def close(self) -> list[str]:
        """Ends the peer and removes what was made; returns what could not be removed."""
        left = self._peer.end() if self._peer is not None else []
        self._peer = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        return left


def _computed(name: str) -> bool:
    return name.endswith(COMPUTED)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
