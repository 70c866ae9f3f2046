"""The steps of a recipe, in the order they run, keyed by the class of their configuration.

A structural step takes and returns the module; the quantize step runs last, on the module that is exported, and decides a
:class:`~edgevit.quantspec.QuantSpec` instead of touching it. Each reports what it did as a
:class:`~device_agents.wire.StepReport`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing, StepReport
from edgevit.errors import BuildError
from edgevit.progress import Progress
from edgevit.quantspec import QuantSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class CalibrationData:
    """Images a step may look at: uint8 (N, height, width, 3), labels where known. ``real`` is False for synthetic ones."""

    pixels: NDArray[np.uint8]
    labels: tuple[int, ...] | None
    real: bool


@dataclass(frozen=True)
class Compressed:
    """The module so far, the QuantSpec once decided, and a report per step. Never leaves the process."""

    module: torch.nn.Module
    preprocessing: Preprocessing
    spec: QuantSpec
    reports: tuple[StepReport, ...] = ()

    def reported(self, report: StepReport) -> Compressed:
        return replace(self, reports=(*self.reports, report))


Step = Callable[[Compressed, Any, CalibrationData, Progress], Compressed]
_STEPS: dict[type, Step] = {}


def step(config: type) -> Callable[[Step], Step]:
    """Register the function that carries out steps configured by ``config``."""

    def register(function: Step) -> Step:
        _STEPS[config] = function
        return function

    return register


def apply_step(state: Compressed, config: Any, data: CalibrationData, on_progress: Progress) -> Compressed:
    """Carry out one configured step. Raises :class:`BuildError` where it does nothing or cannot apply."""
    import edgevit.compress.quantize  # noqa: F401 - registers itself

    function = _STEPS.get(type(config))
    if function is None:
        raise BuildError(f"no step is registered for {type(config).__name__}")
    return function(state, config, data, on_progress)
