"""Keeps secrets out of everything that is written down.

SGLang prints its API key in its log and answers it in ``/server_info`` (0.5.23), so text
from a server is cleaned before it reaches a log, a verdict or a terminal.
"""

from __future__ import annotations

import json
import os
import re
import secrets as stdlib_secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

REDACTED = "<redacted>"

#: Variables that hold secrets; their values never leave the process in the clear.
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY")


#: Names of variables whose value is a secret even where it is too short to be searched for.
#: ``TOKENIZERS_PARALLELISM`` is not one.
SECRET_VARIABLE = r"(?i)(TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL)S?$|SECRET|PASSWORD|CREDENTIAL"  # noqa: S105


def new_api_key() -> str:
    """A fresh key for one server: 64 hexadecimal digits, 256 bits.

    No other characters: SGLang takes it as an argument, and one that begins with a dash is
    taken for a flag.
    """
    return stdlib_secrets.token_hex(32)


def named_as_secrets(environment: Mapping[str, str]) -> list[str]:
    """The values of variables whose names say that they are secret."""
    telling = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
    return [value for name, value in environment.items() if telling.search(name)]


def passed_through(names: Iterable[str]) -> list[str]:
    """The values of variables that a server gets from this process's own environment.

    That is the way in which secrets are passed, so every value counts as one, whatever its name;
    except paths that exist here, which say nothing and which a log cannot do without.
    """
    values = (os.environ.get(name, "") for name in names)
    return [v for v in values if v and not (v.startswith("/") and Path(v).exists())]


class Redactor:
    """Replaces known secrets in text and in JSON-like data."""

    def __init__(self, *known: str) -> None:
        values = {*known, *(os.environ.get(name, "") for name in SECRET_VARIABLES)}
        # As they may be written: without blanks around them, in JSON or Python, in a URL.
        values |= {value.strip() for value in values}
        values |= {w for v in values for w in (json.dumps(v)[1:-1], repr(v)[1:-1], quote(v, ""))}
        # A short value would black out ordinary words.
        self._values = sorted((v for v in values if len(v) >= 8), key=len, reverse=True)

    def text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, REDACTED)
        return text

    def data(self, data: Any) -> Any:
        """The same data with secrets replaced in every string, at any depth."""
        if isinstance(data, str):
            return self.text(data)
        if isinstance(data, dict):
            return {self.text(str(key)): self.data(value) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return [self.data(item) for item in data]
        return data
