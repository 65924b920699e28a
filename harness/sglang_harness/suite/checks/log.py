"""What did the server write while it was used? Asked after the checks that use the run's own
server as it is meant to be used: a log that is read earlier holds nothing but its start."""

from __future__ import annotations

import re

from sglang_harness.suite.check import Check, Context, Mismatch, Observation, register
from sglang_harness.suite.lib.prompts import PROMPTS, greedy
from sglang_harness.suite.needs import STARTED_HERE

ALARMING = re.compile(r"Traceback \(most recent call last\)|Scheduler hit an exception")

#: The line before a traceback that the harness's own question provokes, which does no harm: whether
#: checksums can be computed has to be tried. SGLang 0.5.20 to 0.5.22 need CUDA for them.
PROVOKED = re.compile(r"check_weights see error: Torch not compiled with CUDA enabled")

#: Seconds for the last lines to arrive here.
SETTLES = 0.5


class LogLines(Observation):
    lines: int
    alarming: list[str]


@register
class LogIsClean(Check[LogLines]):
    id = "launch/log"
    sentence = "The log of a server that was used as intended contains no traceback."
    observation = LogLines
    needs = (STARTED_HERE,)

    def observe(self, context: Context) -> LogLines:
        server = context.server
        # Where no other check was selected, it has only been started.
        server.client.generate(PROMPTS[0], sampling=greedy(8), logprobs=True)
        for _ in server.client.stream(PROMPTS[1], sampling=greedy(8)):
            pass
        server.running.watch.wait(SETTLES)
        lines = server.logs().splitlines()
        alarming = [
            line[:300]
            for before, line in zip(["", *lines], lines, strict=False)
            if ALARMING.search(line) and not PROVOKED.search(before)
        ]
        return LogLines(lines=len(lines), alarming=alarming[:20])

    def judge(self, seen: LogLines) -> list[Mismatch]:
        if not seen.lines:
            return [Mismatch("log", "at least one line", "none")]
        return [Mismatch("log", "no traceback", line) for line in seen.alarming]
