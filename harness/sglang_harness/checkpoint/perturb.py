"""Another checkpoint of the same architecture, made from one by a seeded perturbation."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_harness.errors import MissingExtra, ModelError
from sglang_harness.permissions import make_readable

#: Noise as a part of each tensor's own standard deviation: enough that every answer changes
#: far beyond any tolerance, too little to make a model babble.
STRENGTH = 0.05


def perturbed(source: Path, target: Path, seed: int, *, strength: float = STRENGTH) -> Path:
    """Writes ``source`` with seeded noise on every tensor to the new folder ``target``.

    Safetensors in, safetensors out, one file at a time and one tensor at a time, in each
    tensor's own dtype. Other files (config, tokenizer) are copied.

    Raises:
        MissingExtra: torch or safetensors is not installed.
        ModelError: the folder holds no safetensors.
    """
    try:
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError:
        raise MissingExtra("Making another checkpoint", "torch") from None
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{source} holds no safetensors to perturb.",
            advice="Save the model as safetensors; other formats are not altered here.",
        )
    target.mkdir(parents=True)
    for other in source.iterdir():
        if other.is_file() and other.suffix != ".safetensors":
            shutil.copyfile(other, target / other.name)
    generator = torch.Generator().manual_seed(seed)
    for file in files:
        changed = {}
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- safetensors' handle is no mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point():
                    noise = torch.empty(tensor.shape).normal_(generator=generator)
                    # A constant tensor (a fresh norm weight) has no spread of its own.
                    spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
                    tensor = (tensor.float() + strength * (spread or 1.0) * noise).to(tensor.dtype)
                changed[name] = tensor
        # One entry: safetensors writes several in any order, and the same seed shall give the
        # same bytes.
        save_file(changed, target / file.name, metadata={"format": "pt"})
    make_readable(target)
    return target
