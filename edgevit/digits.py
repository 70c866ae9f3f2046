"""Handwritten digits: a small real task that needs no network, for the demo and for tests.

The images are the UCI handwritten digits that scikit-learn carries (1,797 scans of 8 × 8 pixels, 16 grey levels), enlarged
to 32 × 32 RGB. The model is timm's own VisionTransformer, small enough to train in under a minute on two cores.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevit.errors import MissingExtra
from edgevit.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

SIZE = 32
"""Pixels a side of an enlarged digit."""

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

HELD_OUT = 397
"""Images never trained on; the other 1,400 train."""

NORMALISATION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def digits_vit(**kwargs: Any) -> torch.nn.Module:
    """A VisionTransformer for 32 × 32 digits: 10 classes, 8 × 8 patches. Usable as MODEL ``edgevit.digits:digits_vit``."""
    from edgevit.torchsetup import import_timm

    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    settings: dict[str, Any] = {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "num_classes": 10,
    }
    model: torch.nn.Module = VisionTransformer(**{**settings, **kwargs})
    model.pretrained_cfg = {
        "input_size": (3, SIZE, SIZE),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "num_classes": 10,
        **NORMALISATION,
    }
    return model


@dataclass(frozen=True)
class Digits:
    """Where :func:`write_digits` put what it made: two CSV data sets and the class names."""

    train: Path
    held_out: Path
    labels: Path


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits in a fixed shuffled order: uint8 (1797, 32, 32, 3) and int64 (1797,)."""
    import numpy as np

    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as e:
        raise MissingExtra("scikit-learn (it carries the digits)", "build") from e
    from PIL import Image

    raw = sklearn_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    enlarged = [
        np.asarray(Image.fromarray((image * (255 / 16)).astype("uint8")).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        for image in raw.images[order]
    ]
    pixels = np.repeat(np.stack(enlarged)[..., None], 3, axis=3)
    return pixels, raw.target[order].astype("int64")


def write_digits(folder: Path) -> Digits:
    """The digits as PNG files with ``train.csv``, ``held-out.csv`` and ``labels.txt`` in ``folder``; kept if already there."""
    from PIL import Image

    result = Digits(folder / "train.csv", folder / "held-out.csv", folder / "labels.txt")
    if result.labels.exists():
        return result
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pixels, labels = load_digits()
    names = [f"images/{i:04d}.png" for i in range(len(labels))]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(folder / name)
    split = len(labels) - HELD_OUT
    for path, part in ((result.train, slice(0, split)), (result.held_out, slice(split, None))):
        with path.open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(("path", "label"))
            writer.writerows(zip(names[part], labels[part].tolist(), strict=True))
    # Written last: its presence says that everything else is there.
    result.labels.write_text("".join(f"{digit}\n" for digit in NAMES))
    return result


def ensure_digits(folder: Path, progress: Progress) -> tuple[Digits, Path]:
    """The digits and the weights of a trained :func:`digits_vit` in ``folder``, made the first time."""
    data = write_digits(folder / "digits")
    weights = folder / "digits.safetensors"
    if not weights.exists():
        part = weights.with_suffix(".part")
        train_digits_vit(part, progress)
        part.rename(weights)
    return data, weights


def train_digits_vit(out: Path, progress: Progress, *, epochs: int = 10, seed: int = 0, **kwargs: Any) -> float:
    """Train :func:`digits_vit` on the training digits, write safetensors to ``out``; top-1 (0 to 1) on the held-out digits."""
    from edgevit.torchsetup import import_timm

    import_timm()
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    pixels, labels = load_digits()
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    y = torch.from_numpy(labels)
    split = len(y) - HELD_OUT
    model = digits_vit(**kwargs).train()
    batch = 25
    steps = epochs * (split // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-4, total_steps=steps, pct_start=0.2)
    progress.start("train", "train a small ViT on 1,400 digits", steps, "steps")
    step = 0
    for _ in range(epochs):
        order = torch.randperm(split)
        for i in range(0, split - batch + 1, batch):
            rows = order[i : i + batch]
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            progress.advance("train", step)
    model.eval()
    with torch.inference_mode():
        top1 = float((model(x[split:]).argmax(1) == y[split:]).float().mean())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(out))
    progress.finish("train", f"held-out top-1 {100 * top1:.1f} %")
    return top1


def main() -> None:
    """``python -m edgevit.digits FOLDER``: the digits as images and a model trained on them, to try edgevit with."""
    import argparse

    from edgevit.report.cli_progress import RichProgress

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    a = parser.parse_args()
    write_digits(a.folder)
    with RichProgress() as progress:
        train_digits_vit(a.folder / "digits.safetensors", progress, epochs=a.epochs)


if __name__ == "__main__":
    main()
