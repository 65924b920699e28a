"""Which of the things that a trainer saved are the model's weights, and what they are called.

Trainers save the weights next to their optimizer, under keys that differ, and wrappers add to
every name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sglang_harness.errors import ModelError

#: Keys that trainers keep a model's weights under. The first that is there counts.
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "policy", "actor")

#: Parts of names that wrappers add: torch.compile, FSDP, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

#: How deep the weights may lie. Deeper than any trainer puts them; a pickle can hold itself.
_DEEPEST = 6


def weights_in(
    content: Any, is_tensor: Callable[[Any], bool], where: str
) -> tuple[dict[str, Any], list[str]]:
    """The weights in a saved object, by the names they have there, and what was passed over.

    Raises:
        ModelError: there are no weights, or several sets of them.
    """
    notes: list[str] = []
    path: list[str] = []
    found = _descend(content, is_tensor, path, where)
    if found is None:
        raise ModelError(f"{where} does not hold named tensors.", advice="Give a state dict.")
    if path:
        notes.append(f"weights under {' / '.join(path)}")
        beside = [str(key) for key in content if key != path[0]] if len(path) else []
        if beside:
            notes.append(f"not read: {', '.join(map(repr, beside[:8]))}")
    return found, notes


def _descend(
    content: Any, is_tensor: Callable[[Any], bool], path: list[str], where: str
) -> dict[str, Any] | None:
    """Follows the keys of models down, noting them in ``path``."""
    if not isinstance(content, Mapping) or len(path) > _DEEPEST:
        return None
    for key in MODEL_KEYS:
        if isinstance(content.get(key), Mapping):
            path.append(key)
            if found := _descend(content[key], is_tensor, path, where):
                return found
            path.pop()
    here = {key: it for key, it in content.items() if isinstance(key, str) and is_tensor(it)}
    if any("." in name for name in here):
        return here
    inner = []
    for key, it in content.items():
        if isinstance(key, str) and key not in MODEL_KEYS and isinstance(it, Mapping):
            below = [*path, key]
            if found := _descend(it, is_tensor, below, where):
                inner.append((below, found))
    if here and not inner:
        return here
    with_keys = [each for each in inner if len(each[0]) > len(path) + 1]
    choices = with_keys if len(with_keys) == 1 else inner
    if len(choices) > 1:
        raise ModelError(
            f"{where} holds tensors under {', '.join(' / '.join(b) for b, _ in choices[:5])}; "
            "which of these are the model's weights is not clear.",
            advice="Save them under the key 'model'.",
        )
    if choices:
        path[:] = choices[0][0]
        return choices[0][1]
    return None


def canonical(names: Iterable[str], where: str) -> dict[str, str]:
    """Each name without what wrappers added to it.

    ``module.`` at the front goes where every name has it (DataParallel, DeepSpeed), as often
    as every name has it.

    Raises:
        ModelError: two names become one.
    """
    parts = {name: [part for part in name.split(".") if part not in WRAPPERS] for name in names}
    while parts and all(len(each) > 1 and each[0] == "module" for each in parts.values()):
        parts = {name: each[1:] for name, each in parts.items()}
    made = {name: ".".join(each) for name, each in parts.items()}
    taken: dict[str, str] = {}
    for name, short in made.items():
        if short in taken:
            raise ModelError(
                f"{where}: {taken[short]} and {name} are both {short} without their wrappers.",
                advice="Save the model from one place only.",
            )
        taken[short] = name
    return made
