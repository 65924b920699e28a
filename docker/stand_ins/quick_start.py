"""Makes the imports of a server's start cheaper, and changes nothing that a server computes.

A start imports SGLang in three processes, 7500 modules each. Some of what happens then serves
nobody (seconds of a process's 8.3, SGLang 0.5.23):

- Python's garbage collector goes through all objects again and again while they become more,
  and nearly all of them are functions and classes that stay until the process ends: 1.9 s. It
  is off while a module of SGLang is being imported; what a large import made is then left out
  of later rounds (``gc.freeze``, as SGLang's own ``/freeze_gc`` does).
- torch's compiler: where ``TORCH_COMPILE_DISABLE`` is set nothing is compiled, yet every
  ``@torch.compile`` imports the compiler: 0.6 s. With ``TORCHDYNAMO_DISABLE`` torch gives the
  function itself back instead.
- SGLang's model files, imported to look one up: 0.8 s. See ``sglang_first_models``.
- transformers reads its 2100 model files to learn what is in them, twice, because it asks its
  own cache for the same folder by two names: 0.2 s. Here both names become one.
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

#: An import that made fewer objects than this leaves the collector's lists as they are: what
#: a running server imports late must not freeze the requests that are there just then.
LARGE_IMPORT = 50_000
MODEL_FOLDERS = "transformers.utils.import_utils"


class _Around(Loader):
    """Has the module loaded by its own loader, with something around that."""

    def __init__(self, loader: Loader, load: Callable[[Loader, ModuleType], None]) -> None:
        self._loader = loader
        self._load = load

    def __getattr__(self, name: str) -> Any:
        # "python -m sglang.launch_server" asks the loader for the module's code.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever looks at the module later finds the loader that really loaded it.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._load(self._loader, module)


def folder_under_one_name(import_utils: Any) -> None:
    """Asks transformers' cache for a folder by its path as text, however it was named."""
    read = getattr(import_utils, "create_import_structure_from_path", None)
    if read is None:
        return

    def create_import_structure_from_path(module_path: Any) -> Any:
        path = Path(module_path)
        return read(str(path.parent if path.is_file() else path))

    import_utils.create_import_structure_from_path = create_import_structure_from_path


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        #: Modules that one of SGLang's imports itself are loaded as ever.
        self._collector_is_off = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        load: Callable[[Loader, ModuleType], None]
        if fullname == MODEL_FOLDERS:
            load = self._load_model_folders
        elif fullname.partition(".")[0] == "sglang" and not self._collector_is_off:
            load = self._load_without_collecting
        else:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Around(spec.loader, load)
        return spec

    def _load_model_folders(self, loader: Loader, module: ModuleType) -> None:
        loader.exec_module(module)
        folder_under_one_name(module)

    def _load_without_collecting(self, loader: Loader, module: ModuleType) -> None:
        if not gc.isenabled():
            loader.exec_module(module)
            return
        self._collector_is_off = True
        gc.disable()
        try:
            loader.exec_module(module)
        finally:
            if gc.get_count()[0] > LARGE_IMPORT:
                gc.freeze()
            gc.enable()
            self._collector_is_off = False


def install() -> None:
    """Called by ``quick_start.pth`` in every Python of the environment."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", "sglang_first_models")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
