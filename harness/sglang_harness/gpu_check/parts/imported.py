"""Imports an SGLang's server, and tells what of ``sgl_kernel`` it calls and whether that is there.

    imported.py gpu|cpu      a JSON object is the last line of its output

Runs in the release's own Python, which need not have the harness: nothing of it is imported here.

On a GPU nothing is pretended. Without one there are two ways: where torch was built for CUDA and
the loader finds a ``libcuda.so.1``, torch is made to say in this process that there is an H100
(which is enough to import everything, and for no computation); elsewhere SGLang's CPU engine is
imported, and ``sgl_kernel`` is not asked.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

#: What a server imports before it listens: its HTTP side, and the process that computes.
SERVER = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.launch_server",
)

#: The file of each architecture that the harness's models and checks use.
MODELS = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}

#: The attention that a kit serves with; on a CPU there is no triton.
TRITON = "sglang.srt.layers.attention.triton_backend"
ON_CPU = "sglang.srt.layers.attention.torch_native_backend"

#: What only the CPU engine wants to find in its environment. Also set by the stand-ins' ``.pth``.
CPU_VARIABLES = (
    "SGLANG_USE_CPU_ENGINE",
    "SGLANG_EXTERNAL_MODEL_PACKAGE",
    "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_DISABLE",
)

#: What a server of those models runs through. A symbol that is missing elsewhere (other ways to
#: quantise, other attention, speculation, offloading) is told, and is no failure.
PATH = (
    *(f"sglang.srt.models.{file}" for file in MODELS.values()),
    "sglang.srt.layers.activation",
    "sglang.srt.layers.attention.triton_backend",
    "sglang.srt.layers.layernorm",
    "sglang.srt.layers.linear",
    "sglang.srt.layers.logits_processor",
    "sglang.srt.layers.moe.moe_runner.triton_utils",
    "sglang.srt.layers.moe.topk",
    "sglang.srt.layers.quantization.unquant",
    "sglang.srt.layers.radix_attention",
    "sglang.srt.layers.rotary_embedding.base",
    "sglang.srt.layers.sampler",
    "sglang.srt.layers.vocab_parallel_embedding",
    "sglang.srt.managers.scheduler",
    "sglang.srt.mem_cache.allocation",
    "sglang.srt.mem_cache.allocator",
    "sglang.srt.mem_cache.memory_pool",
    "sglang.srt.model_executor",
    "sglang.srt.sampling",
    "sglang.srt.weight_sync",
    "sglang.kernels.ops.activation",
    "sglang.kernels.ops.attention.rope",
    "sglang.kernels.ops.layernorm",
    "sglang.kernels.ops.sampling",
)


def main(device: str) -> None:
    kind = "gpu" if device == "gpu" else "pretended" if _can_pretend() else "cpu"
    told: dict[str, Any] = {"kind": kind, "python": sys.version.split()[0], "seconds": {}}
    if kind == "pretended":
        for name in CPU_VARIABLES:
            os.environ.pop(name, None)
        _leave_out_stand_in()
        _pretend()
    for module in ("torch", *SERVER, ON_CPU if kind == "cpu" else TRITON):
        began = time.monotonic()
        importlib.import_module(module)
        told["seconds"][module] = round(time.monotonic() - began, 2)
    began = time.monotonic()
    registry = importlib.import_module("sglang.srt.models.registry").ModelRegistry
    known = set(registry.get_supported_archs())
    told["seconds"]["every model"] = round(time.monotonic() - began, 2)
    torch = sys.modules["torch"]
    told.update(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        sglang=sys.modules["sglang"].__version__,
        architectures=len(known),
        models={name: name in known for name in MODELS},
    )
    if kind != "cpu":
        told.update(symbols())
    print(json.dumps(told))


# --- without a GPU --------------------------------------------------------------------------------


def _can_pretend() -> bool:
    """Whether torch was built for CUDA, SGLang's kernels are here, and the library that they are
    linked to, the driver's, is found. Nothing is imported for it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or not _real_kernels():
        return False
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    if not re.search(r"^cuda.*= *['\"]", version, re.MULTILINE):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _real_kernels() -> list[str]:
    """Folders of the search path with the compiled ``sgl_kernel``, not a stand-in for it."""
    return [path for path in sys.path if Path(path, "sgl_kernel", "load_utils.py").exists()]


def _leave_out_stand_in() -> None:
    real = _real_kernels()
    sys.path[:] = [p for p in sys.path if p in real or not Path(p, "sgl_kernel").is_dir()]


def _pretend() -> None:
    """Has torch say in this process that there is one H100. What computes still fails."""
    import torch

    h100 = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 << 30,
        warp_size=32,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": h100,
        "get_device_name": h100.name,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


# --- what of sgl_kernel is called -----------------------------------------------------------------


def symbols() -> dict[str, Any]:
    """Every symbol of ``sgl_kernel`` that the imported modules of SGLang can reach here, and which
    of them are missing or are called with arguments that they do not take.

    Returns:
        ``symbols``: by symbol, the modules that use it, of those in :data:`PATH`; ``missing`` and
        ``misfits`` of the same, a sentence each; ``missing_elsewhere``: of other modules.
    """
    used: dict[str, list[str]] = {}
    missing, misfits, elsewhere = [], [], []
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not name.startswith("sglang.") or not file or not file.endswith(".py"):
            continue
        text = Path(file).read_text(encoding="utf-8")
        if "sgl_kernel" not in text:
            continue
        on_path = any(name == each or name.startswith(f"{each}.") for each in PATH)
        reached = _Reached(module)
        reached.look(ast.parse(text))
        for symbol in sorted(reached.symbols):
            why = absent(symbol)
            if not on_path:
                elsewhere += [f"{name}: {why}"] if why else []
                continue
            used.setdefault(symbol, []).append(name)
            missing += [f"{name}: {why}"] if why else []
        if on_path:
            misfits += [f"{name}: {each}" for each in reached.misfits]
    return {
        "symbols": used,
        "missing": missing,
        "misfits": misfits,
        "missing_elsewhere": elsewhere,
    }


def absent(symbol: str) -> str:
    """Why ``module:name`` cannot be used; empty: it is there, and so is every compiled operator
    that it calls by name."""
    module, _, name = symbol.partition(":")
    if module == "torch.ops.sgl_kernel":
        return "" if _operator(name) else f"the operator {name} is not compiled in"
    try:
        there = getattr(importlib.import_module(module), name, None)
        if there is None:
            there = importlib.import_module(f"{module}.{name}")
    except ImportError as error:
        return f"{module}.{name}: {error}"
    try:
        source = inspect.getsource(there)
    except (OSError, TypeError):
        return ""
    operators = set(re.findall(r"torch\.ops\.sgl_kernel\.(\w+)", source))
    lacking = sorted(o for o in operators if not _operator(o)) if callable(there) else []
    return f"{module}.{name} calls {', '.join(lacking)}, not compiled in" if lacking else ""


def _operator(name: str) -> bool:
    return hasattr(sys.modules["torch"].ops.sgl_kernel, name)


#: In the name of a function or an operator: it is for a device other than NVIDIA's GPUs.
ANOTHER_DEVICE = re.compile(r"(^|_)(cpu|xpu|npu|hip|musa|mps|tpu)(_|$)")


class _Reached:
    """What of ``sgl_kernel`` a module uses on this device. What is for another device is left out:
    functions by their names, and branches as far as their conditions are made of the module's own
    flags (``_is_cuda``, ``is_cpu()``).

    Attributes:
        symbols: as ``module:name``.
        misfits: calls with arguments that the function does not take, a sentence each.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.symbols: set[str] = set()
        self.misfits: list[str] = []

    def look(self, tree: ast.Module) -> None:
        self._body(tree.body, {}, optional=False)

    def _body(self, body: list[Any], names: dict[str, str], *, optional: bool) -> None:
        """Follows statements.

        Args:
            names: what is imported from ``sgl_kernel`` in this scope, by its name here.
            optional: an import may fail here (``except ImportError``), so it is no need.
        """
        for node in body:
            if isinstance(node, ast.If):
                self._expressions(node.test, names)
                holds = self._value(node.test)
                if holds is not False:
                    self._body(node.body, names, optional=optional)
                if holds is not True:
                    self._body(node.orelse, names, optional=optional)
            elif isinstance(node, ast.Try):
                self._body(node.body, names, optional=optional or bool(node.handlers))
                for handler in node.handlers:
                    self._body(handler.body, names, optional=True)
                self._body([*node.orelse, *node.finalbody], names, optional=optional)
            elif isinstance(node, ast.ImportFrom):
                self._imported(node, names, optional)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if not ANOTHER_DEVICE.search(node.name):
                    self._body(node.body, dict(names), optional=optional)
            else:
                self._inside(node, names, optional)

    def _inside(self, node: ast.AST, names: dict[str, str], optional: bool) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self._body(value, names, optional=optional)
            else:
                for each in value if isinstance(value, list) else [value]:
                    if isinstance(each, ast.AST):
                        self._expressions(each, names)

    def _expressions(self, node: ast.AST, names: dict[str, str]) -> None:
        for each in ast.walk(node):
            if isinstance(each, ast.Call):
                self._called(each, names)
            if isinstance(each, ast.Attribute) and not ANOTHER_DEVICE.search(each.attr):
                owner = ast.unparse(each.value)
                if owner in ("torch.ops.sgl_kernel", "sgl_kernel"):
                    self.symbols.add(f"{owner}:{each.attr}")

    def _imported(self, node: ast.ImportFrom, names: dict[str, str], optional: bool) -> None:
        ours = (node.module or "").partition(".")[0] == "sgl_kernel"
        for alias in node.names:
            name = alias.asname or alias.name
            names.pop(name, None)
            if ours:
                names[name] = f"{node.module}:{alias.name}"
                if not optional and not ANOTHER_DEVICE.search(alias.name):
                    self.symbols.add(names[name])

    def _called(self, call: ast.Call, names: dict[str, str]) -> None:
        """Whether an imported function takes what it is given here."""
        symbol = names.get(call.func.id) if isinstance(call.func, ast.Name) else None
        given = {word.arg: None for word in call.keywords if word.arg}
        if symbol not in self.symbols or len(given) < len(call.keywords) or _is_starred(call):
            return
        assert symbol is not None
        module, _, name = symbol.partition(":")
        try:
            function = getattr(importlib.import_module(module), name, None)
            if function is not None:
                inspect.signature(function).bind(*call.args, **given)
        except (ImportError, ValueError):  # missing, which is told elsewhere; or compiled
            return
        except TypeError as error:
            self.misfits.append(f"line {call.lineno}: {name}(): {error}")

    def _value(self, test: ast.expr) -> bool | None:
        """A condition's value, where it is made of the module's own flags alone."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._value(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            values = [self._value(each) for each in test.values]
            decides = isinstance(test.op, ast.Or)
            if decides in values:
                return decides
            return None if None in values else not decides
        if isinstance(test, ast.Name):
            return self._flag(getattr(self.module, test.id, None))
        if isinstance(test, ast.Call) and "amx" in ast.unparse(test.func):
            return False  # matrix instructions of CPUs
        if isinstance(test, ast.Call) and not test.args and not test.keywords:
            return self._answer(test.func)
        return None

    def _answer(self, asked: ast.expr) -> bool | None:
        """Of ``is_cpu()`` and of ``current_platform.is_xpu()``: questions about the device."""
        owner: Any = self.module
        if isinstance(asked, ast.Attribute) and isinstance(asked.value, ast.Name):
            owner, name = getattr(self.module, asked.value.id, None), asked.attr
        elif isinstance(asked, ast.Name):
            name = asked.id
        else:
            return None
        question = getattr(owner, name, None)
        if not re.fullmatch(r"_?is_[a-z0-9]+", name) or not callable(question):
            return None
        try:
            return self._flag(question())
        except TypeError:  # it wants to know of what
            return None

    @staticmethod
    def _flag(value: object) -> bool | None:
        return value if isinstance(value, bool) else None


def _is_starred(call: ast.Call) -> bool:
    return any(isinstance(argument, ast.Starred) for argument in call.args)


if __name__ == "__main__":
    main(sys.argv[1])
