"""What recorded facts allow one to say of a measurement. Pure and versioned, so it can be redone at any time.

A measurement is INVALID when its figure is not what it claims to be; a warning says that its numbers may mean less than they
seem to, and names the next command. Too few samples for a percentile are neither: that cell is empty and says so. What was not
read is not judged. Rules, version 2.

INVALID:

- the variant failed or has no samples, or a series that the plan wanted is missing;
- its outputs were not the recorded ones, or another provider than the one asked for ran it;
- the board was throttled or under-voltage, or an over-current counter moved, while it was timed. Of a ``sustained`` plan heat
  is the finding, so there the limits that come of heat are a warning; a weak power supply is no finding there either;
- pages were swapped, or the clock was set by more than 100 ms, while it was timed;
- the CPU's frequency drifted by more than the plan's share: between the two halves of a series, or between series, as medians
  of the readings (not of a ``sustained`` plan);
- others took CPUs that it needed: they kept more cores busy than there were to spare, by more than the plan's limit, or its own
  threads stood ready and waited for a CPU for more than the plan's share of the time (``schedstat`` of the Linux kernel,
  Documentation/scheduler/sched-stats.rst).

On the load of others: of the CPUs the worker may use, those its timed threads do not need are to spare. The kernel's own count
of waiting is the sharper of the two, and the only one that sees a load that the scheduler shares out fairly.

Warnings follow pyperf's checks (standard deviation ≥ 10 % of the mean; minimum or maximum ≥ 50 % away from the mean; median
below 1 ms) and add: timed for a shorter time than the plan wanted; load by others above 0.1 core, or waiting above 2 %; a
frequency governor other than ``performance``; a board that did not cool as far as the plan wanted; a sensor that went away.
"""

from __future__ import annotations

import statistics
from typing import List, Optional, Sequence

from device_agents import wire

RULES_VERSION = 2

MAX_CLOCK_STEP_MS = 100.0
FOREIGN_CPU_TOLERATED = 0.10
WAITING_TOLERATED = 0.02
MAX_DEVIATION = 0.10
MAX_EXTREME = 0.50
SHORT_NS = 1_000_000
READINGS_OF_A_HALF = 2
"""A half of a series whose frequency was read less often says nothing of a drift."""

HEAT = ("frequency-capped", "throttled", "soft-temperature-limit")
"""Limits that come of heat, as :mod:`device_agents.boards` names them."""

_LONGER = "edgevit bench --plan standard"
_TUNE = "edgevit bench --tune-system, or on the device: sudo cpupower frequency-set -g performance"


def judge(run: wire.Run, measurement: wire.Measurement) -> wire.Verdict:
    """The verdict on one measurement of ``run``, from what both recorded; what is None there is not judged."""
    plan, governor = run.job.plan, run.governor
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
        reasons += judge_series(run, measurement, series)
    warnings += _doubtful(measurement.series, plan)
    if not plan.sustained:
        reasons += _drifted_between(measurement.series, plan.max_frequency_drift)
    if samples:
        warnings += _scattered(samples, plan.sustained)
    if governor is not None and governor != "performance":
        warnings.append("the frequency governor is {}; {}".format(governor, _TUNE))
    return wire.Verdict(RULES_VERSION, not reasons, _distinct(reasons), _distinct(warnings))


def judge_series(run: wire.Run, measurement: wire.Measurement, series: wire.Series) -> "tuple[str, ...]":
    """What falsified one series; empty where nothing did."""
    plan, variant = run.job.plan, measurement.variant
    found = []
    if not series.golden.passed:
        found.append("other outputs than recorded ({})".format(series.golden.reason))
    if series.provider != variant.provider:
        found.append("ran by {} instead of {}".format(series.provider, variant.provider))
    limits = _limits(series)
    if plan.sustained:
        limits = [name for name in limits if name not in HEAT]
    if limits:
        found.append("the board was limited while timed: {}".format(", ".join(limits)))
    if series.swapped_pages:
        found.append("{:,} pages were swapped while timed".format(series.swapped_pages))
    if abs(series.clock_step_ms) > MAX_CLOCK_STEP_MS:
        found.append("the clock was set by {:+.0f} ms while timed".format(series.clock_step_ms))
    if not plan.sustained:
        found += _drifted_within(series, plan.max_frequency_drift)
    found += _crowded(series, variant, plan, run.facts.cpu_count)
    return tuple("series {}: {}".format(series.process + 1, text) for text in found)


def _limits(series: wire.Series) -> List[str]:
    return sorted({name for reading in series.readings for name in reading.throttle or ()})


def _crowded(series: wire.Series, variant: wire.Variant, plan: wire.RunPlan, cpu_count: int) -> List[str]:
    found = []
    cores = len(series.affinity) or cpu_count
    if series.foreign_cpu is not None:
        spare = max(cores - variant.threads, 0)
        if series.foreign_cpu > spare + plan.max_foreign_cpu:
            found.append("others kept {:.2f} of {} cores busy, {} were to spare".format(series.foreign_cpu, cores, spare))
    if series.waiting is not None:
        share = series.waiting / variant.threads
        if share > plan.max_waiting:
            found.append(
                "its threads waited for a CPU {:.0%} of the time, at most {:.0%} is allowed".format(share, plan.max_waiting)
            )
    return found


def _frequencies(readings: Sequence[wire.Reading]) -> List[float]:
    return [r.frequency_mhz for r in readings if r.frequency_mhz is not None]


def _drifted_within(series: wire.Series, allowed: float) -> List[str]:
    """The first half of a series' readings against the second, each by its median."""
    known = _frequencies(series.readings)
    half = len(known) // 2
    if half < READINGS_OF_A_HALF:
        return []
    text = _drift(statistics.median(known[:half]), statistics.median(known[-half:]), allowed)
    return ["the CPU went {} while timed".format(text)] if text else []


def _drifted_between(series: Sequence[wire.Series], allowed: float) -> List[str]:
    """Each series' median frequency: they are pooled, so they must be of one kind."""
    medians = [statistics.median(known) for known in (_frequencies(s.readings) for s in series) if known]
    text = _drift(max(medians), min(medians), allowed) if len(medians) > 1 else None
    return ["between its series the CPU went {}".format(text)] if text else []


def _drift(a: float, b: float, allowed: float) -> Optional[str]:
    highest = max(a, b)
    if highest <= 0 or abs(a - b) / highest <= allowed:
        return None
    return "from {:.0f} to {:.0f} MHz, at most {:.0%} of drift is allowed".format(a, b, allowed)


def _doubtful(measured: Sequence[wire.Series], plan: wire.RunPlan) -> List[str]:
    """The worst of each kind over all series, so that twenty of them give one line."""
    found = []
    foreign = max((s.foreign_cpu for s in measured if s.foreign_cpu is not None), default=0.0)
    if foreign > FOREIGN_CPU_TOLERATED:
        found.append("others kept up to {:.1f} cores busy; end them, then: edgevit bench".format(foreign + 0.05))
    waiting = max((s.waiting for s in measured if s.waiting is not None), default=0.0)
    if waiting > WAITING_TOLERATED:
        found.append(
            "its threads waited for a CPU up to {:.0%} of the time; end what else runs there, then: edgevit bench".format(
                waiting
            )
        )
    fewest = min((len(s.samples_ns) * s.stride for s in measured), default=plan.min_samples)
    if fewest < plan.min_samples:
        longer = "edgevit bench --plan sustained" if plan.name == "standard" else _LONGER
        found.append("{} of {} samples before the time was up; {}".format(fewest, plan.min_samples, longer))
    heat = sorted({name for s in measured for name in _limits(s) if name in HEAT})
    if plan.sustained and heat:
        found.append("heat limited the board: {}; cool it, then: edgevit bench --plan sustained".format(", ".join(heat)))
    found += _vanished(measured)
    return found + _uncooled([s.cooling for s in measured if s.cooling is not None])


def _vanished(measured: Sequence[wire.Series]) -> List[str]:
    """Sensors that a full reading had and a later one of the same series has not."""
    gone = set()
    for series in measured:
        full = [reading for reading in series.readings if reading.full]
        for name in ("temperature_c", "frequency_mhz", "throttle", "power_mw", "gpu_load"):
            told = [getattr(reading, name) is not None for reading in full]
            if True in told and False in told[told.index(True) :]:
                gone.add(name.rsplit("_", 1)[0] if name != "gpu_load" else "GPU load")
    text = "{} stopped being readable while timed, so what they would have told is missing; edgevit target probe"
    return [text.format(", ".join(sorted(gone)))] if gone else []


def _uncooled(cooled: Sequence[wire.Cooling]) -> List[str]:
    found = []
    warm = [(c.at_c - c.to_c, c.at_c, c.to_c, c.seconds) for c in cooled if c.at_c is not None and c.to_c is not None]
    _, at_c, to_c, seconds = max(warm, default=(0.0, 0.0, 0.0, 0.0))
    if at_c > to_c:
        found.append(
            "a series began at {:.1f} °C instead of {:.1f} °C after {:.0f} s of cooling; edgevit bench --cool-seconds N".format(
                at_c, to_c, seconds
            )
        )
    if any(c.outcome == "no-sensor" for c in cooled):
        found.append("no temperature can be read there, so nothing waited for it to cool; edgevit target probe")
    return found


def _scattered(samples: List[int], sustained: bool) -> List[str]:
    found = []
    mean = statistics.fmean(samples)
    if len(samples) >= 2 and mean > 0 and not sustained:
        deviation = statistics.pstdev(samples, mean) / mean
        if deviation >= MAX_DEVIATION:
            found.append("the standard deviation is {:.0%} of the mean; {}".format(deviation, _LONGER))
        if max(samples) >= mean * (1 + MAX_EXTREME) or min(samples) <= mean * (1 - MAX_EXTREME):
            found.append("the extremes lie 50 % or more off the mean; {}".format(_LONGER))
    if statistics.median(samples) < SHORT_NS:
        found.append("one inference takes less than 1 ms, so timer and scheduler weigh in; build with --batch for more")
    return found


def _distinct(texts: List[str]) -> "tuple[str, ...]":
    return tuple(text[:1000] for text in list(dict.fromkeys(texts))[:100])
