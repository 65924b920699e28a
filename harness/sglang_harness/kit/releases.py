"""What a kit needs to know of each version of SGLang: reads ``releases.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml
from packaging.version import Version
from pydantic import BaseModel, ConfigDict

from sglang_harness.errors import KitError
from sglang_harness.kit.describe import normalised
from sglang_harness.kit.target import Target


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StandIn(_Part):
    """An empty package in place of one that is imported and never called."""

    name: str
    folder: str
    """In ``stand_ins/``; the name that is imported."""
    reason: str
    environment: dict[str, str] = {}
    """What a server needs where the stand-in is in use."""


class _Native(_Part):
    torch: str
    kernels: str


class _Guest(_Part):
    version: str
    torch: str
    kernels: str
    environment: dict[str, str]
    caveats: list[str]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Release:
    """One version of SGLang on one torch.

    Attributes:
        kernels: the version of ``sglang-kernel``, built for that torch.
        guest: SGLang was made for another torch; ``caveats`` say what follows.
        files_left_out: more of SGLang's own files that do not go in, and why.
    """

    version: str
    torch: str
    kernels: str
    guest: bool
    environment: dict[str, str]
    caveats: tuple[str, ...]
    files_left_out: dict[str, str]


class Catalogue(_Part):
    """All of ``releases.yaml``; its comments say what each part is."""

    releases: dict[str, _Native]
    guests: list[_Guest]
    cuda: int
    server_args: dict[str, str]
    stand_ins: list[StandIn]
    requirements_left_out: dict[str, str]
    requirements_added: dict[str, str]
    files_left_out: dict[str, dict[str, str]]
    kernel_libraries: dict[str, list[str]]

    def all(self) -> list[Release]:
        """Every version on every torch, natives before guests."""
        natives = [
            Release(version, found.torch, found.kernels, False, {}, (), {})
            for version, found in self.releases.items()
        ]
        guests = [
            Release(
                g.version, g.torch, g.kernels, True, g.environment, tuple(g.caveats), g.left_out
            )
            for g in self.guests
        ]
        return [*natives, *guests]

    def choose(self, torch: str, versions: list[str]) -> list[Release]:
        """The releases of a kit for ``torch`` (without its local part), the primary one first.

        Args:
            versions: of SGLang; empty: the newest one that was made for this torch, and every
                guest on it.

        Raises:
            KitError: no version runs on this torch, or one of ``versions`` does not, or all of
                them are guests.
        """
        fitting = [release for release in self.all() if release.torch == torch]
        if not any(not release.guest for release in fitting):
            known = ", ".join(sorted({r.torch for r in self.all()}, key=Version))
            raise KitError(
                f"No SGLang that a kit can have was made for torch {torch}.",
                advice=f"There are releases for torch {known}.",
            )
        if not versions:
            newest = max((r for r in fitting if not r.guest), key=lambda r: Version(r.version))
            return [newest, *(r for r in fitting if r.guest)]
        by_version = {release.version: release for release in reversed(fitting)}
        for version in versions:
            if version not in by_version:
                there = ", ".join(sorted(by_version, key=Version))
                raise KitError(
                    f"A kit cannot have SGLang {version} on torch {torch}.",
                    advice=f"On this torch there are: {there}.",
                )
        chosen = [by_version[version] for version in dict.fromkeys(versions)]
        chosen.sort(key=lambda release: release.guest)
        if chosen[0].guest:
            raise KitError(
                f"SGLang {chosen[0].version} is a guest on torch {torch}, and a kit needs one that "
                "was made for it.",
                advice=f"Add one of: {', '.join(r.version for r in fitting if not r.guest)}.",
            )
        return chosen

    def kernel_files(self, architectures: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Which of sgl_kernel's libraries do not go in, as patterns, and all GPU generations that
        those which do go in are for.

        Raises:
            KitError: no library is for one of ``architectures``.
        """
        served = {a for serves in self.kernel_libraries.values() for a in serves}
        for wanted in architectures:
            if wanted not in served:
                raise KitError(
                    f"SGLang's kernel package has nothing for the GPU generation {wanted}.",
                    advice=f"It has: {', '.join(sorted(served, key=_number))}.",
                )
        left_out, kept = [], set()
        for pattern, serves in self.kernel_libraries.items():
            if set(serves) & set(architectures):
                kept.update(serves)
            else:
                left_out.append(pattern)
        return left_out, sorted(kept, key=_number)

    def stand_ins_for(self, target: Target) -> list[StandIn]:
        """Those whose package is not on the target."""
        return [s for s in self.stand_ins if normalised(s.name) not in target.packages]


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm"))


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """What comes with this package."""
    text = (resources.files(__package__) / "releases.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return Catalogue.model_validate(data)
