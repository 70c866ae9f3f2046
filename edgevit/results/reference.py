"""Summaries held against the fp32 of their own target: × fp32, and the share of images on which both say the same. Pure."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from edgevit.results.summary import Summary, with_values


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
