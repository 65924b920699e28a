"""What gpu-check's part 'imports' tells of an SGLang: packages that were made up, in a real Python.

They are what is asked about: a module of SGLang that calls this and that of ``sgl_kernel``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_harness.gpu_check.parts import imported, imports

#: torch, as far as the script asks it; built for CUDA where ``cuda`` is a version.
TORCH = """
from types import SimpleNamespace
from torch import version
__version__ = version.__version__
cuda = SimpleNamespace(is_available=lambda: False, get_device_capability=lambda *_: None)
ops = SimpleNamespace(sgl_kernel=SimpleNamespace(norm=None, moved=None))
"""

KERNELS = """
import torch

def norm(x, weight, eps=1e-6):
    return torch.ops.sgl_kernel.norm(x)

def gone(x):
    return torch.ops.sgl_kernel.gone(x)

def gate(x, groups):
    return x
"""

Ask = Callable[..., "tuple[int, dict[str, Any], str]"]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Asks the script about an SGLang whose layer of normalisation has this source."""

    def write(file: str, text: str) -> None:
        path = tmp_path / "site" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def ask(
        layer: str = "",
        *,
        device: str = "gpu",
        cuda: str | None = "13.0",
        libraries: str = "",
        models: list[str] | None = None,
        **files: str,
    ) -> tuple[int, dict[str, Any], str]:
        write("torch/__init__.py", TORCH)
        write("torch/version.py", f"__version__ = '2.11.0'\ncuda = {cuda!r}\n")
        write("sgl_kernel/__init__.py", KERNELS)
        write("sgl_kernel/load_utils.py", "")
        write("sglang/__init__.py", "__version__ = '0.0.1'\n")
        for module in (*imported.SERVER, imported.TRITON, imported.ON_CPU):
            write(module.replace(".", "/") + ".py", "import sglang.srt.layers.layernorm\n")
        write("sglang/srt/layers/layernorm.py", layer or "from sgl_kernel import norm\n")
        known = models if models is not None else list(imported.MODELS)
        write(
            "sglang/srt/models/registry.py",
            f"class ModelRegistry:\n    get_supported_archs = staticmethod(lambda: {known!r})\n",
        )
        for file, text in files.items():
            write(file.replace("__", "/") + ".py", text)
        done = subprocess.run(
            [sys.executable, "-c", Path(imported.__file__).read_text(), device],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env={
                **os.environ,
                **imports.ON_CPU,
                "PYTHONPATH": f"{tmp_path / 'stand-in'}:{tmp_path / 'site'}",
                "LD_LIBRARY_PATH": libraries,
            },
        )
        told = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
        return done.returncode, told, done.stderr

    return ask


def test_what_is_called_and_is_there_holds(ask: Ask):
    code, told, errors = ask("from sgl_kernel import norm\ndef f(x):\n    return norm(x, x)\n")
    assert code == 0, errors
    assert told["kind"] == "gpu"
    assert told["symbols"] == {"sgl_kernel:norm": ["sglang.srt.layers.layernorm"]}
    imports.judge(told)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ("def f():\n    from sgl_kernel import other\n", "sgl_kernel.other: No module named"),
        ("from sgl_kernel import gone\n", "sgl_kernel.gone calls gone, not compiled in"),
        (
            "import torch\ndef f(x):\n    return torch.ops.sgl_kernel.other(x)\n",
            "the operator other is not compiled in",
        ),
        (
            "from sgl_kernel import gate\ndef f(x):\n    return gate(x, experts=8)\n",
            "line 3: gate(): missing a required argument: 'groups'",
        ),
        (
            "class L:\n  def f(self, x):\n    with x:\n      from sgl_kernel import o\n",
            "sgl_kernel.o: No module named",
        ),
    ],
)
def test_what_is_called_and_cannot_be_is_a_failure(layer: str, why: str, ask: Ask):
    code, told, errors = ask(layer)
    assert code == 0, errors
    with pytest.raises(AssertionError, match=r"1 calls of sgl_kernel cannot work") as failed:
        imports.judge(told)
    assert why in str(failed.value)
    assert "sglang.srt.layers.layernorm" in str(failed.value)


@pytest.mark.parametrize(
    "layer",
    [
        "_is_cuda, _is_cpu = True, False\nif _is_cpu and _is_cuda:\n    from sgl_kernel import o\n",
        "_is_cuda = True\nif _is_cuda:\n    pass\nelse:\n    from sgl_kernel import o\n",
        "def is_xpu():\n    return False\ndef f():\n    if is_xpu():\n        import_it()\n",
        "try:\n    from sgl_kernel import o\nexcept ImportError:\n    pass\n",
        "def forward_cpu(x):\n    from sgl_kernel import o\n",
        "def f(x):\n    if use_intel_amx_backend(x):\n        from sgl_kernel import o\n",
    ],
)
def test_what_another_device_calls_is_none_of_its_business(layer: str, ask: Ask):
    code, told, errors = ask(f"{layer}\nfrom sgl_kernel import norm\n")
    assert code == 0, errors
    assert set(told["symbols"]) == {"sgl_kernel:norm"}
    imports.judge(told)


def test_what_is_missing_where_these_models_never_come_is_told_and_no_failure(ask: Ask):
    quantised = "from sgl_kernel import norm\ndef f():\n    from sgl_kernel import other\n"
    code, told, errors = ask(
        "import sglang.srt.layers.other\nfrom sgl_kernel import norm\n",
        sglang__srt__layers__other=quantised,
    )
    assert code == 0, errors
    imports.judge(told)
    (elsewhere,) = told["missing_elsewhere"]
    assert elsewhere.startswith("sglang.srt.layers.other: sgl_kernel.other")


def test_a_model_that_is_not_registered_is_a_failure(ask: Ask):
    _, told, _ = ask(models=["LlamaForCausalLM"])
    with pytest.raises(AssertionError, match="does not register Qwen2ForCausalLM, Qwen3"):
        imports.judge(told)


def test_an_sglang_that_calls_nothing_is_one_that_was_not_understood(ask: Ask):
    _, told, _ = ask("x = 1\n")
    with pytest.raises(AssertionError, match="not one call of sgl_kernel was found"):
        imports.judge(told)


def test_what_cannot_be_imported_ends_with_the_reason(ask: Ask):
    code, told, errors = ask("import nothing_of_that_name\n")
    assert (code, told) == (1, {})
    assert errors.strip().endswith("No module named 'nothing_of_that_name'")


def test_what_libraries_write_when_the_process_ends_hides_no_answer_and_no_reason():
    late = ["nanobind: leaked 2 instances!", "See the page about leaks"]
    told = '{"kind": "cpu", "models": {}}'
    assert imports.answer(["{ a log line", told, *late]) == {"kind": "cpu", "models": {}}
    assert imports.answer(['{"kind": "cp', *late]) == {}
    traceback = ["Traceback (most recent call last):", "ImportError: no such name", *late]
    assert imports.reason(traceback) == "ImportError: no such name"
    assert imports.reason(late) == late[-1]
    assert imports.reason([]) == "no output"


def test_a_torch_without_cuda_imports_the_engine_for_the_cpu_and_asks_no_kernel(ask: Ask):
    layer = "import os\nassert os.environ['SGLANG_USE_CPU_ENGINE'] == '1'\n"
    code, told, errors = ask(layer, device="cpu", cuda=None)
    assert code == 0, errors
    assert told["kind"] == "cpu"
    assert "symbols" not in told
    imports.judge(told)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for an empty libcuda.so.1")
def test_with_the_drivers_library_an_h100_is_pretended_and_the_real_kernels_are_asked(
    ask: Ask, tmp_path: Path
):
    library = tmp_path / "libraries" / "libcuda.so.1"
    library.parent.mkdir()
    words = ["cc", "-shared", "-o", str(library), "-x", "c", "/dev/null"]
    subprocess.run(words, check=True, timeout=60)
    stand_in = tmp_path / "stand-in" / "sgl_kernel" / "__init__.py"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text("def __getattr__(name):\n    return print\n")
    layer = (
        "import os, torch\n"
        "assert torch.cuda.get_device_capability() == (9, 0)\n"
        "assert 'SGLANG_USE_CPU_ENGINE' not in os.environ\n"
        "from sgl_kernel import norm\ndef f():\n    from sgl_kernel import other\n"
    )
    code, told, errors = ask(layer, device="cpu", libraries=str(library.parent))
    assert code == 0, errors
    assert told["kind"] == "pretended"
    (missing,) = told["missing"]
    assert "sgl_kernel.other" in missing
