"""A latency table learned from what was measured so far: one line a kind of file, and how wrong it is. Pure.

Files of one kind (format, precision, threads, whether tokens merge) take ``base + slope × MACs``, fitted by least squares with
neither below zero; of a kind with one measurement, time in proportion to MACs. The error is that of held-out predictions: each
measured file from the others of its kind.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FEWEST_HELD_OUT = 3
"""With fewer held-out predictions the error itself is not known, and nothing is dropped by a prediction."""

LEAST_MARGIN = 0.10
"""No prediction is trusted closer than this, whatever the held-out ones say: latency differs from process to process."""

Kind = tuple[str, str, int, bool]
"""(format, scheme, threads, whether tokens merge)."""


@dataclass(frozen=True)
class Timed:
    """A measured file: ``macs`` of one image, p50 in ms."""

    kind: Kind
    macs: float
    ms: float


@dataclass(frozen=True)
class Line:
    """``base`` ms + ``slope`` ms a MAC, from ``count`` files."""

    base: float
    slope: float
    count: int

    def at(self, macs: float) -> float:
        return self.base + self.slope * macs


@dataclass(frozen=True)
class LatencyTable:
    """``error``: the median of |predicted − measured| ÷ measured over ``held_out`` predictions; None where there are none."""

    lines: Mapping[Kind, Line]
    error: float | None
    held_out: int

    def predict(self, kind: Kind, macs: float) -> float | None:
        """ms, or None for a kind of which nothing was measured."""
        line = self.lines.get(kind)
        return None if line is None else line.at(macs)

    def optimistic(self, kind: Kind, macs: float) -> float | None:
        """The least that a file may well take: the prediction less twice the table's own error, at least a tenth. None where
        nothing is predicted, or where the error of predictions is not known yet."""
        predicted = self.predict(kind, macs)
        if predicted is None or self.error is None or self.held_out < FEWEST_HELD_OUT:
            return None
        return predicted * max(0.0, 1.0 - max(LEAST_MARGIN, 2.0 * self.error))


def learn(measured: Iterable[Timed]) -> LatencyTable:
    """The table of what was measured on one target."""
    by_kind: dict[Kind, list[Timed]] = {}
    for one in measured:
        by_kind.setdefault(one.kind, []).append(one)
    errors = []
    for group in by_kind.values():
        for i, one in enumerate(group):
            rest = group[:i] + group[i + 1 :]
            if rest:
                errors.append(abs(_fit(rest).at(one.macs) - one.ms) / one.ms)
    return LatencyTable({k: _fit(g) for k, g in by_kind.items()}, statistics.median(errors) if errors else None, len(errors))


def _fit(group: Sequence[Timed]) -> Line:
    n = len(group)
    x, y = statistics.fmean(t.macs for t in group), statistics.fmean(t.ms for t in group)
    spread = sum((t.macs - x) ** 2 for t in group)
    slope = sum((t.macs - x) * (t.ms - y) for t in group) / spread if spread else 0.0
    base = y - slope * x
    if spread and slope >= 0 and base >= 0:
        return Line(base, slope, n)
    if spread and slope < 0:
        return Line(y, 0.0, n)
    squares = sum(t.macs**2 for t in group)
    return Line(0.0, sum(t.macs * t.ms for t in group) / squares, n) if squares else Line(y, 0.0, n)
