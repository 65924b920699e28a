"""Does the server survive requests that it should refuse?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_harness.suite.check import register
from sglang_harness.suite.lib.prompts import greedy
from sglang_harness.suite.lib.survival import Survived, Survives, first_look

if TYPE_CHECKING:
    from sglang_harness.server import Server


@register
class OutOfVocabulary(Survives[Survived]):
    id = "hostile/out-of-vocabulary-ids"
    ends_its_server = True
    sentence = "A token id beyond the vocabulary is refused, and the server goes on as before."
    observation = Survived

    def look(self, server: Server) -> Survived:
        return first_look(server)

    def attack(self, server: Server, prepared: Any) -> None:
        del prepared
        server.client.generate([1, 2, 10_000_000], sampling=greedy(2), timeout=20)
