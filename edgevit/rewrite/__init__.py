"""Exact rewrites of the module before it is quantized and exported; one file each, every one proven equal on real images.

:data:`REWRITES` is the list the build walks. It is empty: no rewrite ships yet, and the bundle's step report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from device_agents.wire import StepReport
from edgevit.compress import CalibrationData, Compressed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Applied:
    """The rewritten module and how many layers the rewrite touched."""

    module: torch.nn.Module
    layers: int


class Rewrite(Protocol):
    """One exact rewrite. ``applies_to`` says beforehand whether there is anything to rewrite."""

    name: str

    def applies_to(self, module: torch.nn.Module) -> bool: ...

    def apply(self, module: torch.nn.Module, data: CalibrationData) -> Applied: ...


REWRITES: tuple[Rewrite, ...] = ()


def apply_rewrites(state: Compressed, data: CalibrationData, rewrites: tuple[Rewrite, ...] = REWRITES) -> Compressed:
    """Apply every rewrite that fits, in order, and report which did."""
    details: dict[str, str] = {}
    touched = 0
    for rewrite in rewrites:
        if not rewrite.applies_to(state.module):
            details[rewrite.name] = "does not apply"
            continue
        applied = rewrite.apply(state.module, data)
        state = replace(state, module=applied.module)
        touched += applied.layers
        details[rewrite.name] = f"{applied.layers} layers"
    done = [name for name, text in details.items() if text != "does not apply"]
    summary = f"rewrites applied: {', '.join(done)}" if done else "no rewrite was applied"
    return state.reported(StepReport("rewrite", touched, summary, details))
