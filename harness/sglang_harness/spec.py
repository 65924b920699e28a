"""What to run. Validated once, here; everything after this trusts it."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sglang_harness._base.secrets import (
    REDACTED,
    SECRET_VARIABLE,
    Redactor,
    named_as_secrets,
    passed_through,
)
from sglang_harness.errors import SpecError

Argument = bool | int | float | str | list[str]

#: Flags that the harness sets itself: given twice they would contradict each other.
OWN_ARGUMENTS = {"host", "port", "model-path", "model", "api-key", "admin-api-key", "device"}

#: Flags whose value is a secret. ``tokenizer-path`` and ``max-total-tokens`` are none of them.
SECRET_FLAG = r"(^|-)(key|token|secret|password|credentials?)$"  # noqa: S105

#: Flags a CPU server needs (seen to serve with SGLang 0.5.20 to 0.5.23). ``sleep-on-idle``
#: keeps an idle scheduler from burning a whole core.
CPU_ARGUMENTS: dict[str, Argument] = {
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "dtype": "float32",
    "mem-fraction-static": 0.1,
    "max-total-tokens": 4096,
    "disable-overlap-schedule": True,
    "sleep-on-idle": True,
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Seconds = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]


class Limits(_Strict):
    """Time-outs in seconds. Large models load for more than ten minutes: raise ``start``."""

    start: Seconds = 900.0
    """From creating the container to the first real generation."""
    check: Seconds = 180.0
    """One check, from first request to last."""
    run: Seconds = 5400.0
    """Everything, from the first start to the verdict."""
    request: Seconds = 120.0
    """One whole answer, or the time between two events of a stream."""
    stop: Seconds = 30.0
    """From SIGTERM to SIGKILL. SGLang allows its scheduler 15 s to end."""
    gpus: Seconds = 600.0
    """Waiting for a GPU that another run of this machine has."""


class ServerSpec(_Strict):
    """One SGLang server: what it runs from, what it serves, on what, and within which limits.

    Every field can be set from Python and from a YAML file (``ServerSpec.from_yaml``), the
    common ones from the command line too. Invalid or contradictory values raise :class:`SpecError`.
    """

    image: str | None = None
    """Image name, tag or digest. ``None``: the pinned image for the device."""
    sglang_version: str | None = None
    """Which version to build (CPU) or pull (GPU) where ``image`` is ``None``; ``None``: the
    pinned one."""
    pull: Literal["missing", "always", "never"] = "missing"
    model: str = "smollm2"
    """``smollm2`` (SmolLM2-135M-Instruct), ``tiny`` or ``tiny:SEED`` (a seeded random Llama,
    0.5 M parameters), ``tiny-qwen2``, ``tiny-qwen3``, ``tiny-qwen3-moe`` or ``tiny-mixtral``
    (the same for other architectures), ``random-1.2b`` or ``random-3b`` (a seeded random Llama in
    bfloat16), a folder with a checkpoint, or a name on the hub."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    gpus: str = "all"
    """``all``, or indices or UUIDs joined by commas, as ``docker run --gpus device=`` takes;
    ``0:1`` is the second MIG instance of the first GPU. Never more than
    ``CUDA_VISIBLE_DEVICES`` leaves."""
    server_args: dict[str, Argument] = Field(default_factory=dict)
    """SGLang's own flags without the dashes; ``true`` for a flag without a value, ``false``
    to take one away that the harness would set."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for the server. Secrets belong in the caller's environment: see
    ``pass_environment``."""
    pass_environment: list[str] = Field(default_factory=lambda: ["HF_TOKEN"])
    """Names of variables that are handed from the caller's environment to the server."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """The port on the host; ``None``: a free one."""
    publish_on: str = "127.0.0.1"
    """The host address the port is published on. Loopback, unless you know better."""
    shm_size: str = "1g"
    """The server's ``/dev/shm``. NCCL with several GPUs wants more (SGLang: ``32g``)."""
    memory: str | None = None
    """Host memory limit of the container, such as ``16g``; ``None``: none."""
    hub_cache: Path | None = None
    """A model hub cache on the host, mounted for the server; ``None``: hub models are
    downloaded inside the container."""
    model_mount: Literal["auto", "bind", "volume"] = "auto"
    """How the model reaches the server; ``volume`` for an engine on another machine."""
    start: Literal["auto", "cold", "warm"] = "auto"
    """``cold``: as the image starts it. ``warm``: forked from a parent that has imported SGLang
    already, which takes some 2 s in place of 10; refused where that cannot be. ``auto``: warm
    where a parent is there or more servers are to come, else cold, and the reason is told."""
    limits: Limits = Field(default_factory=Limits)

    def written(self) -> dict[str, Any]:
        """The fields as they may be written down: values whose names say that they are secret are
        masked, however short they are."""
        told = self.model_dump(mode="json")
        for field, secret in (("environment", SECRET_VARIABLE), ("server_args", SECRET_FLAG)):
            told[field] = {
                name: REDACTED if re.search(secret, name) else value
                for name, value in told[field].items()
            }
        return told

    def redactor(self, *api_keys: str | None) -> Redactor:
        """Removes what the server gets and nothing may write down: its key, every value of
        ``pass_environment``, and variables and flags whose names say that they are secret."""
        flags = [v for n, v in self.server_args.items() if re.search(SECRET_FLAG, n)]
        return Redactor(
            *(key or "" for key in api_keys),
            *named_as_secrets(self.environment),
            *passed_through(self.pass_environment),
            *(str(each) for v in flags for each in (v if isinstance(v, list) else [v])),
        )

    @field_validator("server_args", mode="before")
    @classmethod
    def _names_without_dashes(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        named = {str(k).lstrip("-").replace("_", "-"): v for k, v in value.items()}
        if bad := [name for name in named if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)]:
            raise ValueError(f"{bad[0]!r} is not the name of a flag")
        if own := sorted(OWN_ARGUMENTS & named.keys()):
            raise ValueError(f"{', '.join(own)}: set by the harness; use the field of the spec")
        return named

    @field_validator("shm_size", "memory")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+[bkmgBKMG]?", value):
            raise ValueError(f"{value!r} is not a size such as 512m or 16g")
        return value

    @field_validator("publish_on")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        # Docker takes an empty one for every interface.
        ipaddress.ip_address(value)
        return value

    @field_validator("gpus")
    @classmethod
    def _names_gpus(cls, value: str) -> str:
        if not all(re.fullmatch(r"\d+:\d+|\w[\w-]*", part.strip()) for part in value.split(",")):
            raise ValueError("is neither 'all' nor indices or UUIDs joined by commas")
        return value

    @field_validator("sglang_version")
    @classmethod
    def _is_a_version(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(\.\w+)+", value):
            raise ValueError(f"{value!r} is not a version such as 0.5.23")
        return value

    @field_validator("image", "model")
    @classmethod
    def _is_not_blank(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or value != value.strip()):
            raise ValueError("is blank, or has blanks around it")
        return value

    @model_validator(mode="after")
    def _one_way_to_name_an_image(self) -> ServerSpec:
        if self.image is not None and self.sglang_version is not None:
            raise ValueError("image and sglang_version contradict each other: give one")
        return self

    @classmethod
    def make(cls, /, **fields: Any) -> ServerSpec:
        """Like the constructor, with :class:`SpecError` in one line instead of pydantic's."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise SpecError(
                _in_one_line(error), advice="See docs/spec.md for the fields."
            ) from None

    @classmethod
    def from_yaml(cls, path: Path, **overrides: Any) -> ServerSpec:
        """Reads a YAML mapping of fields; ``overrides`` win over the file.

        Raises:
            SpecError: the file cannot be read, is not a YAML mapping, or has a bad field.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise SpecError(f"{path}: cannot be read: {reason}.") from None
        try:
            fields = yaml.safe_load(text)
        except (ValueError, RecursionError) as error:  # such as a date that there is not
            raise SpecError(f"{path}: not YAML that can be read: {_one_line(error)}.") from None
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            line = f" line {where.line + 1}," if where else ""
            problem = getattr(error, "problem", None) or "not YAML"
            raise SpecError(f"{path}:{line} {_one_line(problem)}.", advice="Correct it.") from None
        if fields is None:
            fields = {}
        if not isinstance(fields, dict):
            raise SpecError(
                f"{path}: holds {type(fields).__name__}, expected a mapping of fields.",
                advice="See docs/spec.md for the fields.",
            )
        written, given = fields.get("server_args"), overrides.pop("server_args", {})
        if written is None:
            fields["server_args"] = given
        elif isinstance(written, dict):
            fields["server_args"] = {**written, **given}
        try:
            return cls.make(**{str(k): v for k, v in fields.items()} | overrides)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from None

    def arguments(self, device: Literal["cpu", "gpu"]) -> dict[str, Argument]:
        """The flags for ``device``: the harness's own, then the spec's, which win."""
        defaults = CPU_ARGUMENTS if device == "cpu" else {}
        merged = {**defaults, **self.server_args}
        return {name: value for name, value in merged.items() if value is not False}


def from_options(
    file: Path | None, limits: dict[str, float | None], server_args: list[str] | None, **given: Any
) -> ServerSpec:
    """The spec that a file and options make together; options win.

    Args:
        limits: fields of :class:`Limits`; ``None``: not given.
        server_args: each ``name=value`` or ``name``; given again, a flag takes several values.

    Raises:
        SpecError: the file cannot be read, or a field is invalid or contradicts another.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    if server_args:
        arguments: dict[str, Any] = {}
        for name, value in (_server_arg(text) for text in server_args):
            before = arguments.get(name)
            several = [*(before if isinstance(before, list) else [before]), value]
            arguments[name] = value if before is None else [str(each) for each in several]
        fields["server_args"] = arguments
    wanted = {name: value for name, value in limits.items() if value is not None}
    spec = ServerSpec.from_yaml(file, **fields) if file else ServerSpec.make(**fields)
    if wanted:
        merged = {**spec.limits.model_dump(exclude_unset=True), **wanted}
        spec = ServerSpec.make(**{**spec.model_dump(exclude_unset=True), "limits": merged})
    return spec


def _server_arg(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.strip("-"):
        raise SpecError(f"--server-arg {text!r} names no flag.", advice="Write name=value or name.")
    if not equals:
        return name, True
    return name, {"true": True, "false": False}.get(value.lower(), value)


def command_line(arguments: dict[str, Argument]) -> list[str]:
    """SGLang's command line for ``arguments``, in their order."""
    words: list[str] = []
    for name, value in arguments.items():
        words.append(f"--{name}")
        if isinstance(value, list):
            words += value
        elif value is not True:
            words.append(str(value))
    return words


def _in_one_line(error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_url=False, include_context=False):
        where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("union"))
        message = problem["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return _one_line("; ".join(dict.fromkeys(parts))) + "."


def _one_line(words: object) -> str:
    return " ".join(str(words).split())
