"""A trainer of two ranks on the CPU: run twice, with the rank and a folder. What it leaves in
the folder is what real FSDP leaves; ``reference.pt`` holds the values."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    # Odd sizes: the ranks' shards differ.
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.LayerNorm(3))
    columns = torch.arange(3 * 5, dtype=torch.bfloat16).reshape(3, 5)
    if rank == 0:
        torch.save({**model.state_dict(), "columns": columns}, folder / "reference.pt")
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    state = get_model_state_dict(model)
    # As tensor parallelism shards: by columns.
    state["columns"] = distribute_tensor(columns, mesh, [Shard(1)])
    dcp.save({"model": state, "step": 3}, checkpoint_id=folder / "fsdp")
    torch.save(model.state_dict(), folder / f"model_world_size_2_rank_{rank}.pt")
    full = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        torch.save({"model": full, "optim": optimizer.state_dict()}, folder / "full.pt")
    shard = sharded_tensor.Shard.from_tensor_and_offsets(torch.ones(2, 4), [2 * rank, 0], rank)
    whole = sharded_tensor.init_from_local_shards([shard], 4, 4)
    torch.save({"weight": whole}, folder / f"sharded_{rank}.pt")
    dcp.save({"weight": whole}, checkpoint_id=folder / "sharded")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
