"""CUDA IPC between two processes that are not related, as weights are pushed."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from sglang_harness._base import bounded
from sglang_harness.gpu_check import probes
from sglang_harness.gpu_check.part import Context, Part


def run(context: Context) -> dict[str, Any]:
    """A tensor on the GPU is handed to a process that is no child of its owner."""
    context.torch()
    with tempfile.TemporaryDirectory(dir=context.settings.models) as folder:
        payload, done = Path(folder) / "payload", Path(folder) / "done"
        lives = max(5.0, context.left() - 3.0)
        sender = subprocess.Popen(
            probes.command("ipc", "send", str(payload), str(done), f"{lives:.0f}"),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # A line that never comes must not be waited for without end.
        watch = threading.Timer(lives, bounded.end, [sender])
        watch.start()
        try:
            assert sender.stdout is not None
            line = sender.stdout.readline()
            assert line, f"the sender {bounded.ending(sender.wait(10))} before it had sent anything"
            sent = probes.read(line, "the sender")
            context.put("sent", sent)
            received = probes.run(
                "ipc", "receive", str(payload), within=max(5.0, context.left() - 3.0)
            )
            context.put("received", received)
        finally:
            done.touch()
            watch.cancel()
            if _waits(sender):
                bounded.end(sender)
    assert sender.returncode == 0, f"the sender {bounded.ending(sender.returncode)}"
    assert received["sums"] == sent["sums"], f"sent {sent['sums']}, received {received['sums']}"
    # A handle is no copy: what the receiver adds is its context, and no second tensor.
    assert received["added"] < sent["bytes"], (
        f"{received['added']} bytes more are in use for a payload of {sent['bytes']}: the "
        "receiver holds a copy, expected handles alone"
    )
    megabytes = sent["bytes"] / 1e6
    context.headline(f"{megabytes:.0f} MB opened in {received['open_seconds'] * 1000:.0f} ms")
    context.note(
        "weights",
        "CUDA IPC, opening handles",
        f"{received['open_seconds'] * 1000:.0f} ms for {megabytes:.0f} MB",
    )
    return {}


def _waits(process: subprocess.Popen[str]) -> bool:
    """Whether it is still there after it had time to end by itself."""
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        return True
    return False


PART = Part(
    "ipc",
    "Does a tensor arrive by CUDA IPC in a process that is not related?",
    60.0,
    run,
    needs=frozenset({"cuda"}),
    group="driver",
)
