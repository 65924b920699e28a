"""The harness's modules in a Python that has only torch and nvidia-ml-py.

The package ``sglang_harness.memory`` imports pydantic for its records. Its modules that read a
driver do not need it, so here the packages are bare folders to import from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def prepare() -> None:
    """Makes ``sglang_harness.memory.gpu.driver`` and its like importable, whatever is installed."""
    for folder in (ROOT / "tests", ROOT / "tests" / "gpu"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    for name, folder in (
        ("sglang_harness", ROOT / "harness" / "sglang_harness"),
        ("sglang_harness.memory", ROOT / "harness" / "sglang_harness" / "memory"),
    ):
        package = ModuleType(name)
        package.__path__ = [str(folder)]  # type: ignore[attr-defined]
        sys.modules[name] = package
