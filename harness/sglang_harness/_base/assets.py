"""Finds what is not Python: ``docker/`` and ``compose.yaml``, in a checkout or in the wheel,
and the versions pinned there."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def root() -> Path:
    """The folder that holds ``docker/`` and ``compose.yaml``.

    In the wheel it lies inside the package, in a checkout at the top of the repository.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "shipped", package.parent.parent):
        if (candidate / "docker" / "versions.env").is_file():
            return candidate
    raise FileNotFoundError(f"docker/versions.env is neither beside nor above {package}")


@lru_cache(maxsize=1)
def pins() -> dict[str, str]:
    """What ``docker/versions.env`` pins, by name (``SGLANG_VERSION``, ``GPU_IMAGE``, ...)."""
    lines = (root() / "docker" / "versions.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
