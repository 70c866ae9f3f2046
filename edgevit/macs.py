"""Multiply-accumulates of one image, counted on a real forward pass."""

from __future__ import annotations

from typing import Any

from device_agents.wire import Preprocessing
from edgevit.torchsetup import import_torch


def count_macs(module: Any, preprocessing: Preprocessing) -> int:
    """MACs of every matrix product and convolution of one (1, 3, height, width) image, attention products included.

    Counted where torch dispatches them, whatever module they come from (``torch.utils.flop_counter``: 1 MAC = 2 FLOPs).
    """
    torch = import_torch()
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(torch.zeros(1, 3, preprocessing.height, preprocessing.width))
    return int(counter.get_total_flops()) // 2
