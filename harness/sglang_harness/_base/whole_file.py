"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes ``text`` as UTF-8 to ``path``, and makes its folder where that is missing.

    A file that was there is replaced in one step, once the new one is complete: a reader, or a
    run that is killed halfway, finds the old file or the new one. Half characters (lone
    surrogates) become ``?``.

    Args:
        mode: permissions of the new file, less the umask.

    Raises:
        OSError: it cannot be written; a file that was there is unchanged.
    """
    data = text.encode("utf-8", "replace")
    path = path.resolve()  # A link stays a link: what it points to is replaced.
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # A pipe or a terminal, such as /dev/stdout.
        return
    # In the same folder, because only a rename within a file system is one step.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
