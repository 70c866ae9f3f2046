"""What must be equal for two figures to be compared: one key each, with what a run recorded. Pure."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from device_agents.wire import Facts, Measurement, Run

PLAN_FIELDS = (
    "order", "sustained", "warmup_iterations", "warmup_seconds", "min_samples", "min_seconds", "max_seconds", "cool_to_c",
    "cool_within_c",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A key in which two measurements differ, and what each had; empty where a run did not record it."""

    key: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.key}: A {self.a or 'not recorded'}, B {self.b or 'not recorded'}"


def differences(a: tuple[Run, Measurement], b: tuple[Run, Measurement]) -> tuple[Difference, ...]:
    """Every key in which the conditions of two measurements differ; none where their figures compare.

    A key that only one of them recorded differs too. Of the plan the number of processes is no condition: more of them make an
    interval narrower, and do not move the figure.
    """
    ours, theirs = describe(*a), describe(*b)
    found = [Difference(key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]]
    for key, pick in (("CPU clock", _cpu_mhz), ("GPU clock", _gpu_mhz)):
        one, other = pick(a[1]), pick(b[1])
        # The share by which a clock may drift within one measurement tells two settings apart as well.
        allowed = max(a[0].job.plan.max_frequency_drift, b[0].job.plan.max_frequency_drift)
        told_by_one = (one is None) != (other is None) and _timed(a[1]) and _timed(b[1])
        if told_by_one or (one and other and abs(one - other) > allowed * max(one, other)):
            found.append(Difference(key, *("" if mhz is None else f"{mhz:,.0f} MHz" for mhz in (one, other))))
    if a[1].accuracy is not None and b[1].accuracy is not None:
        one_set, other_set = images_of(a[1]), images_of(b[1])
        if one_set != other_set:
            found.append(Difference("evaluation images", one_set, other_set))
    return tuple(found)


def describe(run: Run, m: Measurement) -> dict[str, str]:
    """Key → what this measurement was made under, in words."""
    facts, plan, series = run.facts, run.job.plan, m.series
    mode = next((s.partition(":")[2] for s in facts.sensors if s.startswith("power-mode:")), "")
    found = {
        "board": board_of(facts),
        "power mode": mode,
        "runtime": m.variant.runtime,
        "runtime version": series[0].runtime_version if series else _offered(run, m),
        "provider": m.variant.provider,
        "threads": str(m.variant.threads),
        "CPUs": ",".join(map(str, series[0].affinity)) if series else ",".join(map(str, plan.affinity)),
        "batch size": str(m.batch),
        "plan": plan.name,
        "governor": run.governor or "",
    }
    return found | {f"plan's {field.replace('_', ' ')}": str(getattr(plan, field)) for field in PLAN_FIELDS}


def board_of(facts: Facts) -> str:
    """What tells one board from another in words, as far as the board itself does."""
    return facts.board_model or facts.cpu_model or facts.machine


def images_of(m: Measurement) -> str:
    """What a measurement was scored on: the name of the set, how many, and a digest of their labels in their order."""
    scored = m.accuracy
    if scored is None:
        return ""
    digest = hashlib.sha256(",".join(map(str, scored.labels)).encode()).hexdigest()[:8]
    return f"{scored.evaluation}, {scored.images:,} images (labels {digest})"


def _offered(run: Run, m: Measurement) -> str:
    return next((r.version for r in run.facts.runtimes if r.runtime == m.variant.runtime), "")


def _timed(m: Measurement) -> bool:
    return any(s.samples_ns for s in m.series)


def _cpu_mhz(m: Measurement) -> float | None:
    return _median([r.frequency_mhz for s in m.series for r in s.readings if r.frequency_mhz is not None])


def _gpu_mhz(m: Measurement) -> float | None:
    return _median([r.gpu_frequency_mhz for s in m.series for r in s.readings if r.gpu_frequency_mhz is not None])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
