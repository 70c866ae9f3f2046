"""What an interrupted training needs to go on: one safetensors file, replaced in one rename, never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgevit.durable import sync_folder
from edgevit.errors import BuildError
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
    """Write ``tensors`` and ``position``; a reader finds all of it or all of the one before, also after a power cut.

    Raises :class:`BuildError` where the disk does not take it.
    """
    from safetensors.torch import save

    data = save(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
        {"position": json.dumps({"step": position.step, "elapsed": position.elapsed})},
    )
    with writing(folder / NAME, len(data)) as part:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(folder / NAME)
        sync_folder(folder)


@contextmanager
def writing(path: Path, size: int) -> Iterator[Path]:
    """Where to write the ``size`` bytes that then become ``path``; its folder is made.

    A disk that is full or read-only raises :class:`BuildError`; nothing half-written stays behind.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except OSError as e:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise BuildError(
            f"distil: {size / 1e6:.1f} MB could not be written to {path}: {e.strerror or e}",
            hint=f"make room on the disk of {path.parent}, keep what is there, and run the same again: training goes on from "
            "its last checkpoint",
        ) from e


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
