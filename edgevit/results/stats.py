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
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from device_agents.verdict import RULES_VERSION
from device_agents.wire import Cooling, Measurement, OperatorProfile, Reading, Run, Series, Variant, Verdict
from edgevit.results.energy import measure_energy
from edgevit.results.intervals import percentile_interval
from edgevit.results.sustained import Sustained, describe_sustained

P90_SAMPLES = 64
P99_SAMPLES = 662
CONFIDENCE = 0.99
CONFIDENCE_OF_MEDIAN = 0.95

Judge = Callable[[Run, Measurement], Verdict]


@dataclass(frozen=True)
class Summary:
    """One measurement of one run in figures.

    Times in milliseconds, memory and files in megabytes (10⁶ bytes); top-1, its standard error and agreement as shares of 1.
    ``energy_mj`` is net of the idle board, ``energy_gross_mj`` is not; both are an inference's, within ``energy_scope``.
    ``sampler_cpu`` is the share of one core that watching the board took while timed. What is None has its reason in the field
    of the same name ending in ``_absent``. ``interval_of`` says what the intervals repeat: ``processes``, or ``samples`` where
    there are too few of those: what differs from process to process is then not in them. ``mismatch``: how the outputs differ
    from those recorded at build time, or empty. ``boot_id``: the kernel's name for the board's time since it started.
    """

    run_id: str
    batch_id: str
    target: str
    board: str
    model: str
    recipe: str
    bundle: str
    bundle_name: str
    artifact: str
    artifact_sha256: str
    format: str
    scheme: str
    runtime: str
    runtime_version: str
    provider: str
    threads: int
    batch: int
    plan: str
    started_at: str
    processes: int
    n: int
    p50_ms: float | None
    p50_absent: str
    p90_ms: float | None
    p90_absent: str
    p99_ms: float | None
    p99_absent: str
    p90_early_stopping_ms: float | None
    mean_ms: float | None
    std_ms: float | None
    min_ms: float | None
    max_ms: float | None
    process_p50_ms: tuple[float, ...]
    first_inference_ms: float | None
    init_ms: float | None
    init_cold_ms: float | None
    peak_mb: float | None
    peak_absent: str
    memory_delta_mb: float | None
    file_mb: float | None
    top1: float | None
    top1_error: float | None
    top1_absent: str
    images: int
    correct: int
    evaluation: str
    failure: str
    verdict: Verdict
    temperature_c: tuple[float, float] | None = None
    frequency_mhz: tuple[float, float] | None = None
    throttle: tuple[str, ...] = ()
    governor: str = ""
    boot_id: str | None = None
    gpu_load: tuple[float, float] | None = None
    gpu_frequency_mhz: tuple[float, float] | None = None
    energy_mj: float | None = None
    energy_absent: str = "nothing was timed"
    energy_gross_mj: float | None = None
    energy_gross_absent: str = "nothing was timed"
    energy_scope: str = ""
    energy_covers: str = ""
    power_mw: float | None = None
    idle_power_mw: float | None = None
    sampler_cpu: float | None = None
    speedup: float | None = None
    speedup_absent: str = "no fp32 was measured beside it"
    reference: str = ""
    agreement: float | None = None
    agreement_absent: str = "no fp32 was scored beside it"
    p50_interval_ms: tuple[float, float] | None = None
    p90_interval_ms: tuple[float, float] | None = None
    p99_interval_ms: tuple[float, float] | None = None
    interval_of: str = ""
    mismatch: str = ""
    p99_early_stopping_ms: float | None = None
    images_per_s: float | None = None
    image_p50_ms: float | None = None
    foreign_cpu: float | None = None
    waiting: float | None = None
    affinity: tuple[int, ...] = ()
    stride: int = 1
    cooling: tuple[Cooling, ...] = ()
    governor_before: str = ""
    sustained: Sustained | None = None
    profile: OperatorProfile | None = field(default=None, repr=False)
    profile_absent: str = ""
    predictions: tuple[int, ...] | None = field(default=None, repr=False)
    labels: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The artifact's name, with the recipe's where the name does not hold it already."""
        return self.artifact if self.recipe in self.artifact or not self.recipe else f"{self.recipe}/{self.artifact}"

    @property
    def rankable(self) -> bool:
        """Whether the figure may enter a ranking: measured, and VALID."""
        return self.p50_ms is not None and not self.failure and self.verdict.valid


def percentile(ordered: Sequence[int], q: float) -> int:
    """The nearest-rank percentile of samples in ascending order; ``q`` in (0, 1]. ValueError where there are none."""
    if not ordered:
        raise ValueError("no samples")
    if not 0.0 < q <= 1.0:
        raise ValueError(f"got q={q}, expected more than 0 and at most 1")
    # The tiny shift keeps 0.9 × 10 at rank 9: in binary the product may come out a hair above the whole number.
    return ordered[max(1, math.ceil(q * len(ordered) - 1e-9)) - 1]


def early_stopping_rank(n: int, q: float, confidence: float = CONFIDENCE) -> int:
    """LoadGen's t: the largest number of slower samples among n such that, were the true q-percentile any slower than the
    estimate, seeing t or fewer above it would have probability ≤ 1 − confidence. 0 where n is too small for t = 1.

    LoadGen searches h_min(t), the fewest samples below the bound for t above it; with tolerance 0 its condition is the
    binomial tail P[Bin(n, 1 − q) ≤ t] ≤ 1 − confidence, summed here directly.
    """
    if n < 1:
        return 0
    log_q, log_rest = math.log(q), math.log1p(-q)
    log_term = n * log_q  # P[Bin = 0], as a logarithm: it underflows from some thousand samples on
    tail = math.exp(log_term)
    limit = 1.0 - confidence
    t = 0
    while t < n:
        log_term += math.log((n - t) / (t + 1)) + log_rest - log_q
        tail += math.exp(log_term)
        if tail > limit + 1e-12:
            break
        t += 1
    return t


def early_stopping_percentile(ordered: Sequence[int], q: float, confidence: float = CONFIDENCE) -> int | None:
    """LoadGen's estimate of the ``q``-percentile from samples in ascending order; None where there are too few."""
    t = early_stopping_rank(len(ordered), q, confidence)
    return ordered[len(ordered) - t] if t >= 1 else None


def median_interval(series: Sequence[Sequence[int]], confidence: float = CONFIDENCE_OF_MEDIAN) -> tuple[int, int] | None:
    """Where the median of all ``series`` lies with ``confidence``, as the module says; None where there are too few samples."""
    ordered = sorted(ns for one in series for ns in one)
    n = len(ordered)
    if n == 0 or 2.0 * 0.5**n > 1.0 - confidence:
        return None
    # LoadGen's rank is the same binomial tail: of q = 1/2 at each end.
    t = early_stopping_rank(n, 0.5, 1.0 - (1.0 - confidence) / 2)
    own = [percentile(sorted(one), 0.5) for one in series if one]
    return min(ordered[t], *own), max(ordered[n - 1 - t], *own)


def summarize(run: Run, judge: Judge | None = None) -> list[Summary]:
    """One :class:`Summary` per variant the job asked for, in the job's order; a variant that was never reached has its reason.

    ``judge`` makes the verdict; left out, it is :func:`device_agents.verdict.judge`, the only one there is outside tests.
    """
    if judge is None:
        from device_agents.verdict import judge as rules

        judge = rules
    found = [_summarize_one(run, m, judge(run, m)) for m in run.measurements]
    reached = {m.variant for m in run.measurements}
    return found + [_never_reached(run, v) for v in run.job.variants if v not in reached]


def summarize_all(runs: Iterable[Run], judge: Judge | None = None) -> list[Summary]:
    """Every run's summaries, related to their fp32."""
    return relate([s for run in runs for s in summarize(run, judge)])


def _summarize_one(run: Run, m: Measurement, verdict: Verdict) -> Summary:
    ordered = sorted(ns for one in m.series for ns in one.samples_ns)
    n = len(ordered)
    failure = f"{m.failure.code}: {m.failure.message}" if m.failure else ""
    none = failure or "nothing was timed"
    peaks = [s.peak_memory_mb for s in m.series if s.peak_memory_mb is not None]
    deltas = [s.memory_delta_mb for s in m.series if s.memory_delta_mb is not None]
    readings = [r for s in m.series for r in s.readings]
    scored = m.accuracy
    share = scored.correct / scored.images if scored else None
    early, early99 = (early_stopping_percentile(ordered, q) for q in (0.9, 0.99))
    total = sum(ordered)
    waits = [s.waiting / m.variant.threads for s in m.series if s.waiting is not None]
    foreign = [s.foreign_cpu for s in m.series if s.foreign_cpu is not None]
    intervals, interval_of = _intervals(m.series, ordered)
    energy = measure_energy(m)
    return Summary(
        run_id=run.job.run_id,
        batch_id=run.job.batch_id,
        target=run.job.target,
        board=run.facts.board_model or run.facts.cpu_model or run.facts.machine,
        boot_id=run.facts.boot_id,
        model=m.model,
        recipe=m.recipe,
        bundle=m.variant.bundle,
        bundle_name=m.bundle_name,
        artifact=m.variant.artifact,
        artifact_sha256=m.artifact_sha256,
        format=m.format,
        scheme=m.scheme,
        runtime=m.variant.runtime,
        runtime_version=m.series[0].runtime_version if m.series else "",
        provider=m.variant.provider,
        threads=m.variant.threads,
        batch=m.batch,
        plan=run.job.plan.name,
        started_at=run.started_at,
        processes=len(m.series),
        n=n,
        p50_ms=_ms(percentile(ordered, 0.5)) if n else None,
        p50_absent="" if n else none,
        p90_ms=_ms(percentile(ordered, 0.9)) if n >= P90_SAMPLES else None,
        p90_absent="" if n >= P90_SAMPLES else (_too_few(n, P90_SAMPLES) if n else none),
        p99_ms=_ms(percentile(ordered, 0.99)) if n >= P99_SAMPLES else None,
        p99_absent="" if n >= P99_SAMPLES else (_too_few(n, P99_SAMPLES) if n else none),
        p90_early_stopping_ms=_ms(early) if early is not None else None,
        mean_ms=_ms(statistics.fmean(ordered)) if n else None,
        std_ms=_ms(statistics.stdev(ordered)) if n > 1 else None,
        min_ms=_ms(ordered[0]) if n else None,
        max_ms=_ms(ordered[-1]) if n else None,
        process_p50_ms=tuple(_ms(percentile(sorted(s.samples_ns), 0.5)) for s in m.series if s.samples_ns),
        first_inference_ms=_ms(statistics.median(s.first_inference_ns for s in m.series)) if m.series else None,
        init_ms=_init_ms([s for s in m.series if s.engine_cache != "cold"]),
        init_cold_ms=_init_ms([s for s in m.series if s.engine_cache == "cold"]),
        peak_mb=max(peaks) if peaks else None,
        peak_absent="" if peaks else (none if not m.series else "the device does not tell a process's peak memory"),
        memory_delta_mb=max(deltas) if deltas else None,
        file_mb=m.artifact_bytes / 1e6,
        top1=share,
        top1_error=_standard_error(share, scored.images) if scored and share is not None else None,
        top1_absent="" if scored else (m.accuracy_absent or none),
        images=scored.images if scored else 0,
        correct=scored.correct if scored else 0,
        evaluation=scored.evaluation if scored else "",
        failure=failure,
        verdict=verdict,
        temperature_c=_span(r.temperature_c for r in readings),
        frequency_mhz=_span(r.frequency_mhz for r in readings),
        throttle=_throttle(readings),
        governor=run.governor or "",
        gpu_load=_span(r.gpu_load for r in readings),
        gpu_frequency_mhz=_span(r.gpu_frequency_mhz for r in readings),
        energy_mj=energy.net_mj,
        energy_absent=energy.absent,
        energy_gross_mj=energy.gross_mj,
        energy_gross_absent=energy.gross_absent,
        energy_scope=energy.scope,
        energy_covers=energy.covers,
        power_mw=energy.power_mw,
        idle_power_mw=energy.idle_mw,
        sampler_cpu=max((s.sampling.cpu for s in m.series if s.sampling is not None), default=None),
        p50_interval_ms=intervals[0],
        p90_interval_ms=intervals[1],
        p99_interval_ms=intervals[2],
        interval_of=interval_of,
        mismatch=next((s.golden.reason or "other outputs than recorded" for s in m.series if not s.golden.passed), ""),
        p99_early_stopping_ms=_ms(early99) if early99 is not None else None,
        images_per_s=m.batch * n / (total / 1e9) if total else None,
        image_p50_ms=_ms(percentile(ordered, 0.5)) / m.batch if n else None,
        foreign_cpu=max(foreign) if foreign else None,
        waiting=max(waits) if waits else None,
        affinity=m.series[0].affinity if m.series else (),
        stride=max((s.stride for s in m.series), default=1),
        cooling=tuple(s.cooling for s in m.series if s.cooling is not None),
        governor_before=run.governor_before or "",
        sustained=next((d for d in map(describe_sustained, m.series) if d is not None), None),
        profile=m.profile,
        profile_absent=m.profile_absent,
        predictions=scored.predictions if scored else None,
        labels=scored.labels if scored else None,
    )


def _intervals(series: Sequence[Series], ordered: Sequence[int]) -> tuple[list[tuple[float, float] | None], str]:
    """In ms, of p50, p90 and p99 where those are given; and what was repeated."""
    each = [sorted(one.samples_ns) for one in series]
    found: list[tuple[float, float] | None] = []
    for q, needed in ((0.5, 1), (0.9, P90_SAMPLES), (0.99, P99_SAMPLES)):
        interval = percentile_interval(each, q) if len(ordered) >= needed else None
        if interval is not None:
            shown = percentile(ordered, q)  # the pooled figure, which need not be any process's own
            interval = _ms(min(interval[0], shown)), _ms(max(interval[1], shown))
        found.append(interval)
    if found[0] is not None:
        return found, "processes"
    own = median_interval(each)
    return [(_ms(own[0]), _ms(own[1])) if own else None, *found[1:]], "samples" if own else ""


def _never_reached(run: Run, variant: Variant) -> Summary:
    """A row for what was asked and has no measurement: an absent row would hide it."""
    why = f"not measured: the run is {run.status}" + (f", {run.reason}" if run.reason else "")
    models = {m.model for m in run.measurements}
    return Summary(
        run_id=run.job.run_id,
        batch_id=run.job.batch_id,
        target=run.job.target,
        board=run.facts.board_model or run.facts.cpu_model or run.facts.machine,
        boot_id=run.facts.boot_id,
        model=models.pop() if len(models) == 1 else "",
        recipe="",
        bundle=variant.bundle,
        bundle_name="",
        artifact=variant.artifact,
        artifact_sha256="",
        format="",
        scheme="",
        runtime=variant.runtime,
        runtime_version="",
        provider=variant.provider,
        threads=variant.threads,
        batch=1,
        plan=run.job.plan.name,
        started_at=run.started_at,
        processes=0,
        n=0,
        p50_ms=None,
        p50_absent=why,
        p90_ms=None,
        p90_absent=why,
        p99_ms=None,
        p99_absent=why,
        p90_early_stopping_ms=None,
        mean_ms=None,
        std_ms=None,
        min_ms=None,
        max_ms=None,
        process_p50_ms=(),
        first_inference_ms=None,
        init_ms=None,
        init_cold_ms=None,
        peak_mb=None,
        peak_absent=why,
        memory_delta_mb=None,
        file_mb=None,
        top1=None,
        top1_error=None,
        top1_absent=why,
        images=0,
        correct=0,
        evaluation="",
        failure=why,
        energy_absent=why,
        energy_gross_absent=why,
        verdict=Verdict(rules=RULES_VERSION, valid=False, reasons=(why,), warnings=()),
        speedup_absent=why,
        agreement_absent=why,
    )


def relate(summaries: Sequence[Summary]) -> list[Summary]:
    """The same summaries with ``speedup`` and ``agreement`` against the fp32 of their own target, model, batch of runs, thread
    count and batch size."""
    groups: dict[tuple[object, ...], list[Summary]] = {}
    for s in summaries:
        groups.setdefault(_group(s), []).append(s)
    timed = {key: _reference(members, scored=False) for key, members in groups.items()}
    scored = {key: _reference(members, scored=True) for key, members in groups.items()}
    return [_relate_one(s, timed[_group(s)], scored[_group(s)]) for s in summaries]


def _group(s: Summary) -> tuple[object, ...]:
    return (s.batch_id, s.target, s.model, s.threads, s.batch)


def _reference(members: Sequence[Summary], *, scored: bool) -> Summary | None:
    """The fp32 that others are held against: the recipe ``fp32`` before others, ONNX on onnxruntime before others, VALID
    before INVALID."""
    plain = [s for s in members if s.scheme == "fp32" and (s.predictions is not None if scored else s.p50_ms is not None)]
    if not plain:
        return None
    return min(
        plain,
        key=lambda s: (
            s.recipe != "fp32",
            not scored and not s.rankable,
            s.runtime != "onnxruntime",
            s.provider != "CPUExecutionProvider",
            s.started_at,
            s.run_id,
        ),
    )


def _relate_one(s: Summary, timed: Summary | None, scored: Summary | None) -> Summary:
    changes: dict[str, object] = {}
    if s.failure:
        changes.update(speedup=None, speedup_absent=s.failure)  # what it gave before it failed is no measurement to compare
    elif not s.p50_ms:
        changes.update(speedup=None, speedup_absent=s.p50_absent or "its p50 is 0")
    elif timed is not None and timed.p50_ms is not None:
        name = f"{timed.label} on {timed.runtime} {timed.runtime_version}".strip()
        if not timed.verdict.valid and timed is not s:
            changes.update(speedup=None, speedup_absent=f"its reference, {name}, is INVALID", reference=name)
        else:
            changes.update(speedup=timed.p50_ms / s.p50_ms, speedup_absent="", reference=name)
    if s.predictions is None:
        changes.update(agreement=None, agreement_absent=s.top1_absent)
    elif scored is not None and scored.predictions is not None:
        if (s.evaluation, s.labels) != (scored.evaluation, scored.labels):
            changes.update(agreement=None, agreement_absent="the fp32 beside it was scored on other images")
        else:
            same = sum(map(operator.eq, s.predictions, scored.predictions))
            changes.update(agreement=same / len(s.predictions), agreement_absent="")
    return with_values(s, changes)


def with_values(s: Summary | None, values: Mapping[str, object]) -> Summary:
    """``s`` with other values, or a summary of ``values`` alone where they are all there: what ``dataclasses.replace`` and the
    constructor do, in a tenth of the time for so many fields."""
    made = object.__new__(Summary)
    made.__dict__.update({} if s is None else s.__dict__)
    made.__dict__.update(values)
    return made


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other point beats at both: less cost with at least the gain, or more gain at
    no more cost. Of equal points the first counts."""
    front = []
    best = -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


def _init_ms(series: Sequence[Series]) -> float | None:
    return _ms(statistics.median(s.init_time_ns for s in series)) if series else None


def _ms(ns: float) -> float:
    return ns / 1e6


def _too_few(n: int, needed: int) -> str:
    return f"{n} samples, {needed} are needed at 99 % confidence; bench with --plan standard"


def _standard_error(share: float, images: int) -> float:
    """Of a share, binomial."""
    return math.sqrt(share * (1.0 - share) / images)


def _span(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [v for v in values if v is not None]
    return (min(known), max(known)) if known else None


def _throttle(readings: Iterable[Reading]) -> tuple[str, ...]:
    return tuple(sorted({limit for r in readings for limit in r.throttle or ()}))
