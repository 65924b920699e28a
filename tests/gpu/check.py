"""What only a GPU can show. Needs Python with torch and nvidia-ml-py; no Docker, no network, no
pytest and nothing else of the harness's own dependencies.

    python tests/gpu/check.py [--part PART] [--sglang-python PYTHON] [--out FILE]

Exit code 0: every part ran and held. 1: a part did not hold. 3: not everything ran, and nothing
failed: on a machine with no GPU nothing does. Figures of a machine with a GPU are written to
``bench/results/``, with the name of the device and the date.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bare

bare.prepare()

import parts  # noqa: E402

HELD, FAILED, NOT_RUN = 0, 1, 3


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--largest", type=float, default=20.0, help="GiB to allocate at most")
    options.add_argument("--seconds", type=float, default=10.0, help="to sample for")
    options.add_argument("--sglang-python", type=Path, help="a Python that has SGLang")
    options.add_argument("--out", type=Path, help="where the figures go")
    options.add_argument("--part", action="append", choices=list(parts.PARTS), help="only these")
    asked = options.parse_args()

    machine, why = parts.machine()
    if why:
        print(f"not run: no GPU: {why}")
        print("Nothing of this was run on a GPU. It needs a machine with one.")
        return NOT_RUN
    print("on " + ", ".join(machine["gpus"]))
    rows = [_row(name, asked) for name in asked.part or parts.PARTS]
    out = asked.out or _file(machine)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"date": date.today().isoformat(), "machine": machine, "parts": rows}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"figures: {out}")
    outcomes = {row["outcome"] for row in rows}
    return FAILED if "failed" in outcomes else NOT_RUN if "not run" in outcomes else HELD


def _row(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    figures: dict[str, Any] = {}
    outcome, message = "held", ""
    try:
        figures = parts.PARTS[name](asked)
    except parts.NotHere as error:
        outcome, message = "not run", str(error)
    except AssertionError as error:
        outcome, message = "failed", str(error) or traceback.format_exc(limit=-1)
    except Exception as error:  # a part that breaks is no part that held
        outcome, message = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    seconds = time.monotonic() - began
    print(f"{outcome:8} {name} {seconds:.1f} s {message}".rstrip())
    return {
        "part": name,
        "outcome": outcome,
        "message": message,
        "seconds": round(seconds, 3),
        "figures": figures,
    }


def _file(machine: dict[str, Any]) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpus"][0].lower()).strip("-")
    results = Path(__file__).resolve().parents[2] / "bench" / "results"
    return results / f"gpu-check-{name}-{platform.machine()}.json"


if __name__ == "__main__":
    sys.exit(main())
