"""Lets torchvision's wheel, built for CUDA, be imported beside a CPU build of torch.

torchvision decorates two operators that its compiled library would have defined; beside a
CPU torch that library does not load, and the import fails with "operator torchvision::nms
does not exist". SGLang imports torchvision at start-up (for image models). The operators
are declared here just before ``torchvision._meta_registrations`` is imported; nothing
implements them, so calling one still fails.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODULE = "torchvision._meta_registrations"
OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class _DeclareOperatorsFirst(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        for name, schema in OPERATORS.items():
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", schema)
        self._loader.exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeclareOperatorsFirst(spec.loader)
        return spec


def install() -> None:
    """Called by ``torchvision_operators.pth`` in every Python of the environment."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
