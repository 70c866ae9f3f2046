"""What can be exported, as tables for people: pure functions, within 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.report.table import EMPTY

if TYPE_CHECKING:
    from edgevit.coverage.cells import Row
    from edgevit.coverage.families import Family

CELLS = (("onnx", "fp32"), ("onnx", "int8-dynamic"), ("tflite", "fp32"), ("tflite", "int8-dynamic"))


def render_families(families: Sequence[Family]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("family", "kind", "smallest member"):
        table.add_column(title, no_wrap=True)
    for family in families:
        table.add_row(family.name, family.kind, family.member)
    return table


def render_coverage(rows: Sequence[Row]) -> RenderableType:
    """A line a family with the smallest cosine of each file that passed, then every failure with its reason, then shares."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("family", no_wrap=True)
    for title in ("M params", "M MACs", *(f"{f} {s.removesuffix('-dynamic')}" for f, s in CELLS)):
        table.add_column(title, justify="right", no_wrap=True)
    known = {(r.family, r.format, r.scheme): r for r in rows}
    for family in dict.fromkeys(r.family for r in rows):
        sized = next((r for r in rows if r.family == family and r.parameters), None)
        found = [known.get((family, *cell)) for cell in CELLS]
        table.add_row(
            family,
            f"{sized.parameters / 1e6:.1f}" if sized else EMPTY,
            f"{sized.macs / 1e6:,.0f}" if sized and sized.macs else EMPTY,
            *(_cell(row) for row in found),
        )
    parts: list[RenderableType] = [table, Text("smallest cosine with the PyTorch module over the images", style="dim")]
    failed = [r for r in rows if not r.passed]
    if failed:
        parts.append(Text())
        for row in failed:
            parts.append(Text.assemble((f"{row.family} {row.format} {row.scheme}", "bold red"), f", {row.stage}: {row.reason}"))
    return Group(*parts, Text(), *(Text(line) for line in shares(rows)))


def _cell(row: Row | None) -> Text:
    if row is None:
        return Text(EMPTY, style="dim")
    if row.min_cosine is None or not row.passed:
        return Text("failed", style="red")
    return Text(f"{row.min_cosine:.5f}", style="green")


def shares(rows: Sequence[Row]) -> list[str]:
    """``onnx fp32: 44 of 45 families (97.8 %)`` for each format and scheme there is."""
    lines = []
    for format_, scheme in CELLS:
        cells = [r for r in rows if (r.format, r.scheme) == (format_, scheme)]
        if cells:
            passed = sum(r.passed for r in cells)
            lines.append(f"{format_} {scheme}: {passed} of {len(cells)} families ({100 * passed / len(cells):.1f} %)")
    return lines
