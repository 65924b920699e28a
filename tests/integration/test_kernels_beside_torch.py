"""The kernels of SGLang that a CPU can run: attention by triton, in triton's interpreter. So it is
seen without a GPU that the calls are those which SGLang's kernels take, and the references right.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_harness.gpu_check import kernels_beside_torch as program
from sglang_harness.gpu_check.release_program import ReleaseProgram
from sglang_harness.gpu_check.settings import Release
from sglang_harness.runtime import images

#: Seconds for making SGLang's Python the first time, and for the kernels.
MADE_WITHIN, WITHIN = 1200.0, 300.0


@pytest.fixture(scope="module")
def release() -> Release:
    python = Path(images.run_script("embedded.sh", None, print, within=MADE_WITHIN))
    # As the harness starts its servers on a CPU: without it SGLang looks for CUDA's kernels.
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "1"}
    return Release(version="pinned", python=python, environment=environment)


def test_attention_of_this_sglang_is_that_of_plain_torch(release: Release, tmp_path: Path) -> None:
    # Not bfloat16: the interpreter computes with numpy, which has none.
    names = [
        kernel.name
        for kernel in program.kernels("cpu")
        if program.how_made(kernel.where[0]) == "triton" and "float16" in kernel.name.split()
    ]
    everything = [kernel.name for kernel in program.kernels("cpu")]
    numbers = [str(everything.index(name)) for name in names]
    assert len(numbers) == 2
    with ReleaseProgram(
        release, Path(program.__file__), ["--device", "cpu", *numbers], out=tmp_path, name="kernels"
    ) as running:
        assert running.wait(WITHIN) == "", running.last_words()
        rows = {row["kernel"]: row for row in running.told() if "number" in row}
    assert {name: rows[name]["outcome"] for name in names} == dict.fromkeys(names, "ok")
    assert all(row["where"].startswith("sglang.") for row in rows.values())


def test_every_other_kernel_is_where_the_table_says(release: Release, tmp_path: Path) -> None:
    """They cannot run here; that none is missing is seen all the same."""
    with ReleaseProgram(
        release,
        Path(program.__file__),
        ["--device", "cpu"],
        out=tmp_path,
        name="kernels",
        # What is compiled in vain is not kept.
        environment={"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    ) as running:
        assert running.wait(WITHIN) == "", running.last_words()
        rows = [row for row in running.told() if "number" in row]
    assert len(rows) == len(program.kernels("cpu"))
    assert [row["kernel"] for row in rows if row["outcome"] == "missing"] == []
