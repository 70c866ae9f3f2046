"""Where a target's latency changed for good, over the versions of a bundle. Pure, standard library.

A change point is looked for by Pettitt's rank statistic (*A non-parametric approach to the change-point problem*, Applied
Statistics 28, 1979), scaled so that every place weighs the same, at the places where the version changes; its p-value is that
of permutations of the runs, so it needs no distribution. Where one is found, both halves are looked at again (binary
segmentation; so does MongoDB's detector: Daly et al., *The Use of Change Point Detection to Identify Software Performance
Regressions in a Continuous Integration System*, ICPE 2020). The unit is the run: processes of one run share its day.

Ranks say that it changed; by how much is the ratio of geometric means, with Welch's interval. The permutations are seeded: the
same runs give the same answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from edgevit.results.intervals import ratio_of_means

SIGNIFICANCE = 0.05
PERMUTATIONS = 1999
SEED = 7
LEAST_RUNS = 8
"""Of seven runs even three slow ones after four quick ones come by chance more often than once in twenty: 2 times in 35."""


@dataclass(frozen=True)
class Step:
    """From the run at ``index`` on, latency is ``ratio`` times what it was before, back to the step before this one.

    ``interval`` holds the ratio with 95 % confidence, None where a side has a single run. ``before`` and ``after`` count the
    runs of both sides; ``p_value``: how often runs in random order show as clear a step.
    """

    index: int
    ratio: float
    interval: tuple[float, float] | None
    p_value: float
    before: int
    after: int


def find_steps(latencies: Sequence[float], versions: Sequence[object]) -> list[Step]:
    """Latencies of runs (any unit, above zero) in the order of their ``versions`` → the steps, first to last.

    Runs of one version stand together. ValueError where the two are not equally many, or a latency is not above zero. With
    fewer than :data:`LEAST_RUNS` runs nothing can be told and nothing is found.
    """
    if len(latencies) != len(versions):
        raise ValueError(f"got {len(latencies)} latencies of {len(versions)} versions")
    if any(not (math.isfinite(v) and v > 0) for v in latencies):
        raise ValueError("got a latency that is not a number above zero")
    logs = [math.log(v) for v in latencies]
    found = sorted(_segments(logs, versions, 0, len(logs), random.Random(SEED)))
    edges = [0, *(index for index, _ in found), len(logs)]
    steps = []
    for number, (index, p_value) in enumerate(found):
        before, after = logs[edges[number] : index], logs[index : edges[number + 2]]
        if min(len(before), len(after)) > 1:
            ratio, interval = ratio_of_means(before, after)
            steps.append(Step(index, ratio, interval, p_value, len(before), len(after)))
        else:
            ratio = math.exp(sum(after) / len(after) - sum(before) / len(before))
            steps.append(Step(index, ratio, None, p_value, len(before), len(after)))
    return steps


def _segments(
    logs: Sequence[float], versions: Sequence[object], start: int, end: int, rng: random.Random
) -> list[tuple[int, float]]:
    """(index, p-value) of every change point from ``start`` to before ``end``."""
    places = [i for i in range(start + 1, end) if versions[i] != versions[i - 1]]
    if end - start < LEAST_RUNS or not places:
        return []
    ranks = _ranks(logs[start:end])
    cuts = [i - start for i in places]
    clearest, at = max((value, cut) for cut, value in zip(cuts, _clearness(ranks, cuts), strict=True))
    if clearest == 0.0:
        return []
    shuffled = list(ranks)
    reached = 1
    for _ in range(PERMUTATIONS):
        rng.shuffle(shuffled)
        reached += max(_clearness(shuffled, cuts)) >= clearest - 1e-9
        if reached > SIGNIFICANCE * (PERMUTATIONS + 1):
            return []  # more permutations cannot bring it down again
    p_value = reached / (PERMUTATIONS + 1)
    index = start + at
    return [
        *_segments(logs, versions, start, index, rng),
        (index, p_value),
        *_segments(logs, versions, index, end, rng),
    ]


def _clearness(ranks: Sequence[float], cuts: Sequence[int]) -> list[float]:
    """At each cut how far the ranks before it lie from their mean, in its standard deviation under no change."""
    n = len(ranks)
    middle = (n - 1) / 2
    sums, total, done = [], 0.0, 0
    for cut in cuts:
        total += sum(ranks[done:cut])
        done = cut
        sums.append(abs(total - cut * middle) / math.sqrt(cut * (n - cut)))
    return sums


def _ranks(values: Sequence[float]) -> list[float]:
    """From 0 on; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for i in order[first : last + 1]:
            ranks[i] = (first + last) / 2
        first = last + 1
    return ranks
