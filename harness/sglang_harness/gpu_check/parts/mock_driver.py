"""Whether the mock driver of the tests answers as a real one does: everything that is tested with
it rests on that."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from sglang_harness.gpu_check import probes
from sglang_harness.gpu_check.part import Context, NotHere, Part

COMPARED = ("uuid", "name", "capability", "total", "reserved", "parent", "call")


def run(context: Context) -> dict[str, Any]:
    """The mock driver, told what this driver says, answers as this driver does.

    Raises:
        NotHere: the mock's source or a C compiler is missing.
    """
    folder = context.settings.nvml_mock
    if folder is None:
        raise NotHere("the mock driver's source is neither in a kit nor in a checkout beside this")
    sys.path.insert(0, str(folder.parent))
    nvml_mock: Any = importlib.import_module(folder.name)
    if why := nvml_mock.why_not():
        raise NotHere(why)
    within = max(5.0, context.left() / 2)
    told = probes.run("ask", within=within)
    context.put("driver", told)
    devices = [
        nvml_mock.Device(
            row["uuid"],
            total=row["total"],
            reserved=row["reserved"] or 0,
            base=row["used"],
            name=row["name"],
            parent=row["parent"],
        )
        for row in told["devices"]
    ]
    with tempfile.TemporaryDirectory(dir=context.settings.models) as scratch:
        scenario = nvml_mock.Scenario(Path(scratch) / "scenario", devices)
        scenario.rules = [
            f"capability {row['uuid']} {row['capability'].replace('.', ' ')}"
            for row in told["devices"]
            if row["capability"]
        ]
        old = any(row["call"] == 1 for row in told["devices"])
        environment = nvml_mock.environment(scenario, first_calls_only=old)
        answered = probes.run("ask", within=within, environment=environment)
    context.put("mock", answered)
    context.headline(
        f"{len(told['devices'])} devices, {len(COMPARED)} answers of each are the driver's"
    )
    assert len(answered["devices"]) == len(told["devices"]), (
        f"the driver has {len(told['devices'])} devices, the mock {len(answered['devices'])}"
    )
    for real, mocked in zip(told["devices"], answered["devices"], strict=True):
        for name in COMPARED:
            assert real[name] == mocked[name], (
                f"{name} of {real['uuid']}: the driver says {real[name]!r}, the mock "
                f"{mocked[name]!r}"
            )
    assert told["missing"] == [], f"this driver lacks {told['missing']}, which the mock has"
    return {"devices": len(told["devices"]), "structures": told["structures"]}


PART = Part(
    "mock-driver",
    "Does the mock driver of the tests answer as this driver does?",
    40.0,
    run,
    needs=frozenset({"cuda"}),
    group="driver",
)
