"""The host that a kit is for."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sglang_harness.errors import KitError
from sglang_harness.kit.describe import normalised
from sglang_harness.kit.record import one_line

#: glibc where a description does not state it: the lowest that SGLang's own wheels run with.
USUAL_GLIBC = "2.34"

Version = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)*[^\s/]*$")]


class Gpu(BaseModel):
    """A GPU of the target."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str | None = None
    capability: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")]
    """CUDA's compute capability, such as ``9.0``."""
    memory_bytes: int | None = None

    @property
    def architecture(self) -> str:
        """Such as ``sm90``."""
        return "sm" + self.capability.replace(".", "")


class Target(BaseModel):
    """What :mod:`sglang_harness.kit.describe` states of a host; the fields are explained there.
    What building does not need may be missing."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    number: Literal[1] = Field(alias="schema")
    python: Annotated[str, StringConstraints(pattern=r"^3\.\d+(\.\d+)?[^\s/]*$")]
    implementation: str = "cpython"
    machine: str = "x86_64"
    glibc: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")] | None = None
    torch: Version | None
    cuda: Version | None
    gpus: tuple[Gpu, ...] = ()
    packages: dict[str, str | None]

    @property
    def python_minor(self) -> str:
        """Such as ``3.12``."""
        return ".".join(self.python.split(".")[:2])

    @property
    def torch_release(self) -> str | None:
        """torch's version without its local part: ``2.11.0``."""
        return None if self.torch is None else self.torch.partition("+")[0]

    @property
    def cuda_major(self) -> int | None:
        return None if self.cuda is None else int(self.cuda.split(".")[0])

    @property
    def architectures(self) -> tuple[str, ...]:
        """The GPUs' generations, each once."""
        return tuple(dict.fromkeys(gpu.architecture for gpu in self.gpus))

    @classmethod
    def read(cls, given: str) -> Target:
        """A shipped target by its name, or a file that ``kit describe`` wrote on the host.

        Raises:
            KitError: there is no such file or name, or the file is not a description.
        """
        file = resources.files(__package__) / "targets" / f"{given}.json"
        if "/" in given or not file.is_file():
            file = Path(given)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise KitError(
                f"No target is named {given!r}, and there is no such file.",
                advice=f"Shipped: {', '.join(shipped())}. For another host run 'sglang-harness kit "
                "describe' there, and give the file that it makes.",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise KitError(f"{given} cannot be read: {error}.") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise KitError(
                f"{given} is not the description of a host: {one_line(error)}.",
                advice="'sglang-harness kit describe' writes one.",
            ) from None

    @classmethod
    def from_options(
        cls, *, python: str, torch: str, cuda: str, gpu: str | None, installed: Path | None
    ) -> Target:
        """A host that is known by what a person says of it.

        Args:
            python: such as ``3.12``.
            torch: such as ``2.11.0``.
            cuda: torch's CUDA: ``13`` or ``13.0``.
            gpu: ``sm90``, or a compute capability: ``9.0``; ``None``: none.
            installed: a file with a line for each package that is there: its name, or
                ``name==version`` as 'pip freeze' writes it; ``None``: nothing but torch.

        Raises:
            KitError: one of them is not what it has to be.
        """
        given: dict[str, Any] = {
            "schema": 1,
            "python": python,
            "torch": torch,
            "cuda": cuda,
            "gpus": [] if gpu is None else [{"capability": capability(gpu)}],
            "packages": {"torch": torch, **({} if installed is None else read_names(installed))},
        }
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise KitError(f"This is no target: {one_line(error)}.") from None

    def on(self, gpu: str | None) -> Target:
        """The same host with another GPU, or with none.

        Raises:
            KitError: ``gpu`` is not a generation.
        """
        gpus = () if gpu is None else (Gpu(capability=capability(gpu)),)
        return self.model_copy(update={"gpus": gpus})


def shipped() -> list[str]:
    """Names of the targets that come with the package."""
    folder = resources.files(__package__) / "targets"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".json"))


def capability(gpu: str) -> str:
    """``9.0`` of ``sm90``, ``sm_90a``, ``9.0``.

    Raises:
        KitError: it is none of these.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)[af]?", gpu.strip().lower())
    if match is None:
        raise KitError(
            f"{gpu!r} is not a GPU generation.",
            advice="Give it as sm90 or as the compute capability 9.0 (of an H100).",
        )
    return f"{match[1]}.{match[2]}"


def read_names(file: Path) -> dict[str, str | None]:
    """Packages by normalised name; the version is ``None`` where a line states none.

    Raises:
        KitError: the file cannot be read, or a line is neither a name nor ``name==version``.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{file} cannot be read: {error}.") from None
    found: dict[str, str | None] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        # 'pip freeze' writes 'name @ place' of what did not come from an index.
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(?:\s*==\s*([^\s;]+)|\s+@\s+\S+)?", line)
        if match is None:
            raise KitError(f"{file}, line {number}: {line!r} is neither a name nor name==version.")
        found[normalised(match[1])] = match[2]
    return found
