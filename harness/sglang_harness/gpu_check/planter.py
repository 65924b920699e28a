"""A process of this machine that holds memory of a server's GPU, as much as it is told to."""

from __future__ import annotations

import json
import os
from typing import Any

from sglang_harness._base import temporary
from sglang_harness._base.teardown import Teardown
from sglang_harness.errors import NotProvided
from sglang_harness.gpu_check import probes
from sglang_harness.runtime.attached import AttachedProcess
from sglang_harness.runtime.device import cuda_environment

#: Seconds until it is on the GPU: torch's import and CUDA's context.
STARTS_WITHIN = 60.0
#: Seconds for one allocation.
ANSWERS_WITHIN = 30.0


class ChildPlanter:
    """``with ChildPlanter(gpus) as planter``: see :class:`.parts.planted_leak.Planter`.

    Args:
        gpus: as ``--gpus`` names them; the first one is used.

    Raises:
        NotProvided: entering, where it cannot allocate there; says why.
    """

    def __init__(self, gpus: str) -> None:
        self._gpus = gpus
        self.uuid = ""

    def __enter__(self) -> ChildPlanter:
        self._folder = temporary.temporary_folder("scratch")
        # Without its cache torch asks the driver for every tensor.
        environment = {
            **os.environ,
            **cuda_environment(self._gpus),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }
        try:
            self._process = AttachedProcess(
                "The process that holds GPU memory",
                probes.command("hold"),
                name="hold",
                environment=environment,
                folder=self._folder,
            )
        except BaseException:
            temporary.remove(self._folder)
            raise
        try:
            self.uuid = str(self._answer(STARTS_WITHIN)["uuid"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with Teardown() as down:
            down.collect("the process that holds GPU memory", self._process.end)
            down.collect("its folder", lambda: temporary.remove(self._folder))

    def keep(self, amount: int) -> None:
        """Holds ``amount`` bytes more from now on.

        Raises:
            NotProvided: it could not allocate them.
        """
        self._process.write(json.dumps({"keep": amount}).encode())
        self._answer(ANSWERS_WITHIN)

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._process.read(timeout)
        except TimeoutError:
            raise NotProvided(
                f"The process that holds GPU memory did not answer within {timeout:g} s."
            ) from None
        if line is None:
            last = (self._process.words().strip().splitlines() or ["it said nothing"])[-1]
            raise NotProvided(f"The process that holds GPU memory ended: {last}.")
        return probes.read(line.decode(), "the process that holds GPU memory")
