"""``kit.json``: what is in a kit, and what it expects of the host that it is unpacked on.

The kit's ``unpack.py`` reads it without this package: a field that is added there needs a new
number of the schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_harness.errors import KitError


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class HarnessBuilt(_Record):
    """The harness in the kit."""

    version: str
    revision: str | None
    """The commit it was built from, with ``+changes`` where files differ from it; ``None`` where
    it was built from an installed package."""


class MadeFor(_Record):
    """The hosts that the kit runs on."""

    python: str
    """Its minor version, such as ``3.12``."""
    torch: str
    """Without the local part: ``2.11.0``."""
    cuda: int | None
    """The major version of torch's CUDA; ``None``: a kit for a rehearsal on a CPU."""
    machine: str
    glibc: str
    """The lowest version that every wheel in the kit runs with, by the wheels' tags."""
    architectures: list[str]
    """GPU generations that the kit has SGLang's kernels for, such as ``sm90``."""


class Payload(_Record):
    """The compressed part."""

    file: str
    sha256: str
    unpacked_bytes: int


class StandInUsed(_Record):
    """A package that is imported and never called, and is replaced by an empty one."""

    name: str
    reason: str


class ReleaseRecord(_Record):
    """One version of SGLang in the kit, with what it needs to serve there."""

    version: str
    kernels: str
    """Such as ``sglang-kernel 0.4.4``."""
    site: str | None
    """The folder of the packages that this release alone uses; ``None``: it has none."""
    server_args: dict[str, str]
    environment: dict[str, str]
    stand_ins: list[StandInUsed]
    caveats: list[str]
    """What every result of this release has to be read with, one line each."""


class PackageRecord(_Record):
    """A wheel in the kit."""

    name: str
    version: str
    sha256: str
    """Of the wheel as the index has it; the kit has a part of its files."""
    site: str


class KitRecord(_Record):
    """``kit.json``. The first release is the primary one: everything in it was made for this
    torch."""

    number: Literal[1] = Field(default=1, alias="schema")
    """Version of the format."""
    name: str
    harness: HarnessBuilt
    made_for: MadeFor
    payload: Payload
    needs: list[str]
    """Normalised names of the packages that are expected on the host."""
    releases: list[ReleaseRecord]
    packages: list[PackageRecord]

    def as_json(self) -> str:
        """As it lies in the kit, with a line feed at its end."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> KitRecord:
        """Reads a ``kit.json``.

        Raises:
            KitError: it cannot be read, or is not one of this version.
        """
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise KitError(f"{file} cannot be read: {error.strerror}.") from None
        except (ValidationError, UnicodeDecodeError) as error:
            raise KitError(f"{file} is not a kit's record: {one_line(error)}.") from None


def one_line(error: ValueError) -> str:
    """The first thing that pydantic found wrong, and where."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
    return str(error).splitlines()[0]
