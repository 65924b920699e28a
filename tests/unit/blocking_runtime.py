"""A runtime whose first start does not come to an end by itself, for processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_harness._base import assets
from sglang_harness._base.temporary import remove, temporary_folder
from sglang_harness.runtime import images

#: An image build that takes an hour and says nothing meanwhile; its processes are on record.
BUILD = """
echo $$ > "$STAGE/build"
sleep 3600 &
echo $! >> "$STAGE/build"
wait
"""


class BlockingRuntime:
    """Blocks in :meth:`prepare`, and records in the folder ``STAGE`` how far it came.

    Args:
        building: blocks in the build of an image, else in the start of a server.
    """

    name = "blocking"
    starts = True
    decides_gpus = False
    decides_model = False
    caveats = ()

    def __init__(self, *, building: bool) -> None:
        self.building = building

    @contextmanager
    def keeping_parents(self) -> Iterator[None]:
        yield

    def prepare(self, *_: Any, **__: Any) -> Any:
        stage = Path(os.environ["STAGE"])
        folder = temporary_folder("exchange")
        try:
            (stage / "starting").touch()
            if self.building:
                (stage / "docker").mkdir()
                (stage / "docker" / "build.sh").write_text(BUILD)
                assets.root = lambda: stage
                images.build_cpu_image(None, lambda _: None)
            time.sleep(3600)
        finally:
            remove(folder)
            (stage / "ended").touch()
