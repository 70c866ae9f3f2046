"""Accuracy class by class, and the images on which variants disagree, from the predictions in the store. Pure.

Predictions are compared where they are of the same images: one model, one evaluation set, the same labels. The same file in the
same runtime need not be shown once a device; where its devices disagree that is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from edgevit.report.page_rows import short
from edgevit.results.summary import Summary

FEWEST_IMAGES = 5
"""Of a class: with fewer, one image is a fifth of it or more."""
MOST_CLASSES = 40
MOST_VARIANTS = 16
MOST_IMAGES = 60

Key = tuple[str, str, str, str]


def accuracy_groups(
    summaries: Sequence[Summary], rows: Mapping[int, int], names: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """One group a model and evaluation set that at least one variant was scored on.

    ``rows``: ``id`` of a summary → its place in the page's table. ``names``: bundle → its class names, where known.
    """
    sets: dict[tuple[object, ...], dict[Key, list[Summary]]] = {}
    for s in summaries:
        if s.predictions is not None and s.labels and not s.failure:
            key = (s.artifact_sha256, s.runtime, s.provider, s.runtime_version)
            sets.setdefault((s.model, s.evaluation, s.labels), {}).setdefault(key, []).append(s)
    return [_group(list(found.values()), rows, names or {}) for found in sets.values()]


def _group(found: list[list[Summary]], rows: Mapping[int, int], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    # fp32 first: it is what the others are held against.
    found.sort(key=lambda same: (same[0].scheme != "fp32", same[0].recipe != "fp32", same[0].runtime != "onnxruntime"))
    newest, of = _newest(found)
    labels = newest[0].labels or ()
    predictions = [s.predictions or () for s in newest]
    called = next((names[s.bundle] for s in newest if s.bundle in names), ())
    return {
        "model": newest[0].model,
        "evaluation": newest[0].evaluation,
        "images": len(labels),
        "variants": [rows[id(s)] for s in newest],
        "variants_of": of,
        "names": list(called),
        "devices_disagree": _devices_disagree(found),
        **_classes(labels, predictions),
        **_disagreements(labels, predictions),
    }


def _newest(found: Sequence[Sequence[Summary]]) -> tuple[list[Summary], int]:
    """The newest build of each variant, at most :data:`MOST_VARIANTS` of them; and how many there are."""
    named: dict[tuple[str, str, str], Summary] = {}
    for same in found:
        last = max(same, key=lambda s: (s.started_at, s.run_id))
        key = (last.label, last.runtime, last.provider)
        named[key] = max(named.get(key, last), last, key=lambda s: (s.started_at, s.run_id))
    return list(named.values())[:MOST_VARIANTS], len(named)


def _classes(labels: Sequence[int], predictions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Per class of enough images [class, images, top-1 % of each variant]; of many classes those where variants differ most,
    then the worst."""
    counts = Counter(labels)
    correct = [Counter(y for y, p in zip(labels, one, strict=True) if y == p) for one in predictions]
    table = [
        (c, counts[c], [100 * right[c] / counts[c] for right in correct]) for c in sorted(counts) if counts[c] >= FEWEST_IMAGES
    ]
    total = len(table)
    if total > MOST_CLASSES:
        spread = sorted(table, key=lambda row: (min(row[2]) - max(row[2]), sum(row[2]), row[0]))
        table = sorted(spread[:MOST_CLASSES], key=lambda row: row[0])
    return {
        "classes": [[c, images, [short(v) for v in shares]] for c, images, shares in table],
        "classes_of": total,
        "classes_few": len(counts) - total,
    }


def _disagreements(labels: Sequence[int], predictions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Images on which not all variants say the same: [image, label, prediction of each], the most disputed first."""
    told: list[tuple[int, ...]] = list(zip(*predictions, strict=True))
    disputed = [(sum(p != one[0] for p in one), i) for i, one in enumerate(told) if len(set(one)) > 1]
    worst = sorted(disputed, key=lambda d: (-d[0], d[1]))[:MOST_IMAGES]
    return {"disputed": [[i, labels[i], list(told[i])] for _, i in worst], "disputed_of": len(disputed)}


def _devices_disagree(found: Sequence[Sequence[Summary]]) -> list[str]:
    """The same file in the same runtime, with other answers on another device."""
    told = []
    for same in found:
        per_device = {s.target: s.predictions or () for s in same}
        if len(per_device) < 2:
            continue
        differing = sum(len(set(answers)) > 1 for answers in zip(*per_device.values(), strict=True))
        if differing:
            told.append(f"{same[0].label} in {same[0].runtime}: {len(per_device)} devices differ on {differing:,} images")
    return told
