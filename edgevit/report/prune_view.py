"""What pruning would take, and what it leaves because a choice rests on it. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from edgevit.results.retention import Pruning


def render_pruning(pruning: Pruning) -> RenderableType:
    """One row for each target and its bundles."""
    if not pruning.removed:
        return Group(Text("no run is beyond those limits"), *_held(pruning))
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("target", "bundle", "runs that go", "from", "to"):
        table.add_column(title, justify="right" if title == "runs that go" else "left", overflow="fold")
    groups = Counter((run.target, ", ".join(run.bundle_names)) for run in pruning.removed)
    for (target, names), count in sorted(groups.items()):
        ended = [r.ended_at for r in pruning.removed if (r.target, ", ".join(r.bundle_names)) == (target, names)]
        table.add_row(target, names, f"{count:,}", min(ended), max(ended))
    return Group(table, *_held(pruning))


def _held(pruning: Pruning) -> list[Text]:
    return [Text(f"run {run.run_id} on {run.target} stays: a choice rests on it", style="dim") for run in pruning.evidence]


def json_pruning(pruning: Pruning) -> dict[str, Any]:
    from device_agents.wire import encode

    return {"removed": [encode(run) for run in pruning.removed], "evidence": [encode(run) for run in pruning.evidence]}
