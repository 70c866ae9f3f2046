"""What was measured of candidates on one target, made comparable over many jobs by the baseline in each of them. Pure.

Every job of a search measures the baseline and the best candidate so far beside the new ones. A candidate's latency is its
ratio to the baseline in the same job (the median where it was in several) times the baseline's own median over all jobs: what
drifts from job to job cancels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from device_agents.wire import Run, RunPlan
from edgevit.results.stats import summarize
from edgevit.results.summary import Summary
from edgevit.study.rows import pair
from edgevit.tune.candidate import Candidate
from edgevit.tune.limits import Reached


@dataclass(frozen=True)
class Figures:
    """One candidate on one target. Times in ms, memory in MB, energy in mJ an inference; ``ratio``: its p50 ÷ the baseline's in
    the same job. ``interval_ms``: where its median lies with 95 % confidence, as :mod:`edgevit.results.stats` has it, of its
    newest job. ``loss``, ``lost``, ``gained`` as counted on the target, None where top-1 was not. ``runs``: the evidence;
    ``usable``: of them, how many gave a figure that counts. ``failure`` and ``doubt``: why there is none."""

    runs: tuple[str, ...]
    usable: int
    p50_ms: float | None = None
    ratio: float | None = None
    interval_ms: tuple[float, float] | None = None
    p90_ms: float | None = None
    memory_mb: float | None = None
    energy_mj: float | None = None
    energy_absent: str = ""
    loss: float | None = None
    lost: int | None = None
    gained: int | None = None
    p_value: float | None = None
    top1: float | None = None
    runtime: str = ""
    valid: bool = True
    warnings: tuple[str, ...] = ()
    failure: str = ""
    doubt: str = ""

    def reached(self, candidate: Candidate) -> Reached:
        """What the candidate comes to on this target; its loss as counted there, else on the host."""
        loss = candidate.loss if self.loss is None else self.loss
        return Reached(loss, self.p90_ms, self.memory_mb, candidate.size_mb, self.energy_mj)


@dataclass(frozen=True)
class _Taken:
    """One candidate and the baseline of one job."""

    own: Summary
    base: Summary


def read_figures(
    runs: Iterable[Run],
    candidates: Sequence[Candidate],
    baseline: Candidate,
    plan: RunPlan,
    *,
    anyway: bool,
    summarized: Callable[[Run], Sequence[Summary]] = summarize,
) -> dict[str, Figures]:
    """Figures by a candidate's key, of ``runs`` of one target under ``plan``; those never measured are absent.
    INVALID measurements count only with ``anyway``."""
    taken: dict[str, list[_Taken]] = {}
    failures: dict[str, tuple[str, str]] = {}
    attempts: dict[str, list[str]] = {}
    doubts: dict[str, str] = {}
    for run in sorted((r for r in runs if r.job.plan == plan), key=lambda r: (r.started_at, r.job.run_id)):
        summaries = {(s.bundle, s.threads): s for s in summarized(run)}
        base = summaries.get((baseline.bundle, baseline.threads))
        reached = {(m.variant.bundle, m.variant.threads) for m in run.measurements}
        for one in candidates:
            own = summaries.get((one.bundle, one.threads)) if one.built else None
            if own is None or own.run_id in attempts.get(one.key, []):
                continue
            attempts.setdefault(one.key, []).append(own.run_id)
            if own.failure and (one.bundle, one.threads) not in reached:
                doubts[one.key] = own.failure  # the device's power went, or the job was ended: another may come to it
            elif own.failure or own.mismatch:
                failures[one.key] = own.failure or f"other outputs than recorded: {own.mismatch}", own.run_id
            elif base is None or base.failure or base.p50_ms is None:
                doubts[one.key] = "the baseline beside it gave no figure"
            elif own.p50_ms is None:
                doubts[one.key] = own.p50_absent
            elif not anyway and not (own.rankable and base.rankable):
                wrong = own if not own.rankable else base
                doubts[one.key] = "INVALID: " + "; ".join(wrong.verdict.reasons)
            else:
                taken.setdefault(one.key, []).append(_Taken(own, base))
    base_ms = _baseline_ms(taken)
    found = {}
    for key, ids in attempts.items():
        if key in failures:
            found[key] = Figures(tuple(ids), 0, failure=failures[key][0])
        elif key not in taken:
            found[key] = Figures(tuple(ids), 0, doubt=doubts[key])
        else:
            found[key] = _figures(tuple(ids), taken[key], base_ms)
    return found


def _baseline_ms(taken: dict[str, list[_Taken]]) -> float:
    """The median of the baseline's p50 over all jobs."""
    by_run = {t.base.run_id: t.base.p50_ms or 0.0 for group in taken.values() for t in group}
    return statistics.median(by_run.values()) if by_run else 0.0


def _figures(runs: tuple[str, ...], group: Sequence[_Taken], base_ms: float) -> Figures:
    last, base = group[-1].own, group[-1].base
    ratios = [(t.own.p50_ms or 0.0) / (t.base.p50_ms or 1.0) for t in group]
    tails = [t.own.p90_ms / (t.base.p50_ms or 1.0) for t in group if t.own.p90_ms is not None]
    ratio = statistics.median(ratios)
    scale = base_ms / (base.p50_ms or 1.0)
    paired = None
    if last.predictions is not None and base.predictions is not None and last.labels is not None and last.labels == base.labels:
        paired = pair(base.predictions, last.predictions, last.labels)
    energies = [t.own.energy_mj for t in group if t.own.energy_mj is not None]
    peaks = [t.own.peak_mb for t in group if t.own.peak_mb is not None]
    return Figures(
        runs,
        len(group),
        p50_ms=ratio * base_ms,
        ratio=ratio,
        interval_ms=None
        if last.p50_interval_ms is None
        else (last.p50_interval_ms[0] * scale, last.p50_interval_ms[1] * scale),
        p90_ms=statistics.median(tails) * base_ms if tails else None,
        memory_mb=max(peaks) if peaks else None,
        energy_mj=statistics.median(energies) if energies else None,
        energy_absent=last.energy_absent,
        loss=None if paired is None else 100.0 * (paired.lost - paired.gained) / last.images,
        lost=None if paired is None else paired.lost,
        gained=None if paired is None else paired.gained,
        p_value=None if paired is None else paired.p_value,
        top1=last.top1,
        runtime=f"{last.runtime} {last.runtime_version}".strip(),
        valid=all(t.own.verdict.valid and t.base.verdict.valid for t in group),
        warnings=last.verdict.warnings if last.verdict.valid else last.verdict.reasons,
    )
