"""A process of this machine that holds memory of a server's GPU, as much as it is told to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import NotProvided
from sglang_harness.gpu_check import allocator
from sglang_harness.runtime.attached import AttachedProcess
from sglang_harness.runtime.device import cuda_environment, meant

#: Seconds until it is on the GPU: torch's import and CUDA's context.
STARTS_WITHIN = 90.0
#: Seconds for one allocation.
ANSWERS_WITHIN = 30.0


class ChildPlanter:
    """``with ChildPlanter(python, gpus) as planter``: see :class:`.parts.planted_leak.Planter`.

    Args:
        python: one with torch for CUDA.
        gpus: as ``--gpus`` names them; the first one is used.

    Raises:
        NotProvided: entering, where it cannot allocate there; says why.
    """

    def __init__(self, python: Path, gpus: str) -> None:
        self._python = python
        self._gpus = gpus
        self.uuid = ""

    def __enter__(self) -> ChildPlanter:
        self._folder = TemporaryDirectory(prefix="sglang-harness-planter-")
        # Without its cache torch asks the driver for every tensor.
        environment = {
            **os.environ,
            **cuda_environment(self._gpus),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }
        try:
            self._process = AttachedProcess(
                "The allocator",
                [str(self._python), "-c", Path(allocator.__file__).read_text(encoding="utf-8")],
                name="allocator",
                environment=environment,
                folder=Path(self._folder.name),
            )
        except BaseException:
            self._folder.cleanup()
            raise
        try:
            self.uuid = self._named(str(self._answer(STARTS_WITHIN).get("uuid", "")))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with Teardown() as down:
            down.collect("the allocator", self._process.end)
            down.step("the allocator's folder", self._folder.cleanup)

    def keep(self, amount: int) -> None:
        """Holds ``amount`` bytes more from now on.

        Raises:
            NotProvided: it could not allocate them.
        """
        self._process.write(json.dumps({"keep": amount}).encode())
        self._answer(ANSWERS_WITHIN)

    def _named(self, by_torch: str) -> str:
        """NVML's name of torch's first device. Raises NotProvided: torch names none, and the GPUs
        are several."""
        known = [gpu.uuid for gpu in meant(self._gpus)]
        for uuid in known:
            if by_torch and uuid.removeprefix("GPU-") == by_torch.removeprefix("GPU-"):
                return uuid
        if len(known) == 1:
            return known[0]
        raise NotProvided(
            "This torch does not name its GPU by UUID, and there are several: which of them the "
            "memory is on is not known.",
            advice="Leave one GPU by CUDA_VISIBLE_DEVICES.",
        )

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._process.read(timeout)
        except TimeoutError:
            raise NotProvided(f"The allocator did not answer within {timeout:g} s.") from None
        told = json.loads(line) if line else {"error": self._process.words()[-300:] or "it ended"}
        if "error" in told:
            raise NotProvided(f"{self._python} cannot allocate GPU memory: {told['error']}.")
        return dict(told)
