"""What recorded facts allow one to say of a measurement. Pure and versioned, so it can be redone at any time.

A measurement is INVALID when something is known to have falsified it; a warning says that its numbers may mean less than
they seem to, and names the next command. Rules, version 1:

INVALID: the variant failed or has no samples; its outputs were not the recorded ones; another provider ran it; the board was
throttled while it was timed; pages were swapped meanwhile; the clock was set by more than 100 ms meanwhile; others kept so
many cores busy that the timed threads must have lost time to them.

On the last: with ``cpu_count`` cores and ``threads`` timed, others may use ``cpu_count − threads`` cores without taking any
from the timed threads, if the scheduler places all well. A quarter of a core beyond that cannot have come from nowhere.

Warnings follow pyperf's checks: standard deviation ≥ 10 % of the mean; minimum or maximum ≥ 50 % away from the mean; median
below 1 ms; fewer than 64 samples (what MLPerf LoadGen needs for a 90th percentile at 99 % confidence); load by others
above 0.1 core; a frequency governor other than ``performance``; timed for a shorter time than the plan wanted.
"""

from __future__ import annotations

import statistics
from typing import List

from device_agents import wire

RULES_VERSION = 1

MAX_CLOCK_STEP_MS = 100.0
FOREIGN_CPU_TOLERATED = 0.10
FOREIGN_CPU_MARGIN = 0.25
MAX_DEVIATION = 0.10
MAX_EXTREME = 0.50
SHORT_NS = 1_000_000
SAMPLES_FOR_P90 = 64

_LONGER = "edgevit bench --plan standard"


def judge(run: wire.Run, measurement: wire.Measurement) -> wire.Verdict:
    """The verdict on one measurement of ``run``, from what both recorded; what is None there is not judged."""
    plan, cpu_count, governor = run.job.plan, run.facts.cpu_count, run.governor
    reasons: List[str] = []
    warnings: List[str] = []
    if measurement.failure is not None:
        reasons.append("{}: {}".format(measurement.failure.code, measurement.failure.message.split("\n")[0]))
    samples = [ns for series in measurement.series for ns in series.samples_ns]
    if not samples and measurement.failure is None:
        reasons.append("there are no samples")
    if len(measurement.series) < plan.processes and measurement.failure is None:
        reasons.append("{} of {} series were measured".format(len(measurement.series), plan.processes))
    for series in measurement.series:
        reasons += _falsified(series, measurement.variant, cpu_count)
        warnings += _doubtful(series, plan)
    if samples:
        warnings += _scattered(samples)
    if governor is not None and governor != "performance":
        warnings.append(
            "the frequency governor is {}; on the device: sudo cpupower frequency-set -g performance".format(governor)
        )
    return wire.Verdict(RULES_VERSION, not reasons, _distinct(reasons), _distinct(warnings))


def _falsified(series: wire.Series, variant: wire.Variant, cpu_count: int) -> List[str]:
    found = []
    where = "series {}: ".format(series.process + 1)
    if not series.golden.passed:
        found.append(where + "other outputs than recorded ({})".format(series.golden.reason))
    if series.provider != variant.provider:
        found.append(where + "ran by {} instead of {}".format(series.provider, variant.provider))
    throttle = sorted({name for reading in series.readings for name in reading.throttle or ()})
    if throttle:
        found.append(where + "the board was limited while timed: {}".format(", ".join(throttle)))
    if series.swapped_pages:
        found.append(where + "{:,} pages were swapped while timed".format(series.swapped_pages))
    if abs(series.clock_step_ms) > MAX_CLOCK_STEP_MS:
        found.append(where + "the clock was set by {:+.0f} ms while timed".format(series.clock_step_ms))
    if series.foreign_cpu is not None:
        spare = max(cpu_count - variant.threads, 0)
        if series.foreign_cpu > spare + FOREIGN_CPU_MARGIN:
            found.append(
                where + "others kept {:.2f} of {} cores busy, {} were to spare".format(series.foreign_cpu, cpu_count, spare)
            )
    return found


def _doubtful(series: wire.Series, plan: wire.RunPlan) -> List[str]:
    found = []
    if series.foreign_cpu is not None and series.foreign_cpu > FOREIGN_CPU_TOLERATED:
        found.append("others kept up to {:.1f} cores busy; end them, then: edgevit bench".format(series.foreign_cpu + 0.05))
    if len(series.samples_ns) < plan.min_samples:
        found.append("{} of {} samples before the time was up; {}".format(len(series.samples_ns), plan.min_samples, _LONGER))
    return found


def _scattered(samples: List[int]) -> List[str]:
    found = []
    mean = statistics.fmean(samples)
    if len(samples) >= 2 and mean > 0:
        deviation = statistics.pstdev(samples, mean) / mean
        if deviation >= MAX_DEVIATION:
            found.append("the standard deviation is {:.0%} of the mean; {}".format(deviation, _LONGER))
        if max(samples) >= mean * (1 + MAX_EXTREME) or min(samples) <= mean * (1 - MAX_EXTREME):
            found.append("the extremes lie 50 % or more off the mean; {}".format(_LONGER))
    if statistics.median(samples) < SHORT_NS:
        found.append("one inference takes less than 1 ms, so timer and scheduler weigh in; build with --batch for more")
    if len(samples) < SAMPLES_FOR_P90:
        found.append("{} samples are too few for a 90th percentile; {}".format(len(samples), _LONGER))
    return found


def _distinct(texts: List[str]) -> "tuple[str, ...]":
    return tuple(text[:1000] for text in list(dict.fromkeys(texts))[:100])
