"""How far devices of one kind differ in the same variant, beside the noise of measuring. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgevit.report.page_rows import short
from edgevit.results.spread import devices_of
from edgevit.results.summary import Summary
from edgevit.results.variance import Component, variance_components

Key = tuple[str, str, str, str, str, int]


def fleet_groups(summaries: Sequence[Summary], rows: Mapping[int, int]) -> list[dict[str, Any]]:
    """One group for each variant that is VALID on two or more targets of one board: the newest figure of each target, and the
    spread by source. Most devices first."""
    found: dict[Key, dict[str, list[Summary]]] = {}
    device = devices_of(summaries)
    for s in summaries:
        if s.rankable and s.sustained is None and s.p50_ms:
            key = (s.board, s.model, s.artifact_sha256, s.runtime, s.provider, s.threads)
            found.setdefault(key, {}).setdefault(device[s.target], []).append(s)
    groups = [_group(devices, rows) for devices in found.values() if len(devices) > 1]
    return sorted(groups, key=lambda g: -len(g["rows"]))


def _group(devices: Mapping[str, Sequence[Summary]], rows: Mapping[int, int]) -> dict[str, Any]:
    newest = [max(runs, key=lambda s: (s.started_at, s.run_id)) for runs in devices.values()]
    newest.sort(key=lambda s: (s.p50_ms or 0.0, s.target))
    measured = {name: [s.process_p50_ms or (s.p50_ms or 0.0,) for s in runs] for name, runs in devices.items()}
    told = variance_components(measured)
    return {
        "board": newest[0].board,
        "model": newest[0].model,
        "rows": [rows[id(s)] for s in newest],
        "own": [[short(v) for v in s.process_p50_ms] for s in newest],
        "middle": short(told.geometric_mean),
        "runs": told.runs,
        "differ": told.devices_differ,
        "spread": [_component(c) for c in told.components],
    }


def _component(c: Component) -> dict[str, Any]:
    low, high = c.interval if c.interval else (None, None)
    return {
        "name": c.name,
        "percent": None if c.spread is None else short(100 * c.spread),
        "low": None if low is None else short(100 * low),
        "high": None if high is None else short(100 * high),
        "groups": c.groups,
        "absent": c.absent,
    }
