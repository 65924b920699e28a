"""Prints what torch is and what it sees of the GPUs. On its own: it has a CUDA context."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Everything that can be asked; what fails is told, and stops nothing after it."""
    began = time.monotonic()
    import torch

    told: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "folder": str(Path(torch.__file__).parent),
        "import_seconds": time.monotonic() - began,
        "made_for": torch.cuda.get_arch_list() if torch.version.cuda else [],
        "available": torch.cuda.is_available(),
        "why_not": "",
        "devices": [],
    }
    began = time.monotonic()
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        told["why_not"] = str(error)
    else:
        told["init_seconds"] = time.monotonic() - began
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            told["devices"].append(
                {
                    "name": about.name,
                    "capability": f"{about.major}.{about.minor}",
                    "multiprocessors": about.multi_processor_count,
                    "total": about.total_memory,
                    "uuid": str(getattr(about, "uuid", "")),
                }
            )
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        told["context_seconds"] = time.monotonic() - began
        told["free_and_total"] = torch.cuda.mem_get_info(0)
        try:
            told["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        except (RuntimeError, AttributeError) as error:
            told["nccl"] = f"none: {error}"
    print(json.dumps(told))


if __name__ == "__main__":
    main()
