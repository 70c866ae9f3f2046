"""Whether the figures of a run can be counted with: a device may write whatever its types allow. Pure.

One run that divides by zero would take the table, the page and the comparison of every other down with it.
"""

from __future__ import annotations

from device_agents.wire import Accuracy, Run, WireError


def verify_sound(run: Run) -> None:
    """Raises :class:`WireError`, naming the place, for an inference that took no time and for counts of images that contradict
    each other."""
    for i, m in enumerate(run.measurements):
        for k, one in enumerate(m.series):
            if min(one.samples_ns, default=1) <= 0:
                place = f"run.measurements[{i}].series[{k}].samples_ns"
                raise WireError(place, f"got {min(one.samples_ns)} ns, expected more than 0")
        if m.accuracy is not None:
            _verify_counts(m.accuracy, f"run.measurements[{i}].accuracy")


def _verify_counts(scored: Accuracy, place: str) -> None:
    told = (scored.images, len(scored.predictions), len(scored.labels))
    if len(set(told)) > 1:
        raise WireError(place, "got {} images, {} predictions and {} labels, expected as many of each".format(*told))
    if min(min(scored.predictions), min(scored.labels)) < 0:
        raise WireError(place, "got a class below 0")
    right = sum(p == y for p, y in zip(scored.predictions, scored.labels, strict=True))
    if scored.correct != right:
        raise WireError(place, f"got {scored.correct} images as right, its predictions have {right}")
