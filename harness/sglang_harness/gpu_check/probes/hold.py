"""Holds memory of the first GPU, as much as it is told to on its standard input.

It prints {"uuid": ...} when it is on the GPU. A line {"keep": BYTES} is answered by {"kept": ALL}.
It ends when its input does.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from sglang_harness.gpu_check.probes.allocate import uuid_of_first


def main() -> None:
    torch.zeros(1, device="cuda")  # the context, and whatever comes with it
    torch.cuda.synchronize()
    say({"uuid": uuid_of_first()})
    kept: list[torch.Tensor] = []
    for line in sys.stdin:
        kept.append(torch.empty(int(json.loads(line)["keep"]), dtype=torch.uint8, device="cuda"))
        torch.cuda.synchronize()
        say({"kept": sum(each.numel() for each in kept)})


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
