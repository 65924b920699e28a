"""Lets code that asks for pinned memory run where there is no accelerator to pin it for.

Pinned memory makes copies to an accelerator faster and changes no value. torch refuses it
where there is none ("pin_memory=True requires a CUDA or other accelerator backend"), and
SGLang's LoRA layers ask for it whatever the device is (0.5.23). So torch's plain factory
functions leave the wish out there, and ``Tensor.pin_memory`` returns the tensor itself. Where
there is an accelerator nothing is left out.
"""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

#: What SGLang's LoRA asks with ``pin_memory=True``, and their nearest relatives.
FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")


class _ThenLeaveOut(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever looks at the module later finds the loader that really loaded it.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        leave_out(module)


def leave_out(torch: Any) -> None:
    """Replaces the factory functions of ``torch`` and ``Tensor.pin_memory``."""
    from torch.jit._builtins import _find_builtin, _register_builtin
    from torch.utils._device import _device_constructors

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("pin_memory") and not torch.accelerator.is_available():
                del kwargs["pin_memory"]
            return make(*args, **kwargs)

        return made

    pinned = torch.Tensor.pin_memory

    @wraps(pinned)
    def pin_memory(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.accelerator.is_available():
            return tensor
        return pinned(tensor, *args, **kwargs)

    # Remembers the functions as they are, so that "with torch.device(...)" still knows them.
    _device_constructors()
    for name in FACTORIES:
        make = getattr(torch, name)
        replaced = unpinned(make)
        replaced.__module__, replaced.__qualname__ = "torch", name
        # torch.jit.script compiles what it does not know for one of torch's own.
        _register_builtin(replaced, _find_builtin(make))
        setattr(torch, name, replaced)
    torch.Tensor.pin_memory = pin_memory


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenLeaveOut(spec.loader)
        return spec


def install() -> None:
    """Called by ``unpinned_memory.pth`` in every Python of the environment."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
