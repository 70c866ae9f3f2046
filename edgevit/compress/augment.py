"""Training batches from uint8 images, everything random drawn from one generator: crops, flips, and mixtures of two images.

Mixtures are what lets a thousand images teach for many passes when a teacher answers for the same mixture ("function matching",
Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", CVPR 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from device_agents.wire import Preprocessing

if TYPE_CHECKING:
    import torch

ASPECT = 4 / 3
"""Crops are at most this much wider than high, or higher than wide."""


@dataclass(frozen=True)
class Augmentation:
    """``crop``: the least share of an image's area that is looked at; ``flip``: mirror half of them; ``mix``: the share of
    images blended with another, half by mixup (Zhang et al., 2018) and half by cutmix (Yun et al., 2019)."""

    crop: float
    flip: bool
    mix: float


@dataclass(frozen=True)
class Batch:
    """``images`` float32 (B, 3, H, W), normalised. Image ``i`` holds the share ``shares[i]`` of row ``rows[i]`` of the data and
    the rest of row ``others[i]``."""

    images: torch.Tensor
    rows: torch.Tensor
    others: torch.Tensor
    shares: torch.Tensor


def draw_batch(
    pixels: torch.Tensor,
    rows: torch.Tensor,
    preprocessing: Preprocessing,
    how: Augmentation,
    generator: torch.Generator,
    device: torch.device | None = None,
) -> Batch:
    """The images ``rows`` of ``pixels`` (uint8 (N, side, side, 3)), cropped, mirrored, mixed and normalised on ``device``.

    What is drawn depends on ``generator`` (of the CPU) alone, so that any machine sees the same batch.
    """
    import torch

    chosen = pixels[rows].to(device)
    mean = torch.tensor(preprocessing.mean, device=device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=device).view(3, 1, 1)
    images = (chosen.permute(0, 3, 1, 2).float() / 255 - mean) / std
    theta = _crops(len(rows), how, generator).to(device)
    size = (len(rows), 3, preprocessing.height, preprocessing.width)
    grid = torch.nn.functional.affine_grid(theta, list(size), align_corners=False)
    images = torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    images, shares = _mixed(images, how.mix, generator)
    return Batch(images, rows, rows.roll(1), shares)


def _crops(count: int, how: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """(count, 2, 3) affine maps from the unit square to a random crop of it, mirrored where drawn."""
    import torch

    drawn = torch.rand(5, count, generator=generator)
    area = how.crop + (1 - how.crop) * drawn[0]
    stretch = torch.exp((2 * drawn[1] - 1) * math.log(ASPECT) / 2)
    width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
    sign = torch.where(drawn[4] < 0.5, -1.0, 1.0) if how.flip else torch.ones(count)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * sign, height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * drawn[2] - 1), (1 - height) * (2 * drawn[3] - 1)
    return theta


def _mixed(images: torch.Tensor, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image blended with the one before it where drawn, and the share (B,) that is its own."""
    import torch

    count, _, height, width = images.shape
    drawn = torch.rand(5, count, generator=generator)
    mixed, boxed = drawn[0] < share, drawn[1] < 0.5
    own = torch.where(mixed, drawn[2], 1.0)
    # A box of the area that is the other's, anywhere it fits.
    edge = (1 - own).sqrt()
    top, left = drawn[3] * (1 - edge), drawn[4] * (1 - edge)
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    inside_y = (y >= top[:, None]) & (y < (top + edge)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + edge)[:, None])
    box = 1.0 - (inside_y[:, None, :, None] & inside_x[:, None, None, :]).float()
    weight = torch.where(boxed[:, None, None, None], box, own[:, None, None, None])
    own = weight.mean((1, 2, 3))
    weight = weight.to(images.device)
    return images * weight + images.roll(1, 0) * (1 - weight), own
