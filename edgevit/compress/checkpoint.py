"""What an interrupted training needs to go on: one safetensors file, replaced in one rename, never half-written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgevit.progress import Progress

if TYPE_CHECKING:
    import torch

NAME = "training.safetensors"


@dataclass(frozen=True)
class Position:
    """How far training is. ``elapsed`` counts the seconds of every run so far."""

    step: int = 0
    elapsed: float = 0.0


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], position: Position) -> None:
    """Write ``tensors`` and ``position``; a reader finds all of it or all of the one before, also after a power cut."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    data = save(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
        {"position": json.dumps({"step": position.step, "elapsed": position.elapsed})},
    )
    part = folder / f"{NAME}.part"
    with part.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    part.replace(folder / NAME)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(folder: Path, on_progress: Progress) -> tuple[dict[str, torch.Tensor], Position] | None:
    """What :func:`save_checkpoint` left. None where there is none, or a damaged one, which is said and left behind."""
    from safetensors import SafetensorError, safe_open

    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as f:
            told = json.loads(f.metadata()["position"])
            position = Position(int(told["step"]), float(told["elapsed"]))
            return {name: f.get_tensor(name) for name in list(f.keys())}, position
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        on_progress.start("checkpoint", f"{path}: unreadable")
        on_progress.finish("checkpoint", f"{path} is damaged ({type(e).__name__}: {e}); training starts anew")
        return None
