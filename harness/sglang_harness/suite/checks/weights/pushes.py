"""Does a push change what it names and nothing else, however often, and while requests run?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from sglang_harness import oracle as oracles
from sglang_harness.checkpoint import footprint
from sglang_harness.checkpoint.footprint import Size
from sglang_harness.checkpoint.made.training import teach
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.checkpoint.writing import write_torch
from sglang_harness.errors import HarnessError, TimeIsOver
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    Need,
    NotProvided,
    Observation,
    expect,
    register,
)
from sglang_harness.suite.checks.weights.disk import (
    NEW_VERSION,
    first_weights_afterwards,
    pushed,
    variant,
)
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.lib.scored import Tokens, unequal
from sglang_harness.suite.lib.segments import Segmented, wrong_segments
from sglang_harness.suite.needs import CHECKSUMS, SENDS_IN_THE_BODY, route
from sglang_harness.traffic import EmptySlice, Traffic, TrafficRecord
from sglang_harness.traffic.background import BackgroundStream
from sglang_harness.traffic.base import together
from sglang_harness.verdict import Figure
from sglang_harness.weights import PushReport

PAUSE = route("POST", "/pause_generation")

Mode = Literal["abort", "retract", "in_place"]


def arrived(push: PushReport) -> Iterator[Mismatch]:
    if push.outcome == "failed":
        yield Mismatch("push", "to arrive", push.reason)


class Partial(Observation):
    name: str
    push: PushReport
    changed: list[str]
    """Parameters whose checksum is another than before, on any rank."""
    restored: list[str]
    """Those that are still another after the first weights were loaded again."""


@register
class PartialPush(Check[Partial]):
    id = "weights/partial-push"
    sentence = "A push of one tensor changes that parameter, as computed here, and no other."
    observation = Partial
    needs = (*SENDS_IN_THE_BODY, CHECKSUMS)
    changes = True

    def observe(self, context: Context) -> Partial:
        server, client = context.server, context.server.client
        new = variant(context)
        before = client.checksums()
        source = open_checkpoint(new.folder)
        # One that the server holds under the same name: nothing else is made of it.
        name = next(
            n for n, i in source.tensors.items() if n in before.ranks[0] and len(i.shape) > 1
        )
        file = write_torch(context.scratch / "one-tensor.pt", dict(source.read([name])))
        with first_weights_afterwards(context):
            push = pushed(server, file, allow=("*",))
            changed = client.checksums().changed_since(before)
        return Partial(
            name=name,
            push=push,
            changed=changed,
            restored=client.checksums().changed_since(before),
        )

    def judge(self, seen: Partial) -> list[Mismatch]:
        names = {name.rpartition(":")[2] for name in seen.changed}
        return [
            *arrived(seen.push),
            *expect("parameters that changed", {seen.name}, names),
            *expect("tensors of the push", 1, seen.push.tensors),
            *expect("checksums", "agrees", seen.push.checksums.says),
            *expect("parameters after going back", [], seen.restored),
        ]


class Many(Observation):
    pushes: int
    seconds: list[float]
    failed: str = ""
    """Why a push did not arrive, after which none was tried."""
    first: str
    """Checksum over everything before, and after the last push, which is of the first weights."""
    last: str
    new: list[str]
    """The checksums over everything of all pushes of the other weights; they have to be one."""
    before: Tokens
    after: Tokens
    tolerance: float


@register
class ManyPushes(Check[Many]):
    id = "weights/fifty-pushes"
    sentence = (
        "After fifty pushes in a row, old and new in turn, every checksum and every answer is "
        "the first one's."
    )
    observation = Many
    needs = (*SENDS_IN_THE_BODY, CHECKSUMS)
    profile = "full"
    changes = True

    def observe(self, context: Context) -> Many:
        server, client, pushes = context.server, context.server.client, 50
        new = variant(context)
        assert server.model is not None
        first, before = client.checksums().engine, Tokens.asked(client, PROMPTS[0], 8)
        seconds, engines = [], []
        failed = ""
        with first_weights_afterwards(context):
            for number in range(pushes):
                folder = server.model if number % 2 else new.folder
                push = pushed(server, folder, version=f"push-{number}")
                if push.outcome == "failed":
                    failed = f"push {number}: {push.reason}"
                    break
                seconds.append(push.seconds)
                if not number % 2:
                    engines.append(client.checksums().engine)
            return Many(
                pushes=pushes,
                seconds=seconds,
                failed=failed,
                first=first,
                last=client.checksums().engine,
                new=sorted(set(engines)),
                before=before,
                after=Tokens.asked(client, PROMPTS[0], 8),
                tolerance=oracles.tolerance(context.dtype),
            )

    def judge(self, seen: Many) -> list[Mismatch]:
        if seen.failed:
            return [Mismatch("pushes", f"all {seen.pushes} to arrive", seen.failed)]
        wrong = list(expect("pushes that arrived", seen.pushes, len(seen.seconds)))
        wrong += expect("checksum after all pushes", seen.first, seen.last)
        if len(seen.new) != 1 or seen.first in seen.new:
            wrong.append(
                Mismatch(
                    "checksums of the new weights", "one, other than the first", ", ".join(seen.new)
                )
            )
        wrong += unequal("answer after all pushes", seen.before, seen.after, seen.tolerance)
        return wrong

    def figures(self, seen: Many) -> list[Figure]:
        name = "push in the body, one of fifty"
        return [Figure.of(name, "s", "lower", *seen.seconds)] if seen.seconds else []


RUNNING = 16
#: Tokens of each request, at the first and at a further try.
LENGTHS = (64, 192, 192)


class UnderLoad(Observation):
    mode: Mode
    asked: int
    tokens_asked: int
    running_at_push: int
    tries: int = 1
    """How often it was asked: again, for longer, where every request was over before the push."""
    push: PushReport
    answers: list[Segmented]
    failed: list[str]
    """What came in place of an answer."""
    seconds_held: float
    """From the start of the push to its end: for so long the requests stood still."""
    tolerance: float


class _PushUnderLoad(Check[UnderLoad]):
    observation = UnderLoad
    needs = (*SENDS_IN_THE_BODY, PAUSE)
    profile = "full"
    changes = True
    mode: ClassVar[Mode]

    def observe(self, context: Context) -> UnderLoad:
        # A machine that is busy with something else hears of the first tokens when a small model
        # has generated the last: then nothing was running, and nothing was found out.
        for tries, length in enumerate(LENGTHS, start=1):
            seen = self._observe(context, length)
            seen.tries = tries
            if seen.failed or any(answer.is_mixed for answer in seen.answers):
                break
        return seen

    def _observe(self, context: Context, length: int) -> UnderLoad:
        server, new = context.server, variant(context)
        old = context.oracle
        prompts = [old.encode(PROMPTS[n % len(PROMPTS)] + f" {n}") for n in range(RUNNING)]
        with (
            first_weights_afterwards(context),
            together(
                # One by one: they run as soon as they are made.
                BackgroundStream(server.client, ids, sampling=greedy(length), logprobs=True)
                for ids in prompts
            ) as streams,
        ):
            for stream in streams:
                if not stream.wait_for(4, 60):
                    raise HarnessError(
                        f"Not all of {RUNNING} requests started to generate within 60 s."
                    )
            running = sum(not stream.is_over for stream in streams)
            began = time.monotonic()
            push = pushed(
                server,
                new.folder,
                pause=self.mode,
                # Told to flush under running requests, a server changes the weights and answers
                # 400 (SGLang 0.5.23).
                flush=self.mode != "in_place",
            )
            held = time.monotonic() - began
            answers, failed = [], []
            for ids, stream in zip(prompts, streams, strict=True):
                try:
                    ended = stream.end(120)
                except TimeIsOver:
                    # The check's own time limit is not an answer of the server's.
                    raise
                except HarnessError as error:
                    failed.append(error.message)
                    continue
                answers.append(
                    Segmented.of(
                        ids,
                        ended.ids,
                        ended.logprobs,
                        spans=ended.weight_spans,
                        new_label=NEW_VERSION,
                        finish=ended.finish,
                        old=old,
                        new=new.oracle,
                        in_place=self.mode == "in_place",
                    )
                )
        return UnderLoad(
            mode=self.mode,
            asked=RUNNING,
            tokens_asked=length,
            running_at_push=running,
            push=push,
            answers=answers,
            failed=failed,
            seconds_held=held,
            tolerance=oracles.tolerance(context.dtype),
        )

    def judge(self, seen: UnderLoad) -> list[Mismatch]:
        wrong = [Mismatch("a running request", "an answer", why) for why in seen.failed]
        wrong += expect("answers", seen.asked, len(seen.answers))
        wrong += arrived(seen.push)
        if not seen.running_at_push:
            wrong.append(Mismatch("requests at the push", "some that run", "none"))
        for number, answer in enumerate(seen.answers):
            where = f"answer {number}"
            wrong += wrong_segments(where, answer, seen.tolerance)
            if answer.stated is not None and abs(answer.stated - answer.switched) > 1:
                wrong.append(
                    Mismatch(
                        f"{where}, tokens with the old label",
                        str(answer.switched),
                        str(answer.stated),
                    )
                )
        wrong += self.wrong_ends(seen)
        return wrong

    def wrong_ends(self, seen: UnderLoad) -> list[Mismatch]:
        """Every request goes on to its end, with both weights in at least one of them."""
        wrong: list[Mismatch] = []
        for number, answer in enumerate(seen.answers):
            wrong += expect(f"answer {number}, finish", "length", answer.finish)
            wrong += expect(f"answer {number}, tokens", seen.tokens_asked, len(answer.ids))
        if seen.answers and not any(answer.is_mixed for answer in seen.answers):
            wrong.append(Mismatch("answers across the push", "tokens of both weights", "of one"))
        return wrong

    def figures(self, seen: UnderLoad) -> list[Figure]:
        name = f"running requests held by a push ({seen.mode})"
        return [Figure.of(name, "s", "lower", seen.seconds_held)]


@register
class PushRetracts(_PushUnderLoad):
    id = "weights/push-retract"
    sentence = (
        "A push under 16 running requests in mode 'retract' loses none, and each goes on with "
        "everything before its next token computed anew by the new weights."
    )
    mode = "retract"


@register
class PushInPlace(_PushUnderLoad):
    id = "weights/push-in-place"
    sentence = (
        "A push under 16 running requests in mode 'in_place' loses none, and each goes on with "
        "the new weights over the old weights' cache."
    )
    mode = "in_place"


@register
class PushAborts(_PushUnderLoad):
    id = "weights/push-abort"
    sentence = (
        "A push under 16 running requests in mode 'abort' ends each with the tokens that it has, "
        "all of them the old weights', and says so."
    )
    mode = "abort"

    def wrong_ends(self, seen: UnderLoad) -> list[Mismatch]:
        wrong: list[Mismatch] = []
        for number, answer in enumerate(seen.answers):
            where = f"answer {number}"
            if answer.finish not in ("abort", "length"):
                wrong.append(Mismatch(f"{where}, finish", "'abort'", repr(answer.finish)))
            if answer.switched < len(answer.ids):
                wrong.append(
                    Mismatch(
                        where, "tokens of the old weights alone", f"new ones from {answer.switched}"
                    )
                )
        if seen.answers and not any(a.finish == "abort" for a in seen.answers):
            wrong.append(Mismatch("requests that ran", "ended by the pause", "none was"))
        return wrong


class PushedUnderTraffic(Observation):
    traffic: TrafficRecord
    answers: list[Segmented]
    """Of all requests that were answered, in the order of their numbers."""
    numbers: list[int]
    push: PushReport
    tolerance: float


START, END = "push starts", "push ends"


@register
class PushUnderTraffic(Check[PushedUnderTraffic]):
    id = "weights/push-under-traffic"
    sentence = (
        "While a push goes on in the midst of traffic, every request is answered: before it by "
        "the old weights, after it by the new ones, and across it by each in its turn."
    )
    observation = PushedUnderTraffic
    needs = (*SENDS_IN_THE_BODY, PAUSE)
    profile = "full"
    changes = True

    def observe(self, context: Context) -> PushedUnderTraffic:
        server, new, old = context.server, variant(context), context.oracle
        prompts = [old.encode(f"{n} {prompt}") for n, prompt in enumerate(PROMPTS * 3)]
        with first_weights_afterwards(context):
            with Traffic(server.client, prompts, sampling=greedy(24), workers=4) as traffic:
                traffic.wait_for_answers(8, seconds=120)
                traffic.mark(START)
                push = pushed(server, new.folder, pause="retract")
                traffic.mark(END)
                traffic.wait_for_answers(12, seconds=120)
            record = traffic.record()
        answered = [r for r in record.requests if r.ids]
        return PushedUnderTraffic(
            traffic=record,
            answers=[
                Segmented.of(
                    r.prompt,
                    r.ids,
                    r.logprobs,
                    spans=r.weight_spans,
                    new_label=NEW_VERSION,
                    finish=r.finish,
                    old=old,
                    new=new.oracle,
                    in_place=False,
                )
                for r in answered
            ],
            numbers=[r.number for r in answered],
            push=push,
            tolerance=oracles.tolerance(context.dtype),
        )

    def judge(self, seen: PushedUnderTraffic) -> list[Mismatch]:
        wrong = [
            Mismatch(f"request {r.number}", "an answer", r.error or "none, it never ended")
            for r in seen.traffic.requests
            if not r.ids
        ]
        wrong += arrived(seen.push)
        wrong += expect("answers that were scored", len(seen.numbers), len(seen.answers))
        scored = dict(zip(seen.numbers, seen.answers, strict=False))
        for number, answer in scored.items():
            wrong += wrong_segments(f"request {number}", answer, seen.tolerance)
        try:
            before, after = seen.traffic.before(START), seen.traffic.after(END)
            seen.traffic.across(START)
        except (EmptySlice, KeyError) as error:
            return [*wrong, Mismatch("traffic", "requests before, across and after", str(error))]
        for request in (r for r in before if r.number in scored):
            answer = scored[request.number]
            if answer.switched < len(answer.ids):
                where = f"request {request.number}, ended before the push"
                wrong.append(Mismatch(where, "the old weights", f"new from {answer.switched}"))
        for request in (r for r in after if r.number in scored):
            answer = scored[request.number]
            if answer.switched:
                where = f"request {request.number}, sent after the push"
                wrong.append(
                    Mismatch(where, "the new weights", f"old ones up to token {answer.switched}")
                )
        return wrong

    def figures(self, seen: PushedUnderTraffic) -> list[Figure]:
        try:
            across = seen.traffic.across(START)
        except (EmptySlice, KeyError):
            return []
        took = [r.ended - r.sent for r in across if r.ended is not None]
        return [Figure.of("request across a push", "s", "lower", *took)] if took else []


SENTENCE = "The quick brown fox learned to sing on a Tuesday night."

#: Bytes of weights as they are saved: a step of a larger model takes longer than seconds.
TRAINABLE_BYTES = 1 << 30


def _too_large_to_train(server: Any) -> str | None:
    if server.model is None:
        return None
    size = Size.of_folder(server.model).saved_bytes
    if size > TRAINABLE_BYTES:
        return f"training a model of {size / 1e9:.1f} GB takes too long here"
    return None


SMALL_MODEL = Need("a model that can be trained here in seconds", _too_large_to_train)


class SentenceAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str
    ids: list[int]


class TaughtSentence(Observation):
    prompt: str
    answer: str
    answer_ids: list[int]
    said_before: SentenceAnswer
    said_after: SentenceAnswer
    said_again: SentenceAnswer
    """After the first weights were restored."""
    push: PushReport
    steps: int
    training_seconds: float


@register
class TaughtIsSaid(Check[TaughtSentence]):
    id = "weights/taught-sentence"
    sentence = (
        "A sentence that the model was taught by some training steps is said after the push, and "
        "was not before, nor is when the first weights are back."
    )
    observation = TaughtSentence
    needs = (*SENDS_IN_THE_BODY, SMALL_MODEL)
    profile = "full"
    changes = True

    def observe(self, context: Context) -> TaughtSentence:
        server, client = context.server, context.server.client
        if server.model is None:
            raise NotProvided(
                f"{server.spec.model} is not on this machine: it cannot be trained.",
                advice="Give the model as a folder.",
            )
        target = context.scratch / "taught"
        needs = footprint.training(Size.of_folder(server.model))
        footprint.require(f"Training {server.model}", needs, target)
        taught = teach(server.model, SENTENCE, target, seed=context.seed)

        def ask() -> SentenceAnswer:
            answer = Tokens.asked(client, taught.prompt_ids, len(taught.answer_ids))
            return SentenceAnswer(text=answer.text, ids=answer.ids)

        before = ask()
        with first_weights_afterwards(context):
            push = pushed(server, taught.folder, logprobs=True)
            after = ask()
        return TaughtSentence(
            prompt=taught.prompt,
            answer=taught.answer,
            answer_ids=list(taught.answer_ids),
            said_before=before,
            said_after=after,
            said_again=ask(),
            push=push,
            steps=taught.steps,
            training_seconds=taught.seconds,
        )

    def judge(self, seen: TaughtSentence) -> list[Mismatch]:
        wrong = list(expect("said after the push", seen.answer_ids, seen.said_after.ids))
        for when, said in (("before", seen.said_before), ("again", seen.said_again)):
            if said.ids == seen.answer_ids:
                wrong.append(Mismatch(f"said {when}", "something else", repr(said.text)))
        wrong += expect("said when the first weights are back", seen.said_before, seen.said_again)
        return [*wrong, *arrived(seen.push)]

    def figures(self, seen: TaughtSentence) -> list[Figure]:
        return [Figure.of("teaching a sentence", "s", "lower", seen.training_seconds)]
