"""How far devices differ from each other, apart from the noise of measuring them. Pure.

The model is nested: a device, a run of it, a worker process of the run; each adds a deviation of its own to the logarithm of a
process's median latency, so a *spread* is relative: the standard deviation of that logarithm, 0.02 being about 2 %. Its
components are estimated by the method of moments on unweighted means (Searle, Casella and McCulloch, *Variance Components*,
1992, ch. 3; Thomas and Hultquist, *Interval estimation for the unbalanced case of the one-way random effects model*, Annals of
Statistics 6, 1978, 582-587), which needs no balance: devices may have different numbers of runs, runs of processes.

Intervals are generalized confidence intervals (Weerahandi, *Generalized confidence intervals*, JASA 88, 1993, 899-905): each
mean square is divided by draws of its own chi-squared distribution and carried through the same formulas. The draws are seeded,
so the same data give the same interval. An estimate below zero is zero, as is customary.

What was not repeated cannot be told apart: where every device has one run, what differs from run to run counts as difference
between devices, and the component says so in its ``levels``.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVELS = ("device", "run", "process")
CONFIDENCE = 0.95
LEAST_GROUPS = 3
"""With two devices the interval's upper end is some thirty times the estimate: it says nothing."""
DRAWS = 2000
SEED = 5


@dataclass(frozen=True)
class Component:
    """One source of spread. ``levels`` are what it holds: ``("device",)``, or ``("device", "run")`` where nothing tells the two
    apart. ``spread`` is relative (1 = 100 %); ``interval`` holds it with 95 % confidence. What is None has its reason in
    ``absent``. ``groups`` counts what it was estimated from: devices, runs or processes."""

    levels: tuple[str, ...]
    spread: float | None
    interval: tuple[float, float] | None
    groups: int
    absent: str = ""

    @property
    def name(self) -> str:
        return " and ".join(self.levels)


@dataclass(frozen=True)
class VarianceComponents:
    """Spread by source, the widest level first, of ``devices`` devices, ``runs`` runs and ``processes`` processes.

    ``geometric_mean`` is that of the devices' own, and ``device_means`` holds them by name, all in the unit of the input.
    """

    devices: int
    runs: int
    processes: int
    geometric_mean: float
    device_means: Mapping[str, float]
    components: tuple[Component, ...]

    def component(self, level: str) -> Component:
        """The component that holds ``level``; KeyError for another word than those of :data:`LEVELS`."""
        for one in self.components:
            if level in one.levels:
                return one
        raise KeyError(level)

    @property
    def devices_differ(self) -> bool | None:
        """Whether devices differ by more than the noise explains: the interval of their component leaves out zero. None where
        there is no interval, or where nothing tells device from run."""
        found = self.component("device")
        return None if found.interval is None or found.levels != ("device",) else found.interval[0] > 0.0


@dataclass(frozen=True)
class _Level:
    """One level's mean square, its degrees of freedom, and the share of each level below it that the mean square holds."""

    square: float
    freedom: int
    below: tuple[float, ...]


def variance_components(measured: Mapping[str, Sequence[Sequence[float]]]) -> VarianceComponents:
    """Device → its runs → the median latency of each process (any unit, above zero) → the spread each level adds.

    A run without a process, and a device without a run, count as not measured and are left out. ValueError where nothing is
    left, or for a latency that is not a number above zero.
    """
    logs = {
        device: [[_log(value, device) for value in run] for run in runs if len(run)]
        for device, runs in measured.items()
        if any(len(run) for run in runs)
    }
    if not logs:
        raise ValueError("no device has a measured process")
    run_means = {device: [statistics.fmean(run) for run in runs] for device, runs in logs.items()}
    device_means = {device: statistics.fmean(means) for device, means in run_means.items()}
    runs = sum(map(len, logs.values()))
    processes = sum(len(run) for device in logs.values() for run in device)
    counts = {"device": len(logs), "run": runs, "process": processes}
    merged, levels = _merge(logs, run_means, device_means)
    estimates = _solve(levels, [level.square for level in levels])
    draws = _draw(levels)
    return VarianceComponents(
        devices=len(logs),
        runs=runs,
        processes=processes,
        geometric_mean=math.exp(statistics.fmean(device_means.values())),
        device_means={device: math.exp(mean) for device, mean in device_means.items()},
        components=tuple(
            _component(names, counts[names[-1]], level, estimate, [draw[i] for draw in draws], len(logs))
            for i, (names, level, estimate) in enumerate(zip(merged, levels, estimates, strict=True))
        ),
    )


def _log(value: float, device: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{device}: got a latency of {value}, expected a number above zero")
    return math.log(value)


def _merge(
    logs: Mapping[str, list[list[float]]], run_means: Mapping[str, list[float]], device_means: Mapping[str, float]
) -> tuple[list[tuple[str, ...]], list[_Level]]:
    """The levels that can be told apart, widest first; one without repeats goes into the level above it."""
    shares = [[1.0 / len(run) for run in runs] for runs in logs.values()]
    process = _Level(*_pooled([run for runs in logs.values() for run in runs]), ())
    run_square, run_freedom = _pooled(list(run_means.values()))
    # The share of process noise left in a run's mean, as it enters the pooled square of the runs.
    weights = [len(runs) - 1 for runs in shares]
    in_run = sum(w * statistics.fmean(s) for w, s in zip(weights, shares, strict=True)) / run_freedom if run_freedom else 0.0
    device_square, device_freedom = _pooled([list(device_means.values())])
    of_runs = statistics.fmean(1.0 / len(runs) for runs in shares)
    of_processes = statistics.fmean(sum(runs) / len(runs) ** 2 for runs in shares)
    found: list[tuple[tuple[str, ...], _Level]] = [
        (("device",), _Level(device_square, device_freedom, (of_runs, of_processes))),
        (("run",), _Level(run_square, run_freedom, (in_run,))),
        (("process",), process),
    ]
    names: list[tuple[str, ...]] = []
    kept: list[int] = []
    for depth, (name, level) in enumerate(found):
        if depth and not level.freedom:
            names[-1] += name  # nothing repeats here: its noise stands in the level above
        else:
            names.append(name)
            kept.append(depth)
    levels = []
    for i, depth in enumerate(kept):
        level = found[depth][1]
        below = tuple(level.below[other - depth - 1] for other in kept[i + 1 :])
        levels.append(_Level(level.square, level.freedom, below))
    return names, levels


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The variance within groups, pooled, and its degrees of freedom."""
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return 0.0, 0
    return math.fsum(_squares(group) for group in groups) / freedom, freedom


def _squares(values: Sequence[float]) -> float:
    """The sum of squared deviations from the mean, in two passes; ``statistics.variance`` is exact and a dozen times slower."""
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _solve(levels: Sequence[_Level], squares: Sequence[float]) -> list[float]:
    """Mean squares → components, from the lowest level up; what would be below zero is zero only in the end, so that a level
    above is not pushed down by noise."""
    found: list[float] = [0.0] * len(levels)
    for i in reversed(range(len(levels))):
        found[i] = squares[i] - sum(share * found[i + 1 + k] for k, share in enumerate(levels[i].below))
    return [max(value, 0.0) for value in found]


def _draw(levels: Sequence[_Level]) -> list[list[float]]:
    rng = random.Random(SEED)
    drawn = []
    for _ in range(DRAWS):
        squares = [
            level.square * level.freedom / rng.gammavariate(level.freedom / 2.0, 2.0) if level.freedom else 0.0
            for level in levels
        ]
        drawn.append(_solve(levels, squares))
    return drawn


def _component(
    names: tuple[str, ...], groups: int, level: _Level, estimate: float, draws: list[float], devices: int
) -> Component:
    if not level.freedom:
        return Component(names, None, None, groups, "1 device was measured, and one has no other to differ from")
    if names[0] == "device" and devices < LEAST_GROUPS:
        why = f"too few devices for an interval: {devices}, at least {LEAST_GROUPS} are needed"
        return Component(names, math.sqrt(estimate), None, groups, why)
    draws.sort()
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = (draws[min(int(q * len(draws)), len(draws) - 1)] for q in (tail, 1.0 - tail))
    return Component(names, math.sqrt(estimate), (math.sqrt(low), math.sqrt(high)), groups)
