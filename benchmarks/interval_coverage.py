"""How often 95 % intervals of p50, p90 and p99 hold the truth: Student's t over processes against a bootstrap over processes.

python benchmarks/interval_coverage.py [--trials N]

Latencies are drawn with heavy tails; each process has a factor of its own, log-normal with the spread given. The truth is the
percentile of a process whose factor is 1. The first is what edgevit gives; the second, for comparison, resamples the processes'
own percentiles with replacement and takes the 2.5 % and 97.5 % quantiles of their mean.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgevit.results.intervals import log_percentile, percentile_interval

Draw = Callable[[np.random.Generator, tuple[int, ...]], Any]

LATENCIES: dict[str, Draw] = {
    "a floor and a Pareto tail": lambda rng, size: 1 + 0.02 * rng.pareto(2.5, size),
    "5 % spikes, Pareto of infinite variance": lambda rng, size: (
        rng.lognormal(0, 0.02, size) * np.where(rng.random(size) < 0.05, 1 + rng.pareto(1.5, size), 1.0)
    ),
    "two modes": lambda rng, size: rng.lognormal(0, 0.02, size) * np.where(rng.random(size) < 0.3, 1.2, 1.0),
}
PERCENTILES = (0.5, 0.9, 0.99)


def draw(kind: str, spread: float, size: tuple[int, int], rng: np.random.Generator) -> Any:
    """(processes, samples) in ns around 10 ms, ascending within each process."""
    each = LATENCIES[kind](rng, size) * rng.lognormal(0, spread, (size[0], 1))
    return np.sort((1e7 * each).astype(np.int64), axis=1)


@functools.cache
def truth(kind: str) -> dict[float, float]:
    """The percentiles of a process whose factor is 1, in ns, from four million samples."""
    samples = np.sort(LATENCIES[kind](np.random.default_rng(1), (4_000_000,)))
    return {q: 1e7 * float(samples[round(q * len(samples))]) for q in PERCENTILES}


def coverage(kind: str, spread: float, processes: int, samples: int, *, trials: int, seed: int) -> dict[float, float]:
    """Of each percentile the share of ``trials`` whose interval holds the truth."""
    rng, true = np.random.default_rng(seed), truth(kind)
    held = dict.fromkeys(PERCENTILES, 0)
    for _ in range(trials):
        series = draw(kind, spread, (processes, samples), rng)
        for q in PERCENTILES:
            interval = percentile_interval(series, q)
            held[q] += interval is not None and interval[0] <= true[q] <= interval[1]
    return {q: count / trials for q, count in held.items()}


def bootstrap(kind: str, spread: float, processes: int, samples: int, *, trials: int, seed: int) -> dict[float, float]:
    """The same of a percentile bootstrap over processes: the same estimate of each, resampled 1000 times."""
    rng, true = np.random.default_rng(seed), truth(kind)
    held = dict.fromkeys(PERCENTILES, 0)
    for _ in range(trials):
        series = draw(kind, spread, (processes, samples), rng)
        chosen = rng.integers(0, processes, (1000, processes))
        for q in PERCENTILES:
            own = np.array([log_percentile(one, q) for one in series])
            low, high = np.exp(np.quantile(own[chosen].mean(axis=1), (0.025, 0.975)))
            held[q] += bool(low <= true[q] <= high)
    return {q: count / trials for q, count in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    trials = parser.parse_args().trials
    print(f"95 % intervals that hold the truth, {trials} trials; p50 p90 p99")
    for kind in LATENCIES:
        for spread in (0.0, 0.01, 0.03):
            for processes, samples in ((3, 221), (5, 100), (10, 221), (20, 221)):
                ours = coverage(kind, spread, processes, samples, trials=trials, seed=11)
                other = bootstrap(kind, spread, processes, samples, trials=trials, seed=11)
                cells = "  ".join(f"{100 * found[q]:5.1f}" for found in (ours, other) for q in PERCENTILES)
                what = f"{kind:40} spread {spread:3.0%} {processes:3} processes of {samples}"
                print(f"{what}: t {cells[:19]} | bootstrap {cells[21:]}", flush=True)


if __name__ == "__main__":
    main()
