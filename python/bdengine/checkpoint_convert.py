"""The one place that opens a pickle, tensors only, in a process that does nothing else: see `checkpoint.convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdengine.checkpoint import write_safetensors
from bdengine.errors import UserError


def state_dict_of(loaded: Any, name: str) -> dict[str, Tensor]:
    """The one state dict in what ``torch.load`` returned: itself, or the only one directly inside it.

    Args:
        loaded: Anything.
        name: What to call it in an error.

    Raises:
        UserError: It holds none, or more than one.
    """
    if _is_state_dict(loaded):
        return loaded
    if not isinstance(loaded, dict):
        raise UserError(f"{name} holds a {type(loaded).__name__}; expected a state dict of tensors")
    inside = [value for value in loaded.values() if _is_state_dict(value)]
    if len(inside) != 1:
        keys = ", ".join(str(key) for key in list(loaded)[:8])
        raise UserError(f"{name} holds {keys}, of which {len(inside)} are state dicts of tensors; expected exactly one")
    return inside[0]


def main(old: Path, new: Path) -> None:
    """Writes the state dict in ``old`` to ``new``; tensors that share memory are written apart.

    Raises:
        UserError: ``old`` is damaged or holds more than plain tensors, or the system refused the write.
    """
    try:
        loaded = torch.load(old, map_location="cpu", weights_only=True)
    except Exception as reason:  # a stranger's bytes can fail in any way, and the answer is always the same
        raise UserError(
            f"{old} is damaged or holds more than tensors ({type(reason).__name__}), and nothing in it was run; "
            "expected a plain state dict"
        ) from reason
    write_safetensors(new, {key: tensor.clone() for key, tensor in state_dict_of(loaded, str(old)).items()})


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
