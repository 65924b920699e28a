"""Independent evidence that a push arrived. That the server answered "success" is not part of it.

The judges are pure functions of what was seen. ``agrees`` and ``differs`` are findings; where
a witness can tell neither, it says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from sglang_harness import oracle as oracles
from sglang_harness.client import Checksums, Client
from sglang_harness.weights.proof.checksums import ExpectedChecksums
from sglang_harness.weights.proof.fused_layout import COMPUTED
from sglang_harness.weights.report import Token, Witness

if TYPE_CHECKING:
    from sglang_harness.oracle import Oracle

#: Prompts after a push: long enough to tell weights apart, short enough to be quick.
PROMPTS = (
    "The quick brown fox jumps over",
    "In the beginning there was a checkpoint, and",
    "One two three four five six",
)
TOKENS = 12


def judge_checksums(
    before: Checksums | None,
    after: Checksums | None,
    expected: ExpectedChecksums | None,
    *,
    why_none: str = "",
    pushed: Iterable[str] = (),
    known_here: Callable[[], set[str] | None] | None = None,
) -> Witness:
    """Compares the server's checksums with what this push should have made of them.

    Args:
        expected: computed from the checkpoint; ``None`` where the layout is not known: then
            only parameters with a pushed tensor's own name can be compared, and only whether they
            changed, which does not prove their content.
        why_none: why there are no checksums, or nothing to expect.
        pushed: names of the pushed tensors.
        known_here: the parameters whose checksums can be computed right for the weights that
            the server was started with; ``None``: those are not known. Called where something
            differs: this project's idea of the layout may be what is wrong.
    """
    if before is None or after is None:
        return _witness("not available", why_none or "the server states no checksums")
    if len(before.ranks) != len(after.ranks):
        words = f"{len(before.ranks)} ranks before, {len(after.ranks)} after"
        return _witness("differs", "those of the server before and after", [words])
    if expected is None:
        return _by_name(before, after, set(pushed), why_none)
    how = "expected ones are computed from the checkpoint in the server's layout"
    if len(expected.ranks) != len(after.ranks):
        words = f"expected {len(expected.ranks)} ranks, got {len(after.ranks)}"
        return _witness("differs", how, [words])
    wrong: list[str] = []
    unequal: dict[str, list[str]] = {}
    right = 0
    for rank, (then, now, wanted) in enumerate(
        zip(before.ranks, after.ranks, expected.ranks, strict=True)
    ):
        where = f" (rank {rank})" if len(after.ranks) > 1 else ""
        for name in sorted(wanted.keys() | now.keys()):
            if name.endswith(COMPUTED):
                continue
            got = now.get(name)
            if name not in wanted:
                touched = name in expected.partly
                if not touched and got != then.get(name):
                    wrong.append(f"{name}{where} changed, although nothing of it was pushed")
                elif touched and got == then.get(name):
                    wrong.append(f"{name}{where} is unchanged, although a part of it was pushed")
            elif got is None:
                wrong.append(f"{name}{where}: the server has no such parameter")
            elif got == wanted[name]:
                right += 1
            else:
                state = "its old value" if got == then.get(name) else "neither new nor old"
                unequal.setdefault(name, []).append(
                    f"{name}{where}: expected {wanted[name]}, got {got}, {state}"
                )
    known = known_here() if unequal and known_here is not None else None
    strange = sorted(name for name in unequal if known is not None and name not in known)
    wrong += [each for name in unequal if name not in strange for each in unequal[name]]
    if strange and not wrong:
        return _witness(
            "not available",
            f"{right} match, and {len(strange)} cannot be checked: for {strange[0]}, what is "
            "computed here does not match this server's initial weights either, so its layout is "
            "not known",
        )
    if not wrong and not right:
        return _witness("not available", "no parameter is known to have been pushed")
    return _witness("differs" if wrong else "agrees", f"{right} match; {how}", wrong)


def _by_name(before: Checksums, after: Checksums, pushed: set[str], why: str) -> Witness:
    wrong, changed = [], 0
    for then, now in zip(before.ranks, after.ranks, strict=True):
        for name in sorted(pushed & now.keys()):
            if now[name] != then.get(name):
                changed += 1
            else:
                wrong.append(f"{name} is unchanged")
    if wrong and changed:
        return _witness(
            "differs",
            f"compared by name only, because {why}; {changed} changed, others did not",
            wrong,
        )
    return _witness(
        "not available",
        f"{why}; of the parameters with a pushed tensor's name {changed} changed and {len(wrong)} "
        "did not, which does not prove their content",
    )


def known_states(
    before: Checksums | None,
    after: Checksums | None,
    expected: ExpectedChecksums | None,
    parts: dict[str, tuple[str, ...]],
) -> tuple[set[str], set[str]]:
    """Tensors of the checkpoint that are proven new, and proven old, on every rank.

    Args:
        parts: the checkpoint's tensors of each parameter.
    """
    new: set[str] = set()
    old: set[str] = set()
    if before is None or after is None or expected is None:
        return new, old
    for parameter, made_of in parts.items():
        stated = [rank.get(parameter) for rank in after.ranks]
        if None in stated:
            continue
        if stated == [rank.get(parameter) for rank in expected.ranks]:
            new |= set(made_of)
        elif stated == [rank.get(parameter) for rank in before.ranks]:
            old |= set(made_of)
    return new, old


def ask_tokens(
    client: Client, new: Oracle, old: Oracle | None, *, lora_path: str | None = None
) -> list[Token]:
    """Greedy answers as they are served now, by the adapter ``lora_path`` where one is named,
    scored by both reference models."""
    tokens = []
    for number, prompt in enumerate(PROMPTS):
        ids = new.encode(prompt)
        answer = client.generate(
            ids,
            sampling={"temperature": 0, "max_new_tokens": TOKENS},
            logprobs=True,
            lora_path=lora_path,
        )
        output = list(answer.output_ids)
        if not output or len(answer.logprobs) != len(output):
            continue
        by_new = new.score(ids, output).logprobs
        by_old = old.score(ids, output).logprobs if old is not None else [None] * len(output)
        tokens += [
            Token(prompt=number, place=place, id=token, served=served, new=n, old=o)
            for place, (token, served, n, o) in enumerate(
                zip(output, answer.logprobs, by_new, by_old, strict=True)
            )
        ]
    return tokens


def judge_logprobs(
    tokens: Sequence[Token],
    dtype: str,
    *,
    same_weights: bool,
    new: str = "the new weights",
    old: str = "the old weights",
) -> Witness:
    """Within the tolerance of the new weights, and outside it for the old ones.

    Args:
        dtype: what the server computes in.
        same_weights: what was pushed is what was served before, to the byte: then the old
            weights are no control.
        new, old: what to call them.
    """
    tolerance = oracles.tolerance(dtype)
    if not tokens:
        return _logprobs("not available", "the server generated nothing that could be scored")
    wrong = []
    for token in tokens:
        off = abs(token.served - token.new)
        if not off <= tolerance:  # catches NaN too
            wrong.append(
                f"prompt {token.prompt}, token {token.place} (id {token.id}): expected "
                f"{token.new:.6f} ({new}), got {token.served:.6f}, off by {off:.6f}, tolerance "
                f"{tolerance:g}"
            )
    compared = f"{len(tokens)} greedy tokens"
    if wrong:
        return _logprobs(
            "differs",
            f"{len(wrong)} of {compared} not within tolerance of the reference model with {new}",
            wrong,
        )
    how = f"{compared} within tolerance of the reference model with {new}"
    if same_weights:
        return _logprobs("agrees", f"{how}; no control, as the same weights were served before")
    by_old = [abs(token.served - token.old) for token in tokens if token.old is not None]
    if not by_old:
        return _logprobs(
            "not available", f"{how}, but there is no reference model with {old} as a control"
        )
    apart = max(by_old)
    if not apart > tolerance:
        return _logprobs(
            "not available",
            f"{how}, but also of that with {old} (at most {apart:.6f} nats apart, tolerance "
            f"{tolerance:g}): the two cannot be told apart",
        )
    return _logprobs("agrees", f"{how}; control: that with {old} is off by up to {apart:.4f} nats")


def judge_label(asked: str, stated: dict[str, str | None]) -> Witness:
    """The label wherever the server states it. It proves nothing.

    Args:
        stated: by where, what is stated; ``None`` where this server states none.
    """
    told = {where: label for where, label in stated.items() if label is not None}
    if not told:
        return Witness.silent("weight version", "this server states no label")
    wrong = [
        f"{where}: expected {asked!r}, got {label!r}"
        for where, label in told.items()
        if label != asked
    ]
    return Witness(
        name="weight version",
        says="differs" if wrong else "agrees",
        how=f"{asked!r} in {', '.join(told)}",
        wrong=wrong,
    )


def _witness(says: str, how: str, wrong: Sequence[str] = ()) -> Witness:
    return Witness.model_validate(
        {"name": "checksums", "says": says, "how": how, "wrong": list(wrong)}
    )


def _logprobs(says: str, how: str, wrong: Sequence[str] = ()) -> Witness:
    return Witness.model_validate(
        {"name": "log-probabilities", "says": says, "how": how, "wrong": list(wrong)}
    )
