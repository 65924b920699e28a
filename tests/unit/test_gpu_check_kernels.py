"""Kernels beside torch: the references are right, what is wrong is seen, and one kernel that takes
its process with it takes no other kernel."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import plain_kernels
import psutil
import pytest
import torch
from gpu_check_contexts import context, figures, headline

from sglang_harness.gpu_check import kernels_beside_torch as program
from sglang_harness.gpu_check.kernels_beside_torch import Kernel, Row, beside_torch, kernels
from sglang_harness.gpu_check.part import NotHere
from sglang_harness.gpu_check.parts import kernels as part
from sglang_harness.gpu_check.release_program import ReleaseProgram

MIB = 1 << 20


def nothing() -> None:
    return None


def by_name() -> dict[str, Callable[..., Any]]:
    return {name: f for each in plain_kernels.PLACES.values() for name, f in each.items()}


@pytest.mark.parametrize("kernel", kernels("cpu"), ids=lambda k: k.name)
def test_another_way_to_compute_the_same_is_right(kernel: Kernel):
    function = by_name()[kernel.where[0].split(":")[1]]
    for got, expected in kernel.run(function):
        assert got.shape == expected.shape
        assert program.distance(got, expected) <= kernel.allowed


@pytest.mark.parametrize("kernel", kernels("cpu"), ids=lambda k: k.name)
def test_a_kernel_that_computes_nothing_is_wrong(kernel: Kernel):
    """Output that is in place stays as it was, what is returned is zero."""

    def idle(*given: Any, **_: Any) -> Any:
        for each in given:
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                each.nan_to_num_(0)
        return torch.zeros_like(given[0])

    offs = [program.distance(got, expected) for got, expected in kernel.run(idle)]
    assert max(offs) > kernel.allowed


def a_kernel(*gives: torch.Tensor | Exception, where: str = "math:sqrt", **more: Any) -> Kernel:
    answers = list(gives) * 2

    def run(_: Any) -> program.Pairs:
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return [(given, torch.tensor([1.0, 2.0]))]

    return Kernel("a kernel", (where,), run, more.get("allowed", 1e-2))


def test_a_row_says_by_how_much_a_kernel_is_off():
    row = beside_torch(a_kernel(torch.tensor([1.0, 2.1])), nothing)
    assert row.outcome == "wrong"
    assert row.off == pytest.approx(0.05, rel=1e-3)
    assert "allowed 0.01" in row.why
    assert beside_torch(a_kernel(torch.tensor([1.0, 2.01])), nothing).outcome == "ok"


def test_not_a_number_and_another_shape_are_wrong():
    row = beside_torch(a_kernel(torch.tensor([1.0, math.nan])), nothing)
    assert row.outcome == "wrong"
    row = beside_torch(a_kernel(torch.tensor([1.0, 2.0, 3.0])), nothing)
    assert (row.outcome, row.off) == ("wrong", math.inf)


def test_the_second_call_counts_as_well():
    right, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert beside_torch(a_kernel(right, other), nothing).outcome == "wrong"


def test_a_kernel_that_there_is_not_is_missing_and_every_place_is_named():
    row = beside_torch(
        Kernel("gone", ("no.such.module:f", "math:no_such"), lambda _: [], 0.0), nothing
    )
    assert row.outcome == "missing"
    assert "no.such.module:f" in row.why
    assert "math:no_such" in row.why


def test_a_kernel_that_cannot_be_compiled_without_a_compiler_is_not_run_and_else_failed(
    monkeypatch: pytest.MonkeyPatch,
):
    broken = RuntimeError("Could not find CUDA installation")
    monkeypatch.setattr(program, "lacks_to_compile", lambda: ["nvcc", "ninja"])
    row = beside_torch(a_kernel(broken), nothing)
    assert (row.outcome, row.made) == ("not run", "nvcc")
    assert "no nvcc, no ninja to compile it with" in row.why
    assert "Could not find CUDA" in row.why
    monkeypatch.setattr(program, "lacks_to_compile", list)
    assert beside_torch(a_kernel(broken), nothing).outcome == "failed"


def test_what_a_kernel_is_compiled_with_is_looked_for_where_tvm_ffi_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """ninja is a program of its own: with nvcc alone every kernel failed."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    lacking = program.lacks_to_compile()
    assert lacking[-2:] == ["c++", "ninja"]
    (tmp_path / "bin").mkdir()
    for place in ("bin/nvcc", "clang++", "ninja"):
        (tmp_path / place).write_text("#!/bin/sh\n")
        (tmp_path / place).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "clang++")
    assert program.lacks_to_compile() == []


def test_no_kernel_is_asked_for_that_the_library_has_not():
    """sgl_kernel's rmsnorm is compiled for half precision alone: on a GPU float32 is refused."""
    names = {kernel.name for kernel in kernels("cpu")}
    assert "rmsnorm 128 bfloat16" in names
    assert "rmsnorm 128 float32" not in names
    assert "fused_add_rmsnorm 128 float32" in names


def test_a_module_that_fails_when_it_is_imported_is_told_in_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no such driver\\n' * 200)")
    monkeypatch.syspath_prepend(str(tmp_path))
    row = beside_torch(a_kernel(torch.ones(2), where="broken_module:f"), nothing)
    assert row.outcome == "missing"
    assert "RuntimeError: no such driver" in row.why
    assert len(row.why) < 1000


def test_a_built_kernel_that_raises_has_failed_whatever_compiler_there_is(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(program, "lacks_to_compile", lambda: ["nvcc"])
    assert program.how_made("sgl_kernel:rmsnorm") == "built"
    assert program.how_made("x.decode_attention:decode_attention_fwd") == "triton"
    monkeypatch.setattr(program, "how_made", lambda _: "built")
    assert beside_torch(a_kernel(RuntimeError("no kernel image")), nothing).outcome == "failed"


# --- judging ------------------------------------------------------------------------------------


def row(number: int, outcome: str, why: str = "") -> dict[str, Any]:
    return {"number": number, "kernel": f"kernel {number}", "outcome": outcome, "why": why}


def test_kernels_are_right_only_if_each_is():
    assert part.judged([row(0, "ok"), row(1, "ok")]) == ("", "")
    wrong, lacking = part.judged([row(0, "ok"), row(1, "wrong", "off by 3"), row(2, "missing")])
    assert wrong == "kernel 1 wrong: off by 3; kernel 2 missing: "
    assert lacking == ""
    wrong, lacking = part.judged([row(0, "ok"), row(1, "not run", "no nvcc")])
    assert (wrong, lacking) == ("", "no nvcc (1 of 2 kernels)")
    assert part.judged([])[0] == "no kernel was compared"


def test_what_a_process_left_out_is_known_by_its_plan():
    assert part.unfinished({0: "a", 2: "b", 4: "c"}, [row(2, "ok")]) == [0, 4]


def test_as_many_processes_as_the_machine_has_room_for():
    assert part.processes(16, 128 << 30) == part.PROCESSES
    assert part.processes(4, 128 << 30) == 3
    assert part.processes(16, 9 << 30) == 2
    assert part.processes(1, 1 << 30) == 1


def steps(**changed: Any) -> list[dict[str, Any]]:
    seen = {"empty": 500, "allocated": 2548, "paused": 502, "resumed": 2550}
    return [
        {"step": name, "nvml": mib * MIB, "used": mib * MIB, "seconds": 0.1, "same_address": True}
        | changed.get(name, {})
        for name, mib in seen.items()
    ]


def test_memory_that_is_paused_is_seen_by_nvml_and_the_driver():
    assert part.saver_judged(steps(), 2 << 30) == ""


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"paused": {"nvml": 2548 * MIB}}, "paused: expected 2048 MiB less in use than allocated"),
        ({"paused": {"used": 2548 * MIB}}, "the CUDA driver sees 0"),
        ({"resumed": {"nvml": 502 * MIB}}, "resumed: expected 2048 MiB more in use than paused"),
        ({"resumed": {"same_address": False}}, "another address"),
        ({"allocated": {"nvml": 500 * MIB}}, "allocated: expected 2048 MiB more"),
    ],
)
def test_memory_that_does_not_come_and_go_is_told(changed: dict[str, Any], told: str):
    assert told in part.saver_judged(steps(**changed), 2 << 30)


def test_a_program_that_ends_half_way_is_told_by_the_step_that_it_did_not_reach():
    assert "before memory was paused" in part.saver_judged(steps()[:2], 2 << 30)


def test_nvml_is_given_a_moment_to_follow_the_driver():
    """It was read once, right after the step: a figure that came later failed a memory saver."""
    empty, paused = steps()[0], {"step": "paused", "used": 502 * MIB}
    readings = iter([2548 * MIB, 2548 * MIB, 502 * MIB])
    assert part.followed(lambda: next(readings), [empty], paused)[0] == 502 * MIB
    assert part.followed(lambda: 7 * MIB, [], {"used": 500 * MIB})[0] == 7 * MIB


def test_nvml_that_does_not_follow_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part, "FOLLOWS_WITHIN", 0.05)
    used, took = part.followed(lambda: 2548 * MIB, [steps()[0]], {"used": 502 * MIB})
    assert used == 2548 * MIB
    assert took >= 0.05, "it was waited for"


# --- the part, with its processes -----------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A Python whose SGLang has plain torch for its kernels."""
    modules = tmp_path / "modules"
    modules.mkdir()
    shutil.copy(plain_kernels.__file__, modules)
    (modules / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('PLAIN_KERNELS'):\n"
        "    import plain_kernels\n"
        "    if os.environ['PLAIN_KERNELS'] == 'one crashes':\n"
        "        place = 'sglang.kernels.ops.kvcache.kvcache'\n"
        "        plain_kernels.PLACES[place]['store_cache'] = plain_kernels.crash\n"
        "    plain_kernels.install()\n"
    )
    wrapper = tmp_path / "python"
    wrapper.write_text(
        f'#!/bin/sh\nPYTHONPATH="{modules}" OMP_NUM_THREADS=1 exec "{sys.executable}" "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper


def test_every_kernel_of_a_release_gets_a_row(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PLAIN_KERNELS", "right")
    given, reports = context(tmp_path / "out", python=release, part="kernels")
    part.compare(given)
    rows = figures(reports)["rows"]
    assert [each["outcome"] for each in rows] == ["ok"] * len(kernels("cpu"))
    assert headline(reports).startswith(f"{len(rows)} kernels: {len(rows)} ok")


def test_a_kernel_that_ends_its_process_is_blamed_and_the_others_run_in_a_new_one(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PLAIN_KERNELS", "one crashes")
    given, reports = context(tmp_path / "out", python=release, part="kernels")
    with pytest.raises(AssertionError, match=r"store_cache 64 float16 failed.*SIGSEGV"):
        part.compare(given)
    rows = figures(reports)["rows"]
    assert [each["number"] for each in rows] == list(range(len(kernels("cpu"))))
    bad = {each["kernel"] for each in rows if each["outcome"] != "ok"}
    assert bad == {"store_cache 64 float16", "store_cache 128 float16", "store_cache 512 bfloat16"}


def test_a_process_that_breaks_before_it_says_anything_takes_no_rows_of_the_others(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PLAIN_KERNELS", "right")
    monkeypatch.setattr(part, "processes", lambda *_: 2)
    real = release.read_text().replace("#!/bin/sh\n", "")
    release.write_text(
        f'#!/bin/sh\ncase "$*" in *"--share 1/2"*) echo no room >&2; exit 9;; esac\n{real}'
    )
    given, reports = context(tmp_path / "out", python=release, part="kernels")
    with pytest.raises(AssertionError, match=r"kernels-0-1 ended with exit code 9: no room"):
        part.compare(given)
    rows = figures(reports)["rows"]
    assert [each["number"] for each in rows] == list(range(0, len(kernels("cpu")), 2))
    assert {each["outcome"] for each in rows} == {"ok"}


def test_a_release_without_a_memory_saver_has_none_to_be_asked(tmp_path: Path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    bare.chmod(0o755)
    given, _ = context(tmp_path / "out", python=bare, part="memory-saver", gpus=["GPU-1"])
    with pytest.raises(NotHere, match="no torch_memory_saver"):
        part.pause(given)


def test_a_python_without_torch_is_told_with_its_last_words(tmp_path: Path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    bare.chmod(0o755)
    given, _ = context(tmp_path / "out", python=bare, part="kernels")
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        part.compare(given)


def test_a_release_that_is_in_an_image_has_no_python_here(tmp_path: Path):
    given, _ = context(tmp_path / "out", part="kernels")
    with pytest.raises(NotHere, match="in an image"):
        part.compare(given)


def test_a_program_that_does_not_end_is_ended_with_what_it_started(tmp_path: Path):
    source = tmp_path / "program.py"
    source.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print('{\"pid\": %d}' % child.pid, flush=True)\n"
        "child.wait()\n"
    )
    given, _ = context(tmp_path / "out", python=Path(sys.executable))
    running = ReleaseProgram(given.release, source, [], out=given.out, name="slow")
    told = running.next_line(0, within=20)
    assert told is not None
    assert running.wait(0.1) == "did not end within 0 s"
    assert running.process.poll() is not None
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(told["pid"])
        gone, _ = psutil.wait_procs([started], timeout=10)
        assert gone == [started]


def test_the_size_that_is_paused_is_the_one_that_is_judged():
    assert part.SIZE == program.PAUSED
    assert part.UNUSABLE == program.UNUSABLE
    assert Row("a", "ok").outcome == "ok"
