"""Two sides of a comparison, picked from stored runs: which measurement of A goes with which of B, and what they say. Pure.

A ratio of latencies is B ÷ A of geometric means over processes, with its 95 % interval. Measured in one run, the two took
turns, and each round is a pair: what drifted meets both alike (Student's t on the logarithms of the rounds' ratios). Measured
in two runs they are independent (Welch); what differs from run to run is then in the ratio, not in its interval: it is said.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from device_agents.wire import Measurement, Run, Variant
from edgevit.errors import UsageError
from edgevit.results.accuracy import PairedAccuracy, compare_accuracy
from edgevit.results.conditions import Difference, differences, images_of
from edgevit.results.intervals import LEAST_PROCESSES, log_percentile, ratio_of_means, t_interval
from edgevit.results.stats import summarize
from edgevit.results.summary import Summary

ROUNDS = "taking turns in one run: rounds are paired"
TWO_RUNS = "two runs: what differs from run to run is not in the interval"


@dataclass(frozen=True)
class Side:
    """One measurement with its run and its figures."""

    run: Run
    measurement: Measurement
    summary: Summary

    @property
    def variant(self) -> Variant:
        return self.measurement.variant


@dataclass(frozen=True)
class Ratio:
    """B ÷ A. ``interval`` is None where nothing was repeated; ``how`` says what was."""

    value: float
    interval: tuple[float, float] | None
    how: str


@dataclass(frozen=True)
class Pair:
    """A measurement of A and the one of B that goes with it.

    ``differs``: the keys that make their figures incomparable. ``doubts``: why one of the figures is not what it claims to be.
    ``latency`` and ``accuracy`` are None with their reason in the field ending in ``_absent``.
    """

    a: Side
    b: Side
    differs: tuple[Difference, ...]
    doubts: tuple[str, ...]
    latency: Ratio | None
    latency_absent: str
    accuracy: PairedAccuracy | None
    accuracy_absent: str

    @property
    def comparable(self) -> bool:
        return not self.differs and not self.doubts


@dataclass(frozen=True)
class Paired:
    """All pairs of two sides, and what of either has no partner."""

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def pick_side(runs: Sequence[Run], wanted: str, target: str | None = None) -> list[Side]:
    """The measurements of ``runs`` whose variant begins with ``wanted`` (``artifact[:runtime[:provider[:threads]]]``, or empty
    for all), on ``target`` if one is named."""
    parts = wanted.split(":") if wanted else []
    found = []
    for run in runs:
        if target is not None and run.job.target != target:
            continue
        summaries = {(s.bundle, s.artifact, s.runtime, s.provider, s.threads): s for s in summarize(run)}
        for m in run.measurements:
            v = m.variant
            have = [v.artifact, v.runtime, v.provider, str(v.threads)]
            if len(parts) <= len(have) and have[: len(parts)] == parts:
                found.append(Side(run, m, summaries[v.bundle, v.artifact, v.runtime, v.provider, v.threads]))
    return found


def pair_sides(a: Sequence[Side], b: Sequence[Side]) -> Paired:
    """Every measurement of A with the one of B that is most like it, on the same target; where each side has a single target,
    those two. UsageError where no two go together, or both sides are the same measurements."""
    same = {(s.run.job.run_id, s.variant) for s in a} & {(s.run.job.run_id, s.variant) for s in b}
    if same:
        raise UsageError(
            "A and B name the same measurement",
            hint="edgevit results compare BATCH:ARTIFACT BATCH:ARTIFACT, see edgevit results show",
        )
    targets_a, targets_b = (list(dict.fromkeys(s.run.job.target for s in side)) for side in (a, b))
    places = [(t, t) for t in targets_a if t in targets_b]
    if not places and len(targets_a) == len(targets_b) == 1:
        places = [(targets_a[0], targets_b[0])]
    pairs: list[Pair] = []
    left_a, left_b = list(a), list(b)
    for one, other in places:
        here = [s for s in a if s.run.job.target == one], [s for s in b if s.run.job.target == other]
        for x, y in _match(*here):
            pairs.append(compare_sides(x, y))
            left_a.remove(x)
            left_b.remove(y)
    if not pairs:
        raise UsageError(
            f"nothing of A goes with anything of B: A has {_names(a)}; B has {_names(b)}", hint="edgevit results show BATCH"
        )
    return Paired(tuple(pairs), tuple(map(_name, left_a)), tuple(map(_name, left_b)))


LIKENESS: tuple[Callable[[Side], Hashable], ...] = (
    lambda s: (s.measurement.bundle_name, s.variant.artifact, s.variant.runtime, s.variant.provider, s.variant.threads),
    lambda s: (s.variant.artifact, s.variant.runtime, s.variant.provider, s.variant.threads),
    lambda s: (s.measurement.bundle_name, s.variant.artifact, s.variant.runtime, s.variant.provider),
    lambda s: (s.variant.artifact, s.variant.runtime, s.variant.provider),
    lambda s: (s.variant.artifact, s.variant.runtime),
    lambda s: (s.variant.artifact,),
    lambda s: (),
)
"""From the most alike to the least; the last pairs what is alone on both sides."""


def _match(a: Sequence[Side], b: Sequence[Side]) -> list[tuple[Side, Side]]:
    found: list[tuple[Side, Side]] = []
    left_a, left_b = list(a), list(b)
    for key in LIKENESS:
        counts = Counter(map(key, left_a)), Counter(map(key, left_b))
        partners = {key(y): y for y in left_b if counts[1][key(y)] == 1}
        for x in list(left_a):
            if counts[0][key(x)] == 1 and key(x) in partners:
                y = partners[key(x)]
                found.append((x, y))
                left_a.remove(x)
                left_b.remove(y)
    return sorted(found, key=lambda pair: a.index(pair[0]))


def compare_sides(a: Side, b: Side) -> Pair:
    """One pair, whatever differs: whether it may be shown is for the caller to judge by ``comparable``."""
    doubts = tuple(
        f"{name} is INVALID: {'; '.join(side.summary.verdict.reasons)}"
        for name, side in (("A", a), ("B", b))
        if not side.summary.failure and side.summary.p50_ms is not None and not side.summary.verdict.valid
    )
    latency, latency_absent = _latency(a, b)
    accuracy, accuracy_absent = _accuracy(a, b)
    found = differences((a.run, a.measurement), (b.run, b.measurement))
    return Pair(a, b, found, doubts, latency, latency_absent, accuracy, accuracy_absent)


def _latency(a: Side, b: Side) -> tuple[Ratio | None, str]:
    for name, side in (("A", a), ("B", b)):
        if side.summary.failure:
            return None, f"{name} failed: {side.summary.failure.splitlines()[0]}"
    medians = [
        {
            s.process: value
            for s in side.measurement.series
            for value in [log_percentile(sorted(s.samples_ns), 0.5)]
            if value is not None
        }
        for side in (a, b)
    ]
    for name, known in zip("AB", medians, strict=True):
        if not known:
            return None, f"{name} has no valid sample"
    rounds = sorted(medians[0].keys() & medians[1].keys())
    if a.run.job.run_id == b.run.job.run_id and len(rounds) >= LEAST_PROCESSES:
        logs = [medians[1][i] - medians[0][i] for i in rounds]
        return Ratio(math.exp(sum(logs) / len(logs)), t_interval(logs), f"{ROUNDS}, {len(rounds)} of them"), ""
    ours, theirs = (list(known.values()) for known in medians)
    if min(len(ours), len(theirs)) < LEAST_PROCESSES:
        value = math.exp(sum(theirs) / len(theirs) - sum(ours) / len(ours))
        few = f"{min(len(ours), len(theirs))} process{'es'[: 2 * (min(len(ours), len(theirs)) > 1)]}"
        return Ratio(value, None, f"no interval from {few}, {LEAST_PROCESSES} are needed: edgevit bench --plan standard"), ""
    value, interval = ratio_of_means(ours, theirs)
    return Ratio(value, interval, TWO_RUNS), ""


def _accuracy(a: Side, b: Side) -> tuple[PairedAccuracy | None, str]:
    ours, theirs = a.measurement.accuracy, b.measurement.accuracy
    for name, side, scored in (("A", a, ours), ("B", b, theirs)):
        if scored is None:
            return None, f"{name}: {side.summary.top1_absent or 'not scored'}"
    if ours is None or theirs is None or ours.labels != theirs.labels or ours.evaluation != theirs.evaluation:
        return None, f"scored on other images: A {images_of(a.measurement)}, B {images_of(b.measurement)}"
    return compare_accuracy(ours.predictions, theirs.predictions, ours.labels), ""


def ratio_of(a: float | None, b: float | None) -> float | None:
    """B ÷ A, where both are there and A is above zero."""
    return None if a is None or b is None or a <= 0 else b / a


def _names(sides: Sequence[Side]) -> str:
    return ", ".join(map(_name, sides)) or "nothing"


def _name(side: Side) -> str:
    v = side.variant
    return f"{v.artifact}:{v.runtime}:{v.provider}:{v.threads} on {side.run.job.target}"
