"""How fast are the checksums computed that a server must state once weights have arrived?

* a GPU's hash of bytes in memory, by 1 to N threads, beside the plain sha256 of the same bytes
  (which is what a server on a CPU states, and is computed by one thread a parameter);
* the checksums of a whole checkpoint out of the page cache, for a server on a GPU and on a CPU:
  reading, fusing and hashing together.

Best of the rounds: what else runs on the machine takes its share of the others. N is the number of
threads that the harness would use here: the cores of this process, at most 16. Writes
``bench/results/``.

    python bench/checksums.py [--mib 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from sglang_harness._base import host
from sglang_harness.checkpoint.reading import Checkpoint, open_checkpoint
from sglang_harness.weights.proof.checksums import ServedLayout, expected_checksums
from sglang_harness.weights.proof.tensor_hash import checksum, threads_here

RESULTS = Path(__file__).parent / "results"
GB = 1e9

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "dtype": "bfloat16",
}
DEVICES: tuple[Literal["gpu", "cpu"], ...] = ("gpu", "cpu")


def make_checkpoint(folder: Path, mib: int) -> Checkpoint:
    """A Llama of about ``mib`` in bfloat16, of random bits that are numbers."""
    import torch
    from safetensors.torch import save_file

    chance = torch.Generator().manual_seed(0)
    wide, inner, words = 1024, 2816, 32000

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, generator=chance).bfloat16()

    tensors = {"model.embed_tokens.weight": drawn(words, wide)}
    layer = 0
    while sum(t.nbytes for t in tensors.values()) < mib << 20:
        before = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (wide, wide),
            "self_attn.k_proj": (wide // 4, wide),
            "self_attn.v_proj": (wide // 4, wide),
            "self_attn.o_proj": (wide, wide),
            "mlp.gate_proj": (inner, wide),
            "mlp.up_proj": (inner, wide),
            "mlp.down_proj": (wide, inner),
        }
        tensors |= {f"{before}{n}.weight": drawn(*shape) for n, shape in shapes.items()}
        tensors[f"{before}input_layernorm.weight"] = drawn(wide)
        layer += 1
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def best(rounds: int, nbytes: int, do: Callable[[], object]) -> float:
    """GB/s of the fastest round."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - began)
    return nbytes / min(seconds) / GB


def of_bytes(nbytes: int, threads: int, rounds: int) -> dict[str, Any]:
    """One tensor by a GPU's hash; the same bytes by sha256, a part of them for each thread."""
    import torch

    tensor = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    whole = memoryview(tensor.numpy())
    step = -(-nbytes // threads)
    parts = [whole[at : at + step] for at in range(0, nbytes, step)]
    with ThreadPoolExecutor(threads) as pool:
        return {
            "threads": threads,
            "gpu": best(rounds, nbytes, lambda: checksum(tensor, "gpu", threads=threads)),
            "sha256": best(rounds, nbytes, lambda: list(pool.map(hashlib.sha256, parts))),
        }


def of_checkpoint(source: Checkpoint, threads: int, rounds: int) -> dict[str, Any]:
    told: dict[str, Any] = {"threads": threads}
    for device in DEVICES:
        served = ServedLayout(CONFIG, {}, device)
        told[device] = best(
            rounds,
            source.nbytes,
            lambda served=served: expected_checksums(source, served, threads=threads),  # type: ignore[misc]
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    most = threads_here()
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < most] + [most]
    in_memory = [of_bytes(options.mib << 20, n, options.rounds) for n in counts]
    with tempfile.TemporaryDirectory(prefix="sglang-harness-bench-") as work:
        source = make_checkpoint(Path(work), options.mib)
        whole = [of_checkpoint(source, n, options.rounds) for n in counts]
        size = source.nbytes

    table = Table(
        "threads", "GPU's hash", "sha256", "checkpoint, GPU", "checkpoint, CPU",
        title=f"GB/s, {options.mib} MiB, {host.describe()['processor']}, load {load:.1f}",
    )  # fmt: skip
    for row, beside in zip(in_memory, whole, strict=True):
        figures = (row["gpu"], row["sha256"], beside["gpu"], beside["cpu"])
        table.add_row(str(row["threads"]), *(f"{figure:.2f}" for figure in figures))
    Console().print(table)
    result = {
        "date": date.today().isoformat(),
        "machine": host.describe(),
        "load": load,
        "rounds": options.rounds,
        "unit": "GB/s",
        "in_memory": {"bytes": options.mib << 20, "rows": in_memory},
        "checkpoint": {"bytes": size, "dtype": "bfloat16", "rows": whole},
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"checksums-{platform.machine()}-{most}cpu.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
