"""A bundle's latency on one target over its versions, each variant for itself, and where it changed. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from device_agents.wire import Measurement, Run
from edgevit.results.conditions import Difference, differences
from edgevit.results.steps import LEAST_RUNS, Step, find_steps


@dataclass(frozen=True)
class VersionRuns:
    """What one version of a bundle gave: the p50 of each run, oldest first, in ms, and their geometric mean.

    ``version`` is the UTC second it was built in, None where no run recorded it."""

    bundle: str
    version: int | None
    first_measured: str
    runs: tuple[str, ...]
    p50_ms: tuple[float, ...]

    @property
    def mean_ms(self) -> float:
        return math.exp(statistics.fmean(map(math.log, self.p50_ms)))


@dataclass(frozen=True)
class FoundStep:
    """A step, the first version after it, and what else than the version changed from the run before it to the run after."""

    step: Step
    bundle: str
    also_changed: tuple[Difference, ...]


@dataclass(frozen=True)
class History:
    """One variant under one plan. ``ordered_by`` is ``version``, or ``measured`` where no run told the version of some.
    ``left_out``: runs that do not count, and why; ``absent``: why no step can be told."""

    variant: str
    plan: str
    ordered_by: str
    versions: tuple[VersionRuns, ...]
    steps: tuple[FoundStep, ...]
    absent: str
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Point:
    run: Run
    measurement: Measurement
    p50_ms: float


def trace_history(runs: Iterable[Run], bundle_name: str, target: str, *, anyway: bool = False) -> list[History]:
    """Every variant of ``bundle_name`` that ``runs`` measured on ``target``, by its name. ``anyway``: INVALID figures count."""
    from edgevit.results.stats import summarize

    points: dict[tuple[str, str], list[_Point]] = {}
    left_out: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if run.job.target != target or not any(m.bundle_name == bundle_name for m in run.measurements):
            continue
        summaries = {(s.bundle, s.artifact, s.runtime, s.provider, s.threads): s for s in summarize(run)}
        for m in run.measurements:
            if m.bundle_name != bundle_name:
                continue
            v = m.variant
            s = summaries[v.bundle, v.artifact, v.runtime, v.provider, v.threads]
            key = f"{v.artifact}:{v.runtime}:{v.provider}:{v.threads}", run.job.plan.name
            points.setdefault(key, [])
            if s.failure or not s.p50_ms:
                left_out.setdefault(key, []).append(f"{run.job.run_id}: {(s.failure or s.p50_absent).splitlines()[0]}")
            elif not (s.verdict.valid or anyway):
                left_out.setdefault(key, []).append(f"{run.job.run_id}: INVALID: {'; '.join(s.verdict.reasons)}")
            else:
                points[key].append(_Point(run, m, s.p50_ms))
    return [_trace(*key, some, left_out.get(key, ())) for key, some in sorted(points.items())]


def _trace(variant: str, plan: str, points: Sequence[_Point], left_out: Sequence[str]) -> History:
    versions = {p.measurement.variant.bundle: version_of(p.run, p.measurement) for p in points}
    for p in points:  # a run may not know the version of what another does
        versions[p.measurement.variant.bundle] = versions[p.measurement.variant.bundle] or version_of(p.run, p.measurement)
    first = {}
    for p in sorted(points, key=lambda p: p.run.started_at, reverse=True):
        first[p.measurement.variant.bundle] = p.run.started_at
    known = all(v is not None for v in versions.values())
    ordered = sorted(
        points,
        key=lambda p: (
            (versions[p.measurement.variant.bundle] or 0) if known else 0,
            first[p.measurement.variant.bundle],
            p.measurement.variant.bundle,
            p.run.started_at,
        ),
    )
    bundles = [p.measurement.variant.bundle for p in ordered]
    steps = find_steps([p.p50_ms for p in ordered], bundles)
    return History(
        variant=variant,
        plan=plan,
        ordered_by="version" if known else "measured",
        versions=tuple(
            VersionRuns(
                bundle,
                versions[bundle],
                first[bundle],
                tuple(p.run.job.run_id for p in ordered if p.measurement.variant.bundle == bundle),
                tuple(p.p50_ms for p in ordered if p.measurement.variant.bundle == bundle),
            )
            for bundle in dict.fromkeys(bundles)
        ),
        steps=tuple(FoundStep(s, bundles[s.index], _also(ordered[s.index - 1], ordered[s.index])) for s in steps),
        absent=_absent(len(points), len(versions)),
        left_out=tuple(left_out),
    )


def _absent(runs: int, versions: int) -> str:
    if versions < 2:
        return f"{versions} version{'s' if versions != 1 else ''} measured: a step needs two"
    if runs < LEAST_RUNS:
        return f"{runs} runs count: fewer than {LEAST_RUNS} cannot tell a step from chance"
    return ""


def _also(before: _Point, after: _Point) -> tuple[Difference, ...]:
    return differences((before.run, before.measurement), (after.run, after.measurement))


def version_of(run: Run, m: Measurement) -> int | None:
    """The version of the bundle, as the device listed what was installed when it was measured."""
    return next((b.version for b in run.facts.bundles if b.bundle == m.variant.bundle), None)
