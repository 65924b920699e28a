"""A process that holds GPU memory, controlled by lines of JSON on its standard input. One file, run
by a Python that has torch for CUDA; it cannot import the harness.

It says {"uuid": ..., "torch": ...} when it is on the GPU. {"keep": BYTES} answers {"kept": ALL}.
It ends when its input does. What fails answers {"error": ...}.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    try:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("this torch sees no GPU")
        torch.zeros(1, device="cuda")  # the context, and whatever comes with it
        torch.cuda.synchronize()
        uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
        say({"uuid": uuid, "torch": torch.__version__})
        kept: list[Any] = []
        for line in sys.stdin:
            amount = int(json.loads(line)["keep"])
            kept.append(torch.empty(amount, dtype=torch.uint8, device="cuda"))
            torch.cuda.synchronize()
            say({"kept": sum(each.numel() for each in kept)})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
