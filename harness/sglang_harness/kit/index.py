"""pip's own settings on this machine, and the same for uv: which index, which certificates.

pip's are honoured wherever they are (``pip.conf``, ``PIP_*``), and everything that resolves or
fetches for a kit goes by them. Addresses may hold a password: they are handed on as environment
variables, never as words on a command line, and no message has them.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from sglang_harness._base import bounded
from sglang_harness.errors import KitError

#: Seconds that pip has to print its settings in.
WITHIN = 60.0


def pip_settings() -> dict[str, str]:
    """By name without the section, such as ``index-url``. What is set for 'pip download' counts
    more than what is set for all of pip, and a variable more than a file.

    Raises:
        KitError: this Python has no pip, or it does not answer.
    """
    words = [sys.executable, "-m", "pip", "config", "list"]
    try:
        ended = bounded.run(words, within=WITHIN)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KitError(f"pip does not tell its settings: {error}.") from None
    if ended.code != 0:
        raise KitError(
            f"{sys.executable} has no pip that works: {' '.join(ended.errors[-1:])}",
            advice="A kit's wheels are fetched by pip: install it with 'python -m ensurepip'.",
        )
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in ended.output:
        key, equals, value = line.partition("=")
        section, dot, name = key.rpartition(".")
        if equals and dot and section in found:
            found[section][name] = str(ast.literal_eval(value))
    return found["global"] | found["download"] | found[":env:"]


def uv_environment(settings: dict[str, str]) -> dict[str, str]:
    """The environment that makes uv look where pip does, and like pip: the best version of all
    indexes, not the first index that has any."""
    said = {
        "UV_NO_CONFIG": "1",
        "UV_NO_PROGRESS": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }

    def several(name: str) -> list[str]:
        return settings.get(name, "").split()

    if index := settings.get("index-url"):
        said["UV_DEFAULT_INDEX"] = index
    if more := several("extra-index-url"):
        said["UV_INDEX"] = " ".join(more)
    if links := several("find-links"):
        said["UV_FIND_LINKS"] = ",".join(links)
    if hosts := several("trusted-host"):
        said["UV_INSECURE_HOST"] = " ".join(hosts)
    if certificates := settings.get("cert"):
        said["SSL_CERT_FILE"] = certificates
    else:
        said["UV_SYSTEM_CERTS"] = "1"
    if own := settings.get("client-cert"):
        said["SSL_CLIENT_CERT"] = own
    if proxy := settings.get("proxy"):
        said |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy}
    if seconds := settings.get("timeout") or settings.get("default-timeout"):
        said["UV_HTTP_TIMEOUT"] = seconds
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    if cache := os.environ.get("UV_CACHE_DIR"):
        said["UV_CACHE_DIR"] = cache
    return kept | said


def uv_words(settings: dict[str, str]) -> list[str]:
    """What uv takes as words only."""
    words = ["--no-index"] if settings.get("no-index", "").lower() in ("1", "true", "yes") else []
    for file in settings.get("constraint", "").split():
        if Path(file).is_file():
            words += ["--constraints", file]
    return words
