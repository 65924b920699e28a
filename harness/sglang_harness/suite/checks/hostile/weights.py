"""Does the server survive weights that it should refuse, and go on with those it has?

Each time the server has to refuse, to stay up, to answer as before, and to hold the weights and the
label that it held. The requests are built here: a push by the harness would be rejected before
anything is sent.
"""

from __future__ import annotations

import base64
import pickle
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from sglang_harness import oracle as oracles
from sglang_harness.checkpoint.made.perturb import perturbed
from sglang_harness.client import Checksums, Update, calls
from sglang_harness.client.call import Call
from sglang_harness.errors import MissingExtra, NoAnswerInTime, RequestFailed, TimeIsOver
from sglang_harness.server import Server
from sglang_harness.suite.check import Context, Mismatch, dtype_of, expect, register
from sglang_harness.suite.lib.scored import Tokens
from sglang_harness.suite.lib.survival import (
    ANSWERS_WITHIN,
    PROMPT,
    TOKENS,
    Aftermath,
    Survives,
)
from sglang_harness.suite.needs import DISK_UPDATE, TENSOR_UPDATE, route

if TYPE_CHECKING:
    import torch

GROUPS = route("POST", "/init_weights_update_group")

#: A parameter that a server holds under the checkpoint's own name, whatever it fuses.
NAME = "model.layers.0.mlp.down_proj.weight"

LABEL = "harness-refused"


class Refusal(Aftermath):
    said: str
    differing: list[str]
    """Parameters with another checksum than before."""
    no_checksums: str
    """Why there are none; empty where there are."""
    label_before: str
    label_after: str
    _sums: Checksums | None = PrivateAttr(default=None)

    def note(self, words: str) -> None:
        self.said = "; ".join(filter(None, (self.said, words)))

    def noted(self) -> str:
        return self.said


class _RefusedWeights(Survives[Refusal]):
    """Weights that the server should refuse: it also holds the weights and the label that it
    held."""

    observation = Refusal
    bracketed: ClassVar[bool] = True
    """Whether the update goes between SGLang's begin and end."""

    @abstractmethod
    def prepare(self, context: Context, server: Server) -> Call[Update]:
        """The request that is to be refused."""

    def look(self, server: Server) -> Refusal:
        client, sums, no_checksums = server.client, None, ""
        try:
            sums = client.checksums()
        except TimeIsOver:
            raise
        except RequestFailed as error:
            no_checksums = error.message
        seen = Refusal(
            status=None,
            said="",
            death="",
            before=Tokens.asked(client, PROMPT, TOKENS, timeout=ANSWERS_WITHIN),
            after=None,
            differing=[],
            no_checksums=no_checksums,
            label_before=_label(server),
            label_after="",
            tolerance=oracles.tolerance(dtype_of(server)),
        )
        seen._sums = sums
        return seen

    def attack(self, server: Server, prepared: Any) -> Update:
        client = server.client
        if self._has_bracket(server):
            client.send(calls.begin_weight_update())
        return client.send(prepared)  # type: ignore[no-any-return]

    def restore(self, server: Server, prepared: Any, seen: Refusal) -> None:
        del prepared
        if not self._has_bracket(server):
            return
        try:
            server.client.send(calls.end_weight_update())
        except NoAnswerInTime:
            raise
        except RequestFailed as error:
            seen.note(f"end: {error.message}")

    def _has_bracket(self, server: Server) -> bool:
        return self.bracketed and server.client.has_route("POST", "/begin_weight_update")

    def look_again(self, server: Server, seen: Refusal, timeout: float) -> None:
        super().look_again(server, seen, timeout)
        seen.label_after = _label(server)
        if seen._sums is not None:
            seen.differing = server.client.checksums().changed_since(seen._sums)

    def judge(self, seen: Refusal) -> list[Mismatch]:
        wrong = super().judge(seen)
        if seen.death or seen.hung:
            return wrong
        wrong += expect("checksums that changed", [], seen.differing)
        if seen.after is not None:
            wrong += expect("weight version", seen.label_before, seen.label_after)
        return wrong


def _label(server: Server) -> str:
    return str(server.client.model_info().get("weight_version"))


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtra("Making weights that the server should refuse", "torch") from None
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

    def prepare(self, context: Context, server: Server) -> Call[Update]:
        del context
        return tensors([(f"no.such.{NAME}", weight(server, lambda t: t * 2))])


@register
class WrongShape(_RefusedWeights):
    id = "hostile/weights-wrong-shape"
    ends_its_server = True
    sentence = "A tensor of another shape is refused, and the server goes on as before."
    needs = (TENSOR_UPDATE,)

    def prepare(self, context: Context, server: Server) -> Call[Update]:
        del context
        return tensors([(NAME, weight(server, lambda t: t[:-1] * 2))])


@register
class WeightsNotFinite(_RefusedWeights):
    id = "hostile/weights-not-finite"
    sentence = "A tensor of NaN is refused, and the server goes on as before."
    needs = (TENSOR_UPDATE,)

    def prepare(self, context: Context, server: Server) -> Call[Update]:
        del context
        return tensors([(NAME, weight(server, lambda t: t * float("nan")))])


@register
class WrongDtype(_RefusedWeights):
    id = "hostile/weights-wrong-dtype"
    sentence = (
        "A tensor of integers in place of weights is refused, and the server goes on as before."
    )
    needs = (TENSOR_UPDATE,)

    def prepare(self, context: Context, server: Server) -> Call[Update]:
        del context
        torch = _torch()
        return tensors([(NAME, weight(server, lambda t: (t * 100).to(torch.int32)))])


@register
class Garbage(_RefusedWeights):
    id = "hostile/weights-garbage"
    ends_its_server = True
    sentence = "A payload that is not a pickle is refused, and the server goes on as before."
    needs = (TENSOR_UPDATE,)

    def prepare(self, context: Context, server: Server) -> Call[Update]:
        del server
        return payload(context.random(self.id).randbytes(512))


@register
class UnknownLoadFormat(_RefusedWeights):
    id = "hostile/weights-unknown-load-format"
    ends_its_server = True
    sentence = "A load format that does not exist is refused, and the server goes on as before."
    needs = (TENSOR_UPDATE,)

    def prepare(self, context: Context, server: Server) -> Call[Update]:
        del context
        return tensors([(NAME, weight(server, lambda t: t * 2))], load_format="no-such-format")


@register
class Truncated(_RefusedWeights):
    id = "hostile/weights-truncated-file"
    ends_its_server = True
    sentence = "A truncated checkpoint on disk is refused, and the server goes on as before."
    needs = (DISK_UPDATE,)

    bracketed = False

    def prepare(self, context: Context, server: Server) -> Call[Update]:
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
        "A process group that no other rank joins is given up in time, and the server goes on as "
        "before."
    )
    needs = (GROUPS,)

    bracketed = False

    def prepare(self, context: Context, server: Server) -> Call[Update]:
        del context
        backend = "nccl" if server.device == "gpu" else "gloo"
        return calls.init_weights_update_group(
            # Discard: nothing listens there.
            master_address="127.0.0.1",
            master_port=9,
            rank_offset=1,
            world_size=3,
            group_name="harness_never_joined",
            backend=backend,
            timeout=ANSWERS_WITHIN,
        )
