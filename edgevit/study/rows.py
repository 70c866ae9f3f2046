"""The rows of a study: what each cell cost and what it kept, related to fp32 image by image. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from device_agents.wire import Manifest
from edgevit.results.summary import Summary


@dataclass(frozen=True)
class Row:
    """One cell on one target.

    ``state``: ``measured``, ``built`` (not measured: no target was asked for, or it was not reached), ``failed`` or ``n/a``;
    ``reason`` says why it is not ``measured``. Times in ms, sizes in MB (10⁶ bytes); ``top1``, ``difference`` (of top-1 to
    fp32, over the same images), their standard errors and ``agreement`` as shares of 1. ``lost`` and ``gained``: images that
    fp32 gets right and this cell wrong, and the other way; ``p_value`` of McNemar's exact test that both are equally likely
    (McNemar, Psychometrika 12, 1947). ``front``: no other cell of the same model and target is nowhere worse and somewhere
    better in top-1, p50 and file size.
    """

    model: str
    recipe: str
    format: str
    scheme: str
    target: str
    state: str
    reason: str = ""
    hint: str = ""
    bundle: str = ""
    parameters: int | None = None
    macs: int | None = None
    file_mb: float | None = None
    runtime: str = ""
    threads: int | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    speedup: float | None = None
    peak_mb: float | None = None
    top1: float | None = None
    top1_error: float | None = None
    top1_absent: str = ""
    images: int = 0
    difference: float | None = None
    difference_error: float | None = None
    lost: int | None = None
    gained: int | None = None
    p_value: float | None = None
    agreement: float | None = None
    valid: bool | None = None
    verdict: tuple[str, ...] = ()
    front: bool = False
    run: str = ""


def size_after(manifest: Manifest) -> tuple[int, int | None]:
    """(parameters, MACs of one image) after the last step that changed them, else the model's own."""
    parameters = next((s.parameters.after for s in reversed(manifest.steps) if s.parameters), manifest.model.parameters)
    macs = next((s.macs.after for s in reversed(manifest.steps) if s.macs), manifest.model.macs)
    return parameters, macs


def built_row(manifest: Manifest, digest: str, model: str, target: str, reason: str) -> Row:
    """The row of a cell as far as its bundle tells."""
    artifact = manifest.artifacts[0]
    parameters, macs = size_after(manifest)
    return Row(
        model=model, recipe=manifest.recipe.name, format=artifact.format, scheme=artifact.scheme, target=target,
        state="built", reason=reason, bundle=digest, parameters=parameters, macs=macs, file_mb=artifact.blob.size / 1e6,
    )  # fmt: skip


def measured_row(row: Row, s: Summary) -> Row:
    """``row`` with what was measured of it."""
    if s.failure:
        return replace(row, state="failed", reason=s.failure, threads=s.threads, runtime=s.runtime, run=s.run_id)
    return replace(
        row,
        state="measured",
        reason="",
        runtime=f"{s.runtime} {s.runtime_version}".strip(),
        threads=s.threads,
        p50_ms=s.p50_ms,
        p90_ms=s.p90_ms,
        speedup=s.speedup,
        peak_mb=s.peak_mb,
        top1=s.top1,
        top1_error=s.top1_error,
        top1_absent=s.top1_absent,
        images=s.images,
        valid=s.verdict.valid,
        verdict=s.verdict.warnings if s.verdict.valid else s.verdict.reasons,
        run=s.run_id,
    )


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images: the difference of their top-1 (second − first) with its standard error, the images
    only one of them gets right, McNemar's exact two-sided p, and the share of equal predictions."""

    difference: float
    error: float
    lost: int
    gained: int
    p_value: float
    agreement: float


def pair(reference: Sequence[int], predictions: Sequence[int], labels: Sequence[int]) -> Paired:
    """Compare class indices image by image. ValueError where the lengths differ or there are no images."""
    n = len(labels)
    if not n or not len(reference) == len(predictions) == n:
        raise ValueError(f"got {len(reference)}, {len(predictions)} and {n} entries, expected the same number and at least one")
    lost = sum(a == y != b for a, b, y in zip(reference, predictions, labels, strict=True))
    gained = sum(b == y != a for a, b, y in zip(reference, predictions, labels, strict=True))
    same = sum(a == b for a, b in zip(reference, predictions, strict=True))
    difference = (gained - lost) / n
    # Of the n differences (−1, 0 or 1 an image): their standard deviation over √n.
    error = math.sqrt(max(0.0, (lost + gained) / n - difference**2) / n)
    return Paired(difference, error, lost, gained, mcnemar(lost, gained), same / n)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p that of ``lost + gained`` images that changed, each was as likely lost as gained."""
    n = lost + gained
    tail = sum(math.comb(n, i) for i in range(min(lost, gained) + 1))
    return min(1.0, tail / 2 ** (n - 1)) if n else 1.0


def related(rows: Sequence[Row], summaries: Sequence[Summary | None]) -> list[Row]:
    """The rows with their paired figures against fp32 of the same model and target, and the front marked. ``summaries`` holds
    what each row was made from, None where it was not measured."""
    paired = [_paired(row, s, rows, summaries) for row, s in zip(rows, summaries, strict=True)]
    on_front: set[int] = set()
    for group in {(r.model, r.target, r.threads) for r in rows}:
        members = [i for i, r in enumerate(paired) if (r.model, r.target, r.threads) == group]
        points = [_point(paired[i]) for i in members]
        known = [(i, p) for i, p in zip(members, points, strict=True) if p is not None]
        on_front |= {known[k][0] for k in pareto([p for _, p in known])}
    return [replace(r, front=i in on_front) for i, r in enumerate(paired)]


def _paired(row: Row, s: Summary | None, rows: Sequence[Row], summaries: Sequence[Summary | None]) -> Row:
    if s is None or s.predictions is None or s.labels is None:
        return row
    candidates = [
        (r.recipe != "fp32", r.format != "onnx", r.threads != row.threads, i)
        for i, r in enumerate(rows)
        if (r.model, r.target, r.scheme) == (row.model, row.target, "fp32") and _scored(summaries[i])
    ]
    reference = summaries[min(candidates)[-1]] if candidates else None
    if reference is None or (reference.labels, reference.evaluation) != (s.labels, s.evaluation):
        return row
    p = pair(reference.predictions or (), s.predictions, s.labels)
    return replace(
        row, difference=p.difference, difference_error=p.error, lost=p.lost, gained=p.gained, p_value=p.p_value,
        agreement=p.agreement,
    )  # fmt: skip


def _scored(s: Summary | None) -> bool:
    return s is not None and s.predictions is not None


Point = tuple[float, float, float]
"""(top-1, p50 in ms, file in MB): the more of the first and the less of the others, the better."""


def _point(row: Row) -> Point | None:
    if row.state != "measured" or not row.valid or row.top1 is None or row.p50_ms is None or row.file_mb is None:
        return None
    return row.top1, row.p50_ms, row.file_mb


def pareto(points: Sequence[Point]) -> set[int]:
    """Indices of the points that no other beats: as good at everything and better at something. Equal points stay together."""
    return {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}


def beats(q: Point, p: Point) -> bool:
    """Whether ``q`` is nowhere worse than ``p`` and somewhere better."""
    return q != p and q[0] >= p[0] and q[1] <= p[1] and q[2] <= p[2]
