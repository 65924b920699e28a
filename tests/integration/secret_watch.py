"""Looks for secrets where everybody could read them, while something runs and afterwards."""

from __future__ import annotations

import threading
from pathlib import Path

#: A token that nobody else has; handed over as HF_TOKEN.
CANARY = "hf_canary0123456789abcdefghij"


class SecretWatch:
    """Reads the argument lists of all processes until it is stopped.

    The API keys are found out as root can: from the environment that a server was started with.
    """

    def __init__(self) -> None:
        self.environment = {"HF_TOKEN": CANARY}
        self.secrets = {CANARY}
        self._arguments: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    self._arguments.add((process / "cmdline").read_text(errors="replace"))
                    environment = (process / "environ").read_text(errors="replace")
                except OSError:
                    continue
                for variable in environment.split("\0"):
                    name, _, value = variable.partition("=")
                    if name == "SGLANG_API_KEY" and len(value) == 64:
                        self.secrets.add(value)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(5)

    def check(self, *places: str | Path) -> None:
        """Asserts that no secret is in any argument list, text, or file of a folder."""
        self.stop()
        assert len(self.secrets) > 1, "a server's key was seen, or this proves nothing"
        assert self._arguments
        texts = {"an argument list": "\n".join(self._arguments)}
        for number, place in enumerate(places):
            if isinstance(place, str):
                texts[f"output {number}"] = place
                continue
            files = [file for file in place.rglob("*") if file.is_file()]
            assert files, f"{place} holds nothing to look through"
            texts |= {str(file): file.read_text(errors="replace") for file in files}
        for secret in self.secrets:
            found = [where for where, text in texts.items() if secret in text]
            assert found == [], f"a secret of {len(secret)} characters is in {found}"
