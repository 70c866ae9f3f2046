"""The steps of a recipe, in the order they run, keyed by the class of their configuration.

A structural step (``prune``, ``low_rank``, ``merge_tokens``, ``distil``) returns a new module; the quantize step runs last, on
the module that is exported, and decides a :class:`~edgevit.quantspec.QuantSpec`. Each says what it did as a
:class:`~device_agents.wire.StepReport`; :mod:`edgevit.compress.walk` runs them, measures what each cost and keeps the result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from device_agents.wire import Preprocessing, StepReport
from edgevit.errors import BuildError, DataError
from edgevit.progress import Progress
from edgevit.quantspec import QuantSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

T = TypeVar("T")

Json = Any
"""What JSON can hold: the plan of a structural step."""


@dataclass(frozen=True)
class CalibrationData:
    """Images a step may look at: uint8 (N, height, width, 3), labels where known. ``real`` is False for synthetic ones."""

    pixels: NDArray[np.uint8]
    labels: tuple[int, ...] | None
    real: bool


@dataclass(frozen=True)
class TrainingData:
    """Images that training steps learn from: uint8 (N, side, side, 3) with ``side`` 8/7 of the model's, so that crops differ
    from pass to pass; labels where known."""

    pixels: NDArray[np.uint8]
    labels: tuple[int, ...] | None


@dataclass(frozen=True)
class StepContext:
    """What a step may use besides the module.

    ``multiple`` is what the boards' kernels want widths to be a multiple of. ``scratch`` is a folder of this very step on this
    very input: what a training step leaves there is found again after an interruption, and nowhere else.
    """

    calibration: CalibrationData
    training: Callable[[], TrainingData]
    multiple: int
    scratch: Path
    on_progress: Progress
    formats: tuple[str, ...] = ("onnx", "tflite")
    """What the module will be exported as: the quantize step may prepare it for each by itself."""
    found: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What was worked out for one scheme of a build and serves the next."""

    def once(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` gave when it was first asked for under ``key``."""
        if key not in self.found:
            self.found[key] = work()
        found: T = self.found[key]
        return found

    def real_images(self, step: str) -> NDArray[np.uint8]:
        """Calibration pixels (N, height, width, 3), or :class:`DataError` where a person gave none."""
        if not self.calibration.real:
            raise DataError(f"{step} learns from real images and was given none", hint="add --calib FOLDER or CSV")
        return self.calibration.pixels


@dataclass(frozen=True)
class Structure:
    """One structural step as data: ``restructure(module, plan)`` gives a module of the same shape, weights aside."""

    kind: str
    plan: Json


@dataclass(frozen=True)
class Compressed:
    """The module so far and how it came to be. Never leaves the process.

    ``original`` is the model as it was loaded: the teacher, and what damage is measured against. It is never changed.
    """

    module: torch.nn.Module
    preprocessing: Preprocessing
    original: torch.nn.Module
    spec: QuantSpec = field(default_factory=lambda: QuantSpec("fp32"))
    structure: tuple[Structure, ...] = ()
    reports: tuple[StepReport, ...] = ()
    per_format: Mapping[str, tuple[torch.nn.Module, QuantSpec]] = field(default_factory=dict)
    """Format → module and QuantSpec, where the quantize step made them other than ``module`` and ``spec``."""

    def carried(self, format_: str) -> tuple[torch.nn.Module, QuantSpec]:
        """The module and the QuantSpec that the exporter of ``format_`` carries out; an ORT file is made from the ONNX file."""
        return self.per_format.get("onnx" if format_ == "ort" else format_, (self.module, self.spec))

    def reported(self, report: StepReport) -> Compressed:
        return replace(self, reports=(*self.reports, report))

    def restructured(self, module: torch.nn.Module, kind: str, plan: Json, report: StepReport) -> Compressed:
        """With ``module`` in place of the old one, made by ``kind``'s ``restructure`` from ``plan``."""
        return replace(self, module=module, structure=(*self.structure, Structure(kind, plan))).reported(report)


Step = Callable[[Compressed, Any, StepContext], Compressed]
Restructure = Callable[["torch.nn.Module", Json], "torch.nn.Module"]

KINDS = {
    "prune": "edgevit.compress.prune",
    "low_rank": "edgevit.compress.low_rank",
    "merge_tokens": "edgevit.compress.merge_tokens",
    "distil": "edgevit.compress.distil",
    "quantize": "edgevit.compress.quantize",
}
"""Kind of step → the module that carries it out, registering itself when imported."""

_STEPS: dict[type, Step] = {}
_RESTRUCTURE: dict[str, Restructure] = {}


def step(config: type, restructure: Restructure | None = None) -> Callable[[Step], Step]:
    """Register the function that carries out steps configured by ``config``.

    A structural step also gives ``restructure(module, plan)``: from a module as the step found it, one of the shape the step
    left behind, with whatever weights; the kept weights are loaded into it.
    """

    def register(function: Step) -> Step:
        _STEPS[config] = function
        if restructure is not None:
            kind = next(k for k, place in KINDS.items() if place == function.__module__)
            _RESTRUCTURE[kind] = restructure
        return function

    return register


def apply_step(state: Compressed, config: Any, context: StepContext) -> Compressed:
    """Carry out one configured step. Raises :class:`BuildError` where it does nothing or cannot apply."""
    _import_steps()
    function = _STEPS.get(type(config))
    if function is None:
        raise BuildError(f"no step is registered for {type(config).__name__}")
    return function(state, config, context)


def why_not(module: torch.nn.Module, kinds: Sequence[str]) -> str:
    """Why a step of one of ``kinds`` cannot apply to ``module``, or nothing. Looks at the module; runs and changes nothing.
    A kind may be followed by the step's :attr:`~edgevit.compress.config.StepConfig.variety`: ``prune channels``."""
    for wanted in kinds:
        kind, _, variety = wanted.partition(" ")
        applies_to = getattr(importlib.import_module(KINDS[kind]), "applies_to", None)
        reason = applies_to(module, *filter(None, [variety])) if applies_to is not None else ""
        if reason:
            return f"{kind}: {reason}"
    return ""


def restructure(module: torch.nn.Module, structure: tuple[Structure, ...]) -> torch.nn.Module:
    """``module`` (which is consumed) brought into the shape that ``structure`` describes; its weights mean nothing after."""
    _import_steps()
    for one in structure:
        module = _RESTRUCTURE[one.kind](module, one.plan)
    return module


def _import_steps() -> None:
    for place in KINDS.values():
        importlib.import_module(place)
