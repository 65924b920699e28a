"""How fast do new weights travel, by each route, and whose time is it?

A Llama of 1.1 GB in float32 is served from a container. The same other weights are pushed by each
route, and beside that

* a plain copy of the same bytes: the checkpoint's files read into memory, once;
* the push as SGLang's own examples do it in the body: one tensor a request, pickled and base64.

For each route: our part (reading, packing, handing over) and the server's (answering, loading).
The sender's peak of memory stands beside them: of the harness where it sends itself (anonymous
and shared pages, above what it held before the push), else of the peer (all resident memory above
what its imports hold). Whoever takes the body of a request takes its time over it, so both routes
in the body are also measured against a receiver that throws the bytes away.
Prints a table and writes ``bench/results/``.

    python bench/weights.py [--rounds 3] [--layers 6]
"""

from __future__ import annotations

import argparse
import base64
import json
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import requests
from rich.console import Console
from rich.table import Table

from sglang_harness import Server, ServerSpec, checkpoint
from sglang_harness._base import host
from sglang_harness.checkpoint.made.perturb import perturbed
from sglang_harness.checkpoint.reading import open_checkpoint
from sglang_harness.client import Client, RequestsTransport
from sglang_harness.peer import Peer
from sglang_harness.weights import routes
from sglang_harness.weights.pusher import BUCKET
from sglang_harness.weights.routes.buckets import plan
from sglang_harness.weights.routes.in_body import InBody
from sglang_harness.weights.target import Target

RESULTS = Path(__file__).parent / "results"
GB = 1e9


def make_model(folder: Path, layers: int) -> None:
    """A wide random Llama with the tiny model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = checkpoint.locate("tiny", print)
    assert tiny is not None
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = LlamaConfig.from_pretrained(tiny)
    config.update(
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "initializer_range": 0.02,
        }
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)


def held() -> int:
    """Bytes of anonymous and shared memory that this process has now."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class Peak:
    """The most that this process held while this was open, above what it held at first."""

    def __init__(self) -> None:
        self._first = self._most = held()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self._most = max(self._most, held())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def above(self) -> int:
        return self._most - self._first


#: Routes that send the bytes in the body of a request.
IN_BODY = tuple(n for n in routes.names() if issubclass(routes.kind(n), InBody))


def plain_copy(folder: Path) -> float:
    """Seconds to read the files into fresh memory, once."""
    began = time.monotonic()
    for file in sorted(folder.glob("*.safetensors")):
        room = bytearray(file.stat().st_size)
        with file.open("rb", buffering=0) as source:
            view, done = memoryview(room), 0
            while done < len(room):
                done += source.readinto(view[done:])
    return time.monotonic() - began


def one_by_one(server: Server, folder: Path) -> float:
    """Seconds to push one tensor a request, the way SGLang's examples do it."""
    headers = {"Authorization": f"Bearer {server.running.api_key}"}
    post = requests.Session()
    post.headers.update(headers)

    def send(path: str, body: dict[str, Any]) -> None:
        answer = post.post(server.address + path, json=body, timeout=600)
        answer.raise_for_status()

    server.client.flush_cache()
    began = time.monotonic()
    if bracket := server.client.has_route("POST", "/begin_weight_update"):
        send("/begin_weight_update", {"selector": "all"})
    for name, tensor in open_checkpoint(folder).read():
        entry = base64.b64encode(pickle.dumps([(name, tensor)])).decode()
        send(
            "/update_weights_from_tensor",
            {"serialized_named_tensors": [entry], "flush_cache": False},
        )
    if bracket:
        send("/end_weight_update", {})
    return time.monotonic() - began


#: Takes any request and answers success, as fast as Python takes bytes from a socket.
NOWHERE = """
import socket
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
connection, _ = listening.accept()
room = bytearray(1 << 20)
while True:
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        piece = connection.recv(1 << 16)
        if not piece:
            raise SystemExit
        head += piece
    head, _, body = head.partition(b"\\r\\n\\r\\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\\r\\n")
                  if line.lower().startswith(b"content-length"))
    left = length - len(body)
    while left:
        left -= connection.recv_into(room, min(left, len(room)))
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 29\\r\\n\\r\\n"
                       b'{"success":true,"message":""}')
"""


def to_nowhere(folder: Path, name: str) -> float:
    """Our seconds for a push by a route in the body, to who throws the bytes away."""
    source = open_checkpoint(folder)
    with subprocess.Popen([sys.executable, "-c", NOWHERE], stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout is not None
        client = Client(RequestsTransport(f"http://127.0.0.1:{int(receiver.stdout.readline())}"))
        job = routes.Job(
            target=cast(Target, SimpleNamespace(client=client)),
            source=source,
            buckets=plan(source.tensors.values(), BUCKET),
            ranks=1,
            version="nowhere",
            timeout=600,
            abort_all_requests=False,
            any_peer=lambda: cast(Peer, None),
        )
        route = routes.make(name)
        route.prepare(job)
        route.open(job)
        sent = [route.send(bucket) for bucket in job.buckets]
        route.close()
        client.close()
    return sum(each.read + each.pack + each.hand_over for each in sent)


def measure(server: Server, folders: list[Path], rounds: int) -> list[dict[str, Any]]:
    size = sum(f.stat().st_size for f in folders[0].glob("*.safetensors"))
    rows = []
    names = [n for n in routes.names() if routes.kind(n).needs.lacking(server) is None]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    copies, examples = [], []
    for number in range(rounds + 1):  # the first only warms caches and peers
        for turn, name in enumerate(names):
            folder = folders[(number * len(names) + turn) % 2]
            copy = plain_copy(folder)
            with Peak() as peak:
                push = server.weights.push(folder, route=name, logprobs=False, timeout=600)
            assert push.checksums.says == "agrees", push
            if number:
                copies.append(copy)
                samples[name].append(
                    {
                        "ours": push.seconds_ours,
                        "staged": push.seconds_staged,
                        "server": push.seconds_server,
                        "all": push.seconds,
                        "copy": copy,
                        "nowhere": to_nowhere(folder, name) if name in IN_BODY else None,
                        "peak_bytes": peak.above
                        if push.peer_peak_bytes is None
                        else push.peer_peak_bytes,
                    }
                )
        example = one_by_one(server, folders[number % 2])
        if number:
            examples.append(example)
    for name, taken in samples.items():
        median = {
            key: statistics.median(s[key] for s in taken) if taken[0][key] is not None else None
            for key in taken[0]
        }
        rows.append(
            {
                "route": name,
                "samples": taken,
                "median": median,
                "gigabytes_per_second": size / GB / median["all"],
                "ours_times_a_copy": statistics.median(s["ours"] / s["copy"] for s in taken),
                "nowhere_times_a_copy": statistics.median(s["nowhere"] / s["copy"] for s in taken)
                if name in IN_BODY
                else None,
            }
        )
    rows.append({"route": "SGLang's examples, a tensor a request", "seconds": examples,
                 "gigabytes_per_second": size / GB / statistics.median(examples)})  # fmt: skip
    rows.append({"route": "plain copy", "seconds": copies,
                 "gigabytes_per_second": size / GB / statistics.median(copies)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sglang-harness-bench-") as work:
        first, other = Path(work) / "first", Path(work) / "other"
        make_model(first, options.layers)
        perturbed(first, other, seed=1)
        # Both the reader's and the server's folder: for every user.
        Path(work).chmod(0o755)
        infos = open_checkpoint(first).tensors.values()
        size, largest = sum(i.nbytes for i in infos), max(i.nbytes for i in infos)
        spec = ServerSpec(model=str(first), shm_size="4g")
        with Server.start(spec, say=print) as server:
            rows = measure(server, [other, first], options.rounds)
    show(rows, size, largest, options.rounds)


def show(rows: list[dict[str, Any]], size: int, largest: int, rounds: int) -> None:
    machine = host.describe()
    allowed = 2 * largest + BUCKET
    table = Table(title=f"{size / GB:.2f} GB, {rounds} rounds, {machine['processor']}")
    columns = (
        "route",
        "GB/s",
        "ours s",
        "server s",
        "ours / copy",
        "to nowhere / copy",
        "peak MB",
        f"of {allowed / 1e6:.0f}",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "route" else "right")
    for row in rows:
        cells = [row["route"], f"{row['gigabytes_per_second']:.3f}"]
        if median := row.get("median"):
            cells += [
                f"{median['ours']:.2f}",
                f"{median['server']:.2f}",
                f"{row['ours_times_a_copy']:.2f}",
                f"{nowhere:.2f}" if (nowhere := row["nowhere_times_a_copy"]) else "",
            ]
            if (most := median["peak_bytes"]) is not None:
                cells += [f"{most / 1e6:.0f}", f"{most / allowed:.2f}"]
        table.add_row(*cells)
    Console(width=max(Console().width, 110)).print(table)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"weights-{platform.machine()}-{machine['cpus']}cpu.json"
    data = {
        "date": date.today().isoformat(),
        "rounds": rounds,
        "machine": machine,
        "bytes": size,
        "largest_tensor_bytes": largest,
        "bucket_bytes": BUCKET,
        "rows": rows,
    }
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
