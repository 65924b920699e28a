"""One call for a person: ``server.weights.push("checkpoint.pt", route="tensor")``."""

from __future__ import annotations

import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_harness._base.temporary import temporary_folder
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
    TimeIsOver,
)
from sglang_harness.peer import Peer
from sglang_harness.weights import routes
from sglang_harness.weights.bracket import Pause, Session
from sglang_harness.weights.proof import conclusion
from sglang_harness.weights.proof.checksums import ServedLayout
from sglang_harness.weights.proof.conclusion import Gathered
from sglang_harness.weights.proof.witnesses import ask_tokens
from sglang_harness.weights.report import BucketSent, NotPrepared, PushFailed, PushReport
from sglang_harness.weights.routes.base import Job, Route
from sglang_harness.weights.routes.buckets import Bucket, plan
from sglang_harness.weights.served_weights import (
    ANSWERS_WITHIN,
    ServedWeights,
    WeightsNotRestored,
    computed_name,
)
from sglang_harness.weights.source.fitted import ValueCheck, open_for
from sglang_harness.weights.source.model_folder import model_folder

if TYPE_CHECKING:
    from sglang_harness.weights.target import Target

#: Bytes of one bucket. Trainers use 512 MiB and more; a server's /dev/shm has 1 GiB by default.
BUCKET = 256 << 20

_EVERYTHING = 1 << 62


class WeightPusher:
    """Pushes checkpoints to one server, and finds out whether they arrived.

    Attributes:
        unfit: why the server must not be used any more after a push that failed; ``None``.
        last: the last push.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._served = ServedWeights(target)
        self._values = ValueCheck()
        self._peer: Peer | None = None
        self._scratch: Path | None = None
        self._labels = 0
        self.unfit: str | None = None
        self.last: PushReport | None = None

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
        check_values: bool = True,
        timeout: float | None = None,
    ) -> PushReport:
        """Pushes a checkpoint and looks for two witnesses that it arrived.

        Everything that can fail on this machine is done before anything is sent. After a push that
        failed the server's initial weights are restored, also where the caller's own bound
        (``client.within``) is over.

        Args:
            checkpoint: a file or folder of any layout that the harness reads.
            route: a name of :func:`.routes.names`, or a route of the caller's own.
            version: the label; one is made up where not given, because without any the server
                keeps stating the label of the old weights.
            pause: ``retract`` takes running requests back and computes them again with the new
                weights; ``in_place`` lets them go on with a cache of the old ones; ``abort``
                ends them; ``None`` does not pause.
            flush: empty the prefix cache before and after.
            abort_all_requests: have the server end every request before each bucket.
            bucket_bytes: the most that travels together; a larger tensor gets a bucket of its own.
            strict: fill every parameter with noise before the push, so that an old tensor whose
                successor never arrived cannot hide.
            logprobs: ask for the second witness, which loads the checkpoint into transformers.
            allow: patterns of names that the checkpoint may lack, or have beyond the model's.
            check_values: refuse NaN and infinite values, and copies of tied weights that differ.
                Reads the checkpoint once more, unless it passed before. ``False`` pushes them on
                purpose.
            timeout: seconds for the server's answer to one bucket.

        Returns:
            A report whose outcome is ``good``; or ``unproven``, where a witness can say nothing
            on this server, with the reason.

        Raises:
            SpecError: there is no such route, it does not lead to this server, or an argument is
                invalid.
            ReadOnly: the server may not be changed.
            ModelError, CheckpointMismatch: the checkpoint cannot be read, does not fit, or has
                values that are not finite. A wrong shape kills a server, and NaN is served without
                an error (SGLang 0.5.23).
            NotPrepared, MissingExtra, EngineError: memory, disk or a package is lacking for it.
                After these and those above nothing was sent, and the server is as it was.
            RequestFailed, ServerDied: the server did not answer what is asked before a push.
            PushFailed: it did not arrive. Its report says what is new, what is old, what is
                unknown, and what the server serves now.
        """
        target = self._target
        chosen = routes.make(route) if isinstance(route, str) else route
        if not target.may_change:
            raise ReadOnly(f"A push via '{chosen.name}'")
        if self.unfit:
            raise SpecError(
                f"Do not use this server any more: {self.unfit}.", advice="Start a new server."
            )
        if bucket_bytes < 1:
            raise SpecError(f"bucket_bytes is {bucket_bytes}; it has to be 1 or more.")
        if reason := chosen.lacking(target):
            raise SpecError(f"Route '{chosen.name}' is not available on this server: {reason}.")
        source = open_for(target.model, Path(checkpoint), allow)
        limit = _EVERYTHING if chosen.in_one_piece else bucket_bytes
        buckets = plan(source.tensors.values(), limit)
        if check_values:
            self._values.check(source)
        about = target.client.server_info()
        served = ServedLayout.of(target.model, about, target.device)
        job = Job(
            target=target,
            source=source,
            buckets=buckets,
            ranks=served.ranks,
            version=version or self._label(),
            timeout=timeout or target.spec.limits.check,
            abort_all_requests=abort_all_requests,
            any_peer=self._any_peer,
            dtype=served.dtype,
        )
        before, why_none = self._served.identify(about, served)
        bracket = chosen.needs_session and target.client.has_route("POST", "/begin_weight_update")
        session = Session(
            target.client, pause=pause, flush=flush, bracket=bracket, timeout=job.timeout
        )
        push = Gathered(chosen, job, served, strict, session, time.monotonic())
        push.before, push.why_no_checksums = before, why_none
        self._compute(push)
        try:
            self._prepare(push)
            self._send(push)
            if push.error is None:
                self._look(push, logprobs)
            self._remove_copies(job)
            return self._conclude(push, pause, flush)
        except PushFailed:
            raise
        except BaseException as error:
            if push.opened:
                self.unfit = f"a push was interrupted ({type(error).__name__})"
            raise
        finally:
            self._remove_copies(job)

    def served_checkpoint(self) -> Path | None:
        """A folder with the weights that are served now; ``None``: it is not known which these
        are, as after a push by another client."""
        about = self._target.client.server_info()
        self._served.identify(
            about, ServedLayout.of(self._target.model, about, self._target.device)
        )
        folder = self._served.folder
        return folder if folder is not None and folder.exists() else None

    def close(self) -> list[str]:
        """Ends the peer and removes what was made; returns what could not be removed."""
        left = self._peer.end() if self._peer is not None else []
        self._peer = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        return left

    # --- before anything is sent ------------------------------------------------------------

    def _label(self) -> str:
        self._labels += 1
        return f"harness-{uuid.uuid4().hex[:6]}-{self._labels}"

    def _any_peer(self) -> Peer:
        if self._peer is None or self._peer.ended:
            self._peer = Peer(self._target.running)
        return self._peer

    def _compute(self, push: Gathered) -> None:
        """The checksums that the push should lead to.

        Raises:
            SpecError: 'strict' would leave a parameter wiped.
        """
        if push.served.unknown:
            return
        try:
            push.expected = self._served.computed.expected(push.job.source, push.served)
        except MissingExtra as error:
            push.why_no_checksums = push.why_no_checksums or error.message
        if push.strict and push.before is not None and push.expected is not None:
            pushed = push.expected.ranks[0].keys()
            kept = [n for n in push.before.ranks[0] if n not in pushed and not computed_name(n)]
            if kept:
                raise SpecError(
                    f"'strict' wipes every parameter, and this checkpoint lacks {kept[0]} "
                    f"({len(kept)} are missing).",
                    advice="Push without 'strict'.",
                )

    def _prepare(self, push: Gathered) -> None:
        try:
            push.route.prepare(push.job)
        except HarnessError:
            raise
        except Exception as error:
            raise NotPrepared(
                f"Route '{push.route.name}' could not be prepared: {type(error).__name__}: {error}"
            ) from error

    # --- sending ----------------------------------------------------------------------------

    def _send(self, push: Gathered) -> None:
        """Everything up to the closed bracket; what went wrong is in ``push.error``."""
        route, job = push.route, push.job
        push.opened = True
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
        except Exception as error:
            push.error = _typed(error)
        finally:
            push.seconds = time.monotonic() - push.started
            with self._target.client.cleanup():
                self._close_route(push)
        if push.error is None and push.session.closing_errors:
            push.error = push.session.closing_errors[0]

    def _close_route(self, push: Gathered) -> None:
        job = push.job
        if isinstance(push.error, PeerFailed | NoAnswerInTime | ServerDied):
            self._drop_peer(job)
            return
        try:
            job.notes += push.route.close()
        except HarnessError as error:
            job.notes.append(f"the route could not be closed: {error.message}")
        if self._peer is not None and self._peer.busy:
            self._drop_peer(job)
        elif job.peer_used is not None:
            with suppress(HarnessError):
                push.peer_peak_bytes = job.peer_used.peak_bytes()

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
            except Exception as error:
                push.buckets.append(
                    BucketSent(
                        **common,
                        outcome=_outcome(error),
                        server=time.monotonic() - started,
                        detail=_typed(error).message,
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

    def _remove_copies(self, job: Job) -> None:
        """Copies of the checkpoint that were made for this push. Again: nothing."""
        while job.staged:
            try:
                job.staged[-1].remove()
            except HarnessError as error:
                job.notes.append(error.message)
            job.staged.pop()

    # --- verifying --------------------------------------------------------------------------

    def _look(self, push: Gathered, logprobs: bool) -> None:
        client = self._target.client
        try:
            push.after, why = self._served.checksums()
            push.why_no_checksums = push.why_no_checksums or why
            push.stated["/model_info"] = _text(client.model_info().get("weight_version"))
            answer = client.generate("Hello", sampling={"max_new_tokens": 1})
            push.stated["answers"] = answer.weight_version
            if logprobs:
                self._ask(push)
            else:
                push.why_no_logprobs = "not asked for"
            self._served.arrived(push.after, is_scored=not push.why_no_logprobs)
        except Exception as error:
            push.error = _typed(error)

    def _ask(self, push: Gathered) -> None:
        from sglang_harness import oracle as oracles

        model = self._target.model
        if model is None:
            push.why_no_logprobs = "the model's config and tokenizer are not on this machine"
            return
        folder: Path | None = None
        try:
            room = self._room()
            folder = room / uuid.uuid4().hex[:8]
            model_folder(push.job.source, model, folder)
            new = oracles.for_folder(folder)
            push.tokens = ask_tokens(self._target.client, new, self._served.oracle())
        except (MissingExtra, ModelError) as error:
            push.why_no_logprobs = error.message
        except HarnessError:
            raise  # of the server
        except Exception as error:
            # Such as a full disk, or no memory: it says nothing about the server.
            push.why_no_logprobs = f"the reference model failed: {type(error).__name__}: {error}"
        else:
            self._served.scored(folder, new, scratch=room)
            return
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _room(self) -> Path:
        if self._scratch is None:
            self._scratch = temporary_folder("weights")
        return self._scratch

    # --- the end of a push -------------------------------------------------------------------

    def _conclude(self, push: Gathered, pause: Pause | None, flush: bool) -> PushReport:
        findings = conclusion.find(push, lambda: self._known_here(push))
        new: set[str] = set()
        old: set[str] = set()
        restored = None
        if findings.outcome == "failed":
            with self._target.client.cleanup():
                if push.after is None and not push.sent_nothing and not _silent(push.error):
                    with suppress(HarnessError):
                        push.after, _ = self._served.checksums()
                restored = self._restore(push)
            new, old = conclusion.states(push)
        self.last = report = conclusion.report(
            push,
            findings,
            new=new,
            old=old,
            pause=pause,
            flush=flush,
            put_back=restored,
            unfit=self.unfit,
        )
        if report.outcome == "failed":
            raise PushFailed(report) from push.error
        return report

    def _known_here(self, push: Gathered) -> set[str] | None:
        """See :func:`judge_checksums`."""
        return self._served.reproduced(self._served.first_checksums, push.served)

    def _restore(self, push: Gathered) -> str | None:
        """Known weights on a server that answers, and which; or the server is marked unfit."""
        if self._target.running.watch.death is not None or isinstance(push.error, ServerDied):
            self.unfit = "the server died"
        elif push.session.left_open:
            self.unfit = f"{' and '.join(push.session.left_open)}, and could not be closed"
        elif not self._served.generates():
            self.unfit = f"no generation succeeded within {ANSWERS_WITHIN:g} s"
        elif push.sent_nothing:
            return "nothing was sent: the server has the weights that it had before"
        else:
            try:
                return self._served.restore_first(timeout=push.job.timeout)
            except WeightsNotRestored as error:
                self.unfit = error.message
        return None


def _silent(error: HarnessError | None) -> bool:
    """Whether the server answers nothing, as far as this error tells."""
    if isinstance(error, TimeIsOver):
        return False
    return isinstance(error, ServerDied | NoAnswerInTime)


def _typed(error: Exception) -> HarnessError:
    """The error as one of this package's; those of a route of the caller's own can be any."""
    if isinstance(error, HarnessError):
        return error
    typed = HarnessError(f"{type(error).__name__}: {error}")
    typed.__cause__ = error
    return typed


def _outcome(error: Exception) -> str:
    """What became of a bucket whose sending raised this."""
    if isinstance(error, Refused):
        return "refused"
    # The checkpoint could not be read: there was nothing to send.
    return "not sent" if isinstance(error, ModelError) else "unknown"


def _text(value: object) -> str | None:
    return None if value is None else str(value)
