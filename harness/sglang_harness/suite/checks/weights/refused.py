"""Is an update that cannot be right refused? Apart from the other checks of updates: the server's
log is judged before this."""

from __future__ import annotations

from sglang_harness import oracle as oracles
from sglang_harness.errors import Refused
from sglang_harness.suite.check import Check, Context, Mismatch, Observation, expect, register
from sglang_harness.suite.checks.weights.disk import (
    NEW_VERSION,
    first_weights_afterwards,
    update_from_disk,
)
from sglang_harness.suite.lib.prompts import PROMPTS
from sglang_harness.suite.lib.scored import Tokens, unequal
from sglang_harness.suite.needs import CHECKSUMS, DISK_UPDATE, FIRST_WEIGHTS


class RefusedPath(Observation):
    status: int
    reason: str
    differing_checksums: list[str]
    before: Tokens
    after: Tokens
    model_path_before: str
    model_path_after: str
    tolerance: float


@register
class MissingPathIsRefused(Check[RefusedPath]):
    id = "weights/disk-missing-path"
    sentence = "An update from a path that does not exist is refused, and nothing has changed."
    observation = RefusedPath
    needs = (DISK_UPDATE, FIRST_WEIGHTS, CHECKSUMS)
    changes = True

    def observe(self, context: Context) -> RefusedPath:
        client = context.server.client
        path_before, sums = str(client.model_info()["model_path"]), client.checksums()
        before = Tokens.asked(client, PROMPTS[0], 8)
        status, reason = 200, ""
        with first_weights_afterwards(context):
            try:
                update = update_from_disk(context, "/exchange/there-is-no-such-folder", NEW_VERSION)
                reason = f"success {update.success}: {update.message}"
            except Refused as error:
                status, reason = error.status, error.reason
            return RefusedPath(
                status=status,
                reason=reason,
                differing_checksums=client.checksums().changed_since(sums),
                before=before,
                after=Tokens.asked(client, PROMPTS[0], 8),
                model_path_before=path_before,
                model_path_after=str(client.model_info()["model_path"]),
                tolerance=oracles.tolerance(context.dtype),
            )

    def judge(self, seen: RefusedPath) -> list[Mismatch]:
        wrong = []
        if not 400 <= seen.status < 500:
            wrong.append(Mismatch("answer", "a refusal (4xx)", f"{seen.status} {seen.reason}"))
        wrong += expect("checksums", [], seen.differing_checksums)
        wrong += unequal("answer afterwards", seen.before, seen.after, seen.tolerance)
        wrong += expect("model_path", seen.model_path_before, seen.model_path_after)
        return wrong
