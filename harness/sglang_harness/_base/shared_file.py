"""A small file that several users of a machine write, in a folder that all of them may write to.

Such a folder has the sticky bit, so that a user cannot remove or replace another user's file. The
next user therefore writes a file in place, and empties it where it cannot be removed.
"""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Writes all of ``path``, which every user may write to afterwards. A reader may see a part of
    it meanwhile.

    Raises:
        OSError: it cannot be written, or is a link.
    """
    data = text.encode()
    descriptor = opened(path)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def clear(path: Path) -> None:
    """Removes ``path``, or empties it where it is another user's. Nothing where it is gone.

    Raises:
        OSError: neither can be done.
    """
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        write(path, "")


def opened(path: Path) -> int:
    """A descriptor of ``path`` to write with; made where it is missing.

    Raises:
        OSError: it cannot be opened, or is a link.
    """
    # Never O_CREAT for a file that is there: where fs.protected_regular is set, the kernel refuses
    # that for other users' files in a folder with the sticky bit.
    for _ in range(100):
        try:
            return os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            pass
        try:
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            continue  # another process was faster
        os.fchmod(made, 0o666)
        return made
    raise OSError(f"{path} comes and goes")
