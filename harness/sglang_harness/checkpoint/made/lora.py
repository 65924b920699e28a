"""LoRA adapters for a checkpoint: seeded ones, made by PEFT, and how they travel in a request."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

from sglang_harness._base.permissions import make_readable
from sglang_harness.errors import MissingExtra, ModelError

#: What the adapters change: the four projections of attention.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 8

#: Size of an adapter's change as a part of the size of the weights that it changes: enough that
#: every answer differs far beyond any tolerance.
STRENGTH = 0.5


def made(base: Path, target: Path, seed: int) -> Path:
    """Writes a seeded adapter for the checkpoint ``base`` to the new folder ``target``.

    PEFT's layout (``adapter_config.json``, ``adapter_model.safetensors``), float32, rank
    ``RANK`` on ``TARGETS``, readable for every user.

    Raises:
        MissingExtra: torch, transformers or PEFT is not installed.
        ModelError: the folder cannot be loaded.
    """
    try:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise MissingExtra("Making a LoRA adapter", "torch") from None
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers cannot load {base}: {error}.") from None
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    adapted: Any = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in adapted.modules():
            for name in getattr(module, "lora_A", ()):
                _fill(module, name, generator)
    adapted.save_pretrained(target)
    make_readable(target)
    return target


def _fill(module: Any, name: str, generator: Any) -> None:
    """Noise on both sides: an adapter as PEFT begins it changes nothing (its B is 0)."""
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    a.normal_(generator=generator)
    wanted = STRENGTH * float(module.get_base_layer().weight.std())
    # An element of B A is a sum of RANK products of independent unit normals.
    b.normal_(generator=generator).mul_(wanted / (module.scaling[name] * RANK**0.5))


def in_request(folder: Path, *, ranks: int = 1) -> tuple[dict[str, Any], list[str]]:
    """An adapter as ``/load_lora_adapter_from_tensors`` takes it.

    Returns:
        PEFT's configuration, and for each tensor-parallel rank a base64 pickle of
        ``{name: CPU tensor}`` with the values themselves (no handle to shared memory), so that
        a server on any machine can read it.

    Raises:
        MissingExtra: torch or safetensors is not installed.
        ModelError: the folder holds no adapter.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise MissingExtra("Sending a LoRA adapter", "torch") from None
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} does not hold a LoRA adapter: {error}.") from None
    # Each with storage of its own: a pickled view takes along all that it looks at.
    packed = pickle.dumps({name: tensor.clone() for name, tensor in tensors.items()})
    return config, [base64.b64encode(packed).decode()] * ranks
