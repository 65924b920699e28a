"""Does it survive weights that it should refuse, and go on with those it has? Each check may kill
its server, so it has one of its own.

What is asked of the server is the same each time: it says no, it lives, it answers as before, and
it holds the weights and the label that it held. The requests are made by hand: a push by the
harness would be refused here, before anything is sent.
"""

from __future__ import annotations

import base64
import pickle
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang_harness import oracle as oracles
from sglang_harness.checkpoint.made.perturb import perturbed
from sglang_harness.client import Update, calls
from sglang_harness.client.call import Call
from sglang_harness.errors import MissingExtra, NoAnswerInTime, RequestFailed, ServerDied
from sglang_harness.server import Server
from sglang_harness.suite.check import (
    Check,
    Context,
    Mismatch,
    NotProvided,
    Observation,
    dtype_of,
    expect,
    register,
)
from sglang_harness.suite.checks.generate import greedy
from sglang_harness.suite.checks.hostile.requests import DIES_WITHIN, PROMPT, refused
from sglang_harness.suite.lib.scored import Tokens, unequal
from sglang_harness.suite.needs import DISK_UPDATE, TENSOR_UPDATE, route

if TYPE_CHECKING:
    import torch

GROUPS = route("POST", "/init_weights_update_group")

#: A parameter that a server holds under the checkpoint's own name, whatever it fuses.
NAME = "model.layers.0.mlp.down_proj.weight"

#: Seconds for an answer to such a request.
ANSWERS_WITHIN = 30.0
#: The same where the request before it got none.
ANSWERS_AGAIN_WITHIN = 10.0

LABEL = "harness-refused"


class Refusal(Observation):
    status: int | None
    """Of the request; ``None`` when it got no answer. 200 for one that says ``success: false``
    too, which SGLang answers with 400."""
    said: str
    death: str
    """How the server ended; empty when it lives."""
    hung: str
    """What did not answer afterwards; empty when everything did."""
    before: Tokens
    after: Tokens | None
    differing: list[str]
    """Parameters with another checksum than before."""
    no_checksums: str
    """Why there are none; empty where there are."""
    label_before: str
    label_after: str
    tolerance: float


class _RefusedWeights(Check[Refusal]):
    observation = Refusal
    profile = "full"
    own_server = True

    @abstractmethod
    def attack(self, context: Context, server: Server) -> Call[Update]:
        """The request that is to be refused."""

    def bracketed(self) -> bool:
        """Whether it goes between SGLang's begin and end."""
        return True

    def observe(self, context: Context) -> Refusal:
        with context.own_server() as server:
            client = server.client
            dtype = dtype_of(server)

            def ask(within: float = ANSWERS_WITHIN) -> Tokens:
                client.send(replace(calls.flush_cache(), timeout=within))
                answer = client.generate(PROMPT, sampling=greedy(6), logprobs=True, timeout=within)
                return Tokens.of(answer)

            sums, no_checksums = None, ""
            try:
                sums = client.checksums()
            except RequestFailed as error:
                no_checksums = error.message
            seen = Refusal(
                status=200,
                said="",
                death="",
                hung="",
                before=ask(),
                after=None,
                differing=[],
                no_checksums=no_checksums,
                label_before=str(client.model_info().get("weight_version")),
                label_after="",
                tolerance=oracles.tolerance(dtype),
            )
            try:
                self._send(server, self.attack(context, server), seen)
                if seen.death:
                    return seen
                unanswered = seen.status is None
                seen.after = ask(ANSWERS_AGAIN_WITHIN if unanswered else ANSWERS_WITHIN)
                seen.label_after = str(client.model_info().get("weight_version"))
                if sums is not None:
                    seen.differing = client.checksums().changed_since(sums)
            except ServerDied as error:
                seen.death = error.death.sentence()
            except NoAnswerInTime as error:
                seen.hung = error.message
                # Nothing can put it back; whoever tried would wait for it again.
                server.stop()
            return seen

    def _send(self, server: Server, call: Call[Update], seen: Refusal) -> None:
        client = server.client
        bracket = self.bracketed() and client.has_route("POST", "/begin_weight_update")
        try:
            if bracket:
                client.send(calls.begin_weight_update())
            update = client.send(call)
            seen.said = f"success {update.success}: {update.message}"
            if not update.success:
                seen.status = 400
        except RequestFailed as error:
            seen.status = getattr(error, "status", None)
            seen.said = error.message
        settled = seen.status is not None and seen.status < 500
        if death := server.running.watch.wait(1.0 if settled else DIES_WITHIN):
            seen.death = death.sentence()
            return
        if bracket:
            try:
                client.send(calls.end_weight_update())
            except NoAnswerInTime:
                raise
            except RequestFailed as error:
                seen.said += f"; end: {error.message}"

    def judge(self, seen: Refusal) -> list[Mismatch]:
        if seen.death:
            return [Mismatch("the server", "one that lives", seen.death)]
        if seen.hung:
            return [Mismatch("the server", "one that answers", seen.hung)]
        wrong = []
        if not refused(seen.status):
            wrong.append(Mismatch("answer", "a refusal (4xx)", f"{seen.status} {seen.said}"))
        return [*wrong, *_not_as_before(seen)]


def _not_as_before(seen: Refusal) -> list[Mismatch]:
    wrong = list(expect("checksums that changed", [], seen.differing))
    if seen.after is None:
        wrong.append(Mismatch("answer afterwards", "one", "none"))
    else:
        wrong += unequal("answer afterwards", seen.before, seen.after, seen.tolerance)
    wrong += expect("weight version", seen.label_before, seen.label_after)
    return wrong


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise NotProvided(str(MissingExtra("Making weights to be refused", "torch"))) from None
    return torch


def tensors(named: Sequence[tuple[str, torch.Tensor]], **body: Any) -> Call[Update]:
    """An update in the body, one entry for one rank, as plain pickle."""
    return payload(pickle.dumps(list(named)), **body)


def payload(content: bytes, **body: Any) -> Call[Update]:
    """An update whose one entry is ``content``, whatever that is."""
    entry = base64.b64encode(content).decode()
    return Call(
        "POST",
        "/update_weights_from_tensor",
        calls.update_weights_from_disk("").read,
        {"serialized_named_tensors": [entry], "weight_version": LABEL, **body},
        timeout=ANSWERS_WITHIN,
        changes=True,
    )


def weight(server: Server, alter: Callable[[Any], Any]) -> torch.Tensor:
    """The served checkpoint's ``NAME``, altered; contiguous, with memory of its own."""
    _torch()
    from sglang_harness.checkpoint.reading import open_checkpoint

    assert server.model is not None, "a check's own server serves a folder"
    ((_, tensor),) = open_checkpoint(server.model).read([NAME])
    return alter(tensor).contiguous().clone()  # type: ignore[no-any-return]


@register
class UnknownNames(_RefusedWeights):
    id = "hostile/weights-unknown-names"
    sentence = "Tensors whose names no parameter has are refused, and nothing has changed."
    needs = (TENSOR_UPDATE,)

    def attack(self, context: Context, server: Server) -> Call[Update]:
        del context
        return tensors([(f"no.such.{NAME}", weight(server, lambda t: t * 2))])


@register
class WrongShape(_RefusedWeights):
    id = "hostile/weights-wrong-shape"
    ends_its_server = True
    sentence = "A tensor of another shape is refused, and the server goes on as before."
    needs = (TENSOR_UPDATE,)

    def attack(self, context: Context, server: Server) -> Call[Update]:
        del context
        return tensors([(NAME, weight(server, lambda t: t[:-1] * 2))])


@register
class NotFinite(_RefusedWeights):
    id = "hostile/weights-not-finite"
    sentence = "A tensor of NaN is refused, and the server goes on as before."
    needs = (TENSOR_UPDATE,)

    def attack(self, context: Context, server: Server) -> Call[Update]:
        del context
        return tensors([(NAME, weight(server, lambda t: t * float("nan")))])


@register
class WrongDtype(_RefusedWeights):
    id = "hostile/weights-wrong-dtype"
    sentence = (
        "A tensor of integers in place of weights is refused, and the server goes on as before."
    )
    needs = (TENSOR_UPDATE,)

    def attack(self, context: Context, server: Server) -> Call[Update]:
        del context
        torch = _torch()
        return tensors([(NAME, weight(server, lambda t: (t * 100).to(torch.int32)))])


@register
class Garbage(_RefusedWeights):
    id = "hostile/weights-garbage"
    ends_its_server = True
    sentence = "A payload that is no pickle is refused, and the server goes on as before."
    needs = (TENSOR_UPDATE,)

    def attack(self, context: Context, server: Server) -> Call[Update]:
        del server
        return payload(context.random(self.id).randbytes(512))


@register
class UnknownLoadFormat(_RefusedWeights):
    id = "hostile/weights-unknown-load-format"
    ends_its_server = True
    sentence = "A load format that there is not is refused, and the server goes on as before."
    needs = (TENSOR_UPDATE,)

    def attack(self, context: Context, server: Server) -> Call[Update]:
        del context
        return tensors([(NAME, weight(server, lambda t: t * 2))], load_format="no-such-format")


@register
class Truncated(_RefusedWeights):
    id = "hostile/weights-truncated-file"
    ends_its_server = True
    sentence = (
        "A checkpoint on disk that is cut short is refused, and the server goes on as before."
    )
    needs = (DISK_UPDATE,)

    def bracketed(self) -> bool:
        return False

    def attack(self, context: Context, server: Server) -> Call[Update]:
        assert server.model is not None
        folder = context.scratch / "truncated"
        shutil.rmtree(folder, ignore_errors=True)
        perturbed(server.model, folder, context.seed)
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return calls.update_weights_from_disk(
            str(server.reach.share(folder)), weight_version=LABEL, timeout=ANSWERS_WITHIN
        )


@register
class WrongWorldSize(_RefusedWeights):
    id = "hostile/weights-group-never-joined"
    ends_its_server = True
    sentence = (
        "A process group that nobody else joins is given up in time, and the server goes on as "
        "before."
    )
    needs = (GROUPS,)

    def bracketed(self) -> bool:
        return False

    def attack(self, context: Context, server: Server) -> Call[Update]:
        del context
        backend = "nccl" if server.device == "gpu" else "gloo"
        return calls.init_weights_update_group(
            # Discard: nobody listens there.
            master_address="127.0.0.1",
            master_port=9,
            rank_offset=1,
            world_size=3,
            group_name="harness_never_joined",
            backend=backend,
            timeout=ANSWERS_WITHIN,
        )
