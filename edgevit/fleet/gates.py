"""What a roll-out holds a new version against on each device: the version that was active there before. Pure.

Golden outputs need no gate of their own: a device activates nothing that does not reproduce them. The others are measured in
one job, the two variants interleaved in ABBA blocks of fresh processes (:mod:`edgevit.results.compare`):

- ``p90``: the ratio of the two p90, new ÷ before, with its 95 % interval. It holds where the whole interval lies below the
  limit (a test of non-inferiority: Walker and Nowacki, Understanding equivalence and noninferiority testing, J Gen Intern Med
  2011), so an interval that is wide because the measurement was disturbed does not hold it;
- ``accuracy``: top-1 on the labelled images that the bundles carry, the same ones for both;
- ``memory``: the largest peak of resident memory of a worker.

What cannot be judged does not hold, unless it is waived by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from device_agents.wire import Accuracy, Facts, Manifest, Measurement, Run, Variant
from edgevit.fleet.audit import Entry
from edgevit.results.compare import Comparison, compare_pairs

GATES = ("p90", "accuracy", "memory")


@dataclass(frozen=True)
class Limits:
    """``p90_growth`` and ``memory_growth`` in percent of what was active before, ``top1_loss`` in points; ``without``: gates
    that are waived."""

    p90_growth: float = 10.0
    memory_growth: float = 10.0
    top1_loss: float = 1.0
    without: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """The gates that are to hold."""
        return tuple(name for name in GATES if name not in self.without)

    def text(self) -> str:
        """In one line, for people and to tell whether a verdict was under the same limits."""
        limits = {
            "p90": f"p90 +{self.p90_growth:g} %",
            "accuracy": f"top-1 -{self.top1_loss:g} points",
            "memory": f"memory +{self.memory_growth:g} %",
        }
        held = [limits[name] for name in self.wanted]
        return ", ".join(held + [f"without {name}" for name in GATES if name in self.without])


@dataclass(frozen=True)
class Gate:
    """One gate on one device: whether it ``held``, in words ``text``; ``judged`` false where nothing could be said."""

    name: str
    held: bool
    text: str
    judged: bool = True


def find_unjudgeable(limits: Limits, manifest: Manifest, facts: Facts, before: Variant | None) -> list[tuple[str, str]]:
    """The gates that cannot be judged on a device whatever is measured, each with why."""
    wanted = limits.wanted
    if before is None:
        return [(name, facts.absent.get("active", "nothing was active before it")) for name in wanted]
    if all(b.bundle != before.bundle for b in facts.bundles):
        return [(name, f"the bundle {before.bundle[:12]} that was active before is gone from it") for name in wanted]
    if "accuracy" in wanted and manifest.evaluation is None:
        return [("accuracy", manifest.evaluation_absent or "the bundle carries no labelled images")]
    return []


def judge_run(run: Run, before: Variant, now: Variant, limits: Limits) -> tuple[Gate, ...]:
    """The wanted gates from a comparing run of ``before`` (A) and ``now`` (B)."""
    found = {m.variant: m for m in run.measurements}
    a, b = found.get(before), found.get(now)
    if a is None or b is None:
        return tuple(_unjudged(name, f"the run {run.job.run_id} holds no measurement of both") for name in limits.wanted)
    for side, which in ((a, "before"), (b, "now")):
        if side.failure is not None:
            why = f"what is active {which} could not be measured: {side.failure.code}: {_first_line(side.failure.message)}"
            return tuple(Gate(name, False, why, judged=which == "now") for name in limits.wanted)
    return tuple(_judge(name, run, a, b, limits) for name in limits.wanted)


def _judge(name: str, run: Run, a: Measurement, b: Measurement, limits: Limits) -> Gate:
    if name == "p90":
        (comparison,) = compare_pairs(run, 0.9)
        return judge_p90(comparison, limits.p90_growth)
    if name == "accuracy":
        return judge_accuracy(a.accuracy, b.accuracy, a.accuracy_absent or b.accuracy_absent, limits.top1_loss)
    return judge_memory(_peak(a), _peak(b), limits.memory_growth)


def judge_p90(comparison: Comparison, growth: float) -> Gate:
    """Held where the upper end of the ratio's interval is at most 1 + ``growth`` %."""
    if comparison.ratio is None or comparison.interval is None:
        more = [f"{len(comparison.left_out) - 1} more were left out"] if len(comparison.left_out) > 1 else []
        return _unjudged("p90", "; ".join([comparison.absent, *comparison.left_out[:1], *more]))
    low, high = comparison.interval
    limit = 1.0 + growth / 100.0
    shown = f"p90 {comparison.ratio:.3f} times what it was ({low:.3f} to {high:.3f}, 95 %), at most {limit:.3f} is allowed"
    if high <= limit:
        return Gate("p90", True, shown)
    undecided = "; the interval leaves it open, --gate-blocks makes it narrower" if low <= limit else ""
    return Gate("p90", False, shown + undecided, judged=not undecided)


def judge_accuracy(before: Accuracy | None, now: Accuracy | None, absent: str, loss: float) -> Gate:
    """Held where top-1 fell by at most ``loss`` points on the same images."""
    if before is None or now is None:
        return _unjudged("accuracy", absent or "top-1 was not counted")
    if before.labels != now.labels:
        return _unjudged("accuracy", f"it was counted on other images before ({before.evaluation}) than now ({now.evaluation})")
    a, b = (100.0 * one.correct / one.images for one in (before, now))
    shown = f"top-1 {b:.2f} % after {a:.2f} % of {now.images:,} images, at most {loss:g} points less is allowed"
    return Gate("accuracy", a - b <= loss + 1e-9, shown)


def judge_memory(before_mb: float | None, now_mb: float | None, growth: float) -> Gate:
    """Held where the peak grew by at most ``growth`` %."""
    if before_mb is None or now_mb is None or before_mb <= 0:
        return _unjudged("memory", "its peak of memory cannot be read there")
    shown = f"peak memory {now_mb:.1f} MB after {before_mb:.1f} MB, at most {growth:g} % more is allowed"
    return Gate("memory", now_mb <= before_mb * (1.0 + growth / 100.0), shown)


def _peak(measurement: Measurement) -> float | None:
    return max((s.peak_memory_mb for s in measurement.series if s.peak_memory_mb is not None), default=None)


def _unjudged(name: str, why: str) -> Gate:
    return Gate(name, False, f"{name} cannot be judged: {why}", judged=False)


def _first_line(text: str) -> str:
    return text.split("\n")[0]


def find_stored(entries: Sequence[Entry], target: str, activated_at: str, limits: Limits) -> Entry | None:
    """The audit log's entry of gates that held for this very activation on ``target``, under these limits."""
    for entry in reversed(entries):
        if entry.target == target and entry.action == "gate" and entry.outcome == "done":
            same = entry.details.get("activated_at") == activated_at and entry.details.get("limits") == limits.text()
            return entry if same else None
    return None
