"""Runs → statistics. Pure, from raw samples, with the standard library: everything here can be redone from the store.

Definitions, so that a figure means one thing everywhere:

- *Percentile*: nearest rank, the smallest sample such that at least q of all samples are not above it; always a sample that
  really occurred.
- *p90* is given from 64 samples on and *p99* from 662 on, the counts at which MLPerf LoadGen's early stopping can first say
  anything at confidence 0.99 and tolerance 0; below, the cell is empty and says why.
- *p90 and p99 early stopping*: LoadGen's estimate (mlcommons/inference_policies, inference_rules.adoc, "Early stopping";
  mlcommons/inference, ``loadgen/early_stopping.cc`` and ``results.cc``; Reddi et al., MLPerf Inference Benchmark,
  arXiv:1911.02549): of n sorted samples the t-th largest, t being the largest count of slower samples that a true percentile
  would, at the confidence asked, still allow.
- *Throughput*: images a second over all timed inferences, batch size ÷ mean latency; *p50 an image*: p50 ÷ batch size.
- *Intervals* of p50, p90 and p99 hold a typical process's percentile with 95 % confidence: Student's t over processes, see
  :mod:`edgevit.results.intervals`. With fewer than three processes only p50 has one, of this process alone: order statistics
  of the pooled samples (Conover, Practical Nonparametric Statistics, 3.2), widened to hold every process's own median.
- *Energy*: of an inference, with the idle board's power taken off (net) and without (gross); see :mod:`edgevit.results.energy`.
- Statistics pool the samples of all series (worker processes) of a measurement; each process's own median is kept beside them.
- *× fp32*: p50 of the reference ÷ p50, on the same target, of the same model, batch of runs, thread count and batch size. The
  reference is the plain fp32 ONNX file on onnxruntime where that was measured, else the plain fp32 that was; the field
  ``reference`` names it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from device_agents.verdict import RULES_VERSION
from device_agents.wire import Accuracy, Measurement, Run, Series, Variant, Verdict
from edgevit.results.energy import measure_energy
from edgevit.results.intervals import percentile_interval
from edgevit.results.percentiles import P90_SAMPLES, P99_SAMPLES, early_stopping_percentile, median_interval, percentile
from edgevit.results.reference import relate
from edgevit.results.summary import Summary
from edgevit.results.sustained import describe_sustained

Judge = Callable[[Run, Measurement], Verdict]


def summarize(run: Run, judge: Judge | None = None) -> list[Summary]:
    """One :class:`Summary` per variant the job asked for, in the job's order; a variant that was never reached has its reason.

    ``judge`` makes the verdict; left out, it is :func:`device_agents.verdict.judge`, the only one there is outside tests.
    """
    if judge is None:
        from device_agents.verdict import judge as rules

        judge = rules
    found = [_measured(run, m, judge(run, m)) for m in run.measurements]
    reached = {m.variant for m in run.measurements}
    return found + [_never_reached(run, v) for v in run.job.variants if v not in reached]


def summarize_all(runs: Iterable[Run], judge: Judge | None = None) -> list[Summary]:
    """Every run's summaries, related to their fp32."""
    return relate([s for run in runs for s in summarize(run, judge)])


def _measured(run: Run, m: Measurement, verdict: Verdict) -> Summary:
    failure = f"{m.failure.code}: {m.failure.message}" if m.failure else ""
    absent = failure or "nothing was timed"
    return Summary(
        **_asked(run, m.variant),
        **_model_file(m),
        **_times(m.series, m.batch, absent, run.job.plan.name),
        **_starts(m.series),
        **_memory(m.series, absent),
        **_accuracy(m.accuracy, m.accuracy_absent or absent),
        **_board(run, m.series),
        **_disturbance(m),
        **_energy(m),
        mismatch=next((s.golden.reason or "other outputs than recorded" for s in m.series if not s.golden.passed), ""),
        sustained=next((d for d in map(describe_sustained, m.series) if d is not None), None),
        profile=m.profile,
        profile_absent=m.profile_absent,
        failure=failure,
        verdict=verdict,
    )


def _never_reached(run: Run, variant: Variant) -> Summary:
    """A row for what was asked and has no measurement: an absent row would hide it."""
    why = f"not measured: the run is {run.status}" + (f", {run.reason}" if run.reason else "")
    models = {m.model for m in run.measurements}
    return Summary(
        **_asked(run, variant),
        model=models.pop() if len(models) == 1 else "",
        recipe="",
        bundle_name="",
        artifact_sha256="",
        format="",
        scheme="",
        batch=1,
        file_mb=None,
        **_times((), 1, why, run.job.plan.name),
        **_starts(()),
        **_memory((), why),
        **_accuracy(None, why),
        energy_absent=why,
        energy_gross_absent=why,
        speedup_absent=why,
        agreement_absent=why,
        failure=why,
        verdict=Verdict(rules=RULES_VERSION, valid=False, reasons=(why,), warnings=()),
    )


# Each of these gives the fields of a Summary that tell of one thing; ``absent`` says why there is no figure.

Fields = dict[str, Any]


def _asked(run: Run, variant: Variant) -> Fields:
    """Which run this is of, on which board, and what was to be measured."""
    return {
        "run_id": run.job.run_id,
        "batch_id": run.job.batch_id,
        "target": run.job.target,
        "plan": run.job.plan.name,
        "started_at": run.started_at,
        "board": run.facts.board_model or run.facts.cpu_model or run.facts.machine,
        "boot_id": run.facts.boot_id,
        "bundle": variant.bundle,
        "artifact": variant.artifact,
        "runtime": variant.runtime,
        "provider": variant.provider,
        "threads": variant.threads,
    }


def _model_file(m: Measurement) -> Fields:
    return {
        "model": m.model,
        "recipe": m.recipe,
        "bundle_name": m.bundle_name,
        "artifact_sha256": m.artifact_sha256,
        "format": m.format,
        "scheme": m.scheme,
        "batch": m.batch,
        "file_mb": m.artifact_bytes / 1e6,
    }


def _times(series: Sequence[Series], batch: int, absent: str, plan: str) -> Fields:
    """Latency of one inference over the samples of all ``series``, and throughput; ``plan`` is the one they were timed by."""
    longer = "sustained" if plan in ("standard", "sustained") else "standard"
    ordered = sorted(ns for one in series for ns in one.samples_ns)
    n, total = len(ordered), sum(ordered)
    early90, early99 = (early_stopping_percentile(ordered, q) for q in (0.9, 0.99))
    return {
        "processes": len(series),
        "n": n,
        **_percentile("p50", ordered, 0.5, 1, absent, longer),
        **_percentile("p90", ordered, 0.9, P90_SAMPLES, absent, longer),
        **_percentile("p99", ordered, 0.99, P99_SAMPLES, absent, longer),
        **_intervals(series, ordered),
        "p90_early_stopping_ms": _ms(early90) if early90 is not None else None,
        "p99_early_stopping_ms": _ms(early99) if early99 is not None else None,
        "process_p50_ms": tuple(_ms(percentile(sorted(s.samples_ns), 0.5)) for s in series if s.samples_ns),
        "mean_ms": _ms(statistics.fmean(ordered)) if n else None,
        "std_ms": _ms(statistics.stdev(ordered)) if n > 1 else None,
        "min_ms": _ms(ordered[0]) if n else None,
        "max_ms": _ms(ordered[-1]) if n else None,
        "images_per_s": batch * n / (total / 1e9) if total else None,
        "image_p50_ms": _ms(percentile(ordered, 0.5)) / batch if n else None,
    }


def _percentile(name: str, ordered: Sequence[int], q: float, needed: int, absent: str, longer: str) -> Fields:
    n = len(ordered)
    if n >= needed:
        return {f"{name}_ms": _ms(percentile(ordered, q)), f"{name}_absent": ""}
    few = f"{n} samples, {needed} are needed at 99 % confidence; bench with --plan {longer}"
    return {f"{name}_ms": None, f"{name}_absent": few if n else absent}


def _intervals(series: Sequence[Series], ordered: Sequence[int]) -> Fields:
    """Of p50, p90 and p99 where those are given, and what was repeated."""
    each = [sorted(one.samples_ns) for one in series]
    found: list[tuple[float, float] | None] = []
    for q, needed in ((0.5, 1), (0.9, P90_SAMPLES), (0.99, P99_SAMPLES)):
        interval = percentile_interval(each, q) if len(ordered) >= needed else None
        if interval is not None:
            shown = percentile(ordered, q)  # the pooled figure, which need not be any process's own
            interval = _ms(min(interval[0], shown)), _ms(max(interval[1], shown))
        found.append(interval)
    p50, p90, p99 = found
    repeated = "processes" if p50 is not None else ""
    if p50 is None and (own := median_interval(each)) is not None:
        p50, repeated = (_ms(own[0]), _ms(own[1])), "samples"
    return {"p50_interval_ms": p50, "p90_interval_ms": p90, "p99_interval_ms": p99, "interval_of": repeated}


def _starts(series: Sequence[Series]) -> Fields:
    """From a new process to its first answer; loading apart where an engine was compiled first."""
    return {
        "runtime_version": series[0].runtime_version if series else "",
        "first_inference_ms": _median_ms([s.first_inference_ns for s in series]),
        "init_ms": _median_ms([s.init_time_ns for s in series if s.engine_cache != "cold"]),
        "init_cold_ms": _median_ms([s.init_time_ns for s in series if s.engine_cache == "cold"]),
    }


def _memory(series: Sequence[Series], absent: str) -> Fields:
    peak = _most(s.peak_memory_mb for s in series)
    untold = "the device does not tell a process's peak memory" if series else absent
    return {
        "peak_mb": peak,
        "peak_absent": untold if peak is None else "",
        "memory_delta_mb": _most(s.memory_delta_mb for s in series),
    }


def _accuracy(scored: Accuracy | None, absent: str) -> Fields:
    if scored is None:
        nothing = {"top1": None, "top1_error": None, "images": 0, "correct": 0, "evaluation": ""}
        return {**nothing, "top1_absent": absent, "predictions": None, "labels": None}
    share = scored.correct / scored.images
    return {
        "top1": share,
        "top1_error": math.sqrt(share * (1.0 - share) / scored.images),  # of a share, binomial
        "top1_absent": "",
        "images": scored.images,
        "correct": scored.correct,
        "evaluation": scored.evaluation,
        "predictions": scored.predictions,
        "labels": scored.labels,
    }


def _board(run: Run, series: Sequence[Series]) -> Fields:
    """The board's state while it was timed."""
    readings = [r for s in series for r in s.readings]
    return {
        "temperature_c": _span(r.temperature_c for r in readings),
        "frequency_mhz": _span(r.frequency_mhz for r in readings),
        "gpu_load": _span(r.gpu_load for r in readings),
        "gpu_frequency_mhz": _span(r.gpu_frequency_mhz for r in readings),
        "throttle": tuple(sorted({limit for r in readings for limit in r.throttle or ()})),
        "governor": run.governor or "",
        "governor_before": run.governor_before or "",
        "cooling": tuple(s.cooling for s in series if s.cooling is not None),
    }


def _disturbance(m: Measurement) -> Fields:
    """What else had the CPUs, which those were, and what watching took of them."""
    return {
        "foreign_cpu": _most(s.foreign_cpu for s in m.series),
        "waiting": _most(s.waiting / m.variant.threads for s in m.series if s.waiting is not None),
        "sampler_cpu": _most(s.sampling.cpu for s in m.series if s.sampling is not None),
        "affinity": m.series[0].affinity if m.series else (),
        "stride": max((s.stride for s in m.series), default=1),
    }


def _energy(m: Measurement) -> Fields:
    energy = measure_energy(m)
    return {
        "energy_mj": energy.net_mj,
        "energy_absent": energy.absent,
        "energy_gross_mj": energy.gross_mj,
        "energy_gross_absent": energy.gross_absent,
        "energy_scope": energy.scope,
        "energy_covers": energy.covers,
        "power_mw": energy.power_mw,
        "idle_power_mw": energy.idle_mw,
    }


def _ms(ns: float) -> float:
    return ns / 1e6


def _median_ms(values_ns: Sequence[int]) -> float | None:
    return _ms(statistics.median(values_ns)) if values_ns else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _span(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [v for v in values if v is not None]
    return (min(known), max(known)) if known else None
