"""A study's rows as the table of a paper: for the terminal within 100 columns, as markdown, and as CSV. Pure."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.outputs import as_cell
from edgevit.report.table import EMPTY, SUPERSCRIPT, Footnotes
from edgevit.study.rows import Row

FRONT = "●"

Cell = Callable[[Row], str]


def _number(value: float | None, digits: int) -> str:
    return EMPTY if value is None else f"{value:,.{digits}f}"


def _ms(value: float | None) -> str:
    return _number(value, 2 if (value or 0) < 100 else 1)


def _points(value: float | None, error: float | None) -> str:
    if value is None:
        return EMPTY
    return f"{100 * value:+.2f}" + ("" if error is None else f" ±{100 * error:.2f}")


def _percent(value: float | None, digits: int = 2) -> str:
    return EMPTY if value is None else f"{100 * value:.{digits}f}"


NARROW: tuple[tuple[str, Cell], ...] = (
    ("param\nM", lambda r: _number(None if r.parameters is None else r.parameters / 1e6, 2)),
    ("MACs\nM", lambda r: _number(None if r.macs is None else r.macs / 1e6, 0 if (r.macs or 0) >= 1e8 else 1)),
    ("file\nMB", lambda r: _number(r.file_mb, 2)),
    ("p50\nms", lambda r: _ms(r.p50_ms)),
    ("×\nfp32", lambda r: _number(r.speedup, 2)),
    ("peak\nMB", lambda r: _number(r.peak_mb, 0 if (r.peak_mb or 0) >= 100 else 1)),
    ("top-1\n%", lambda r: _percent(r.top1)),
    (
        "to fp32\npoints",
        lambda r: EMPTY if r.recipe == "fp32" and not r.difference else _points(r.difference, r.difference_error),
    ),
    ("agrees\n%", lambda r: _percent(r.agreement, 1)),
)

WIDE: tuple[tuple[str, Cell], ...] = (
    *NARROW[:4],
    ("p90\nms", lambda r: _ms(r.p90_ms)),
    *NARROW[4:7],
    ("±", lambda r: _percent(r.top1_error)),
    *NARROW[7:],
    ("lost", lambda r: _number(r.lost, 0)),
    ("gained", lambda r: _number(r.gained, 0)),
    ("McNemar\np", lambda r: _number(r.p_value, 4)),
    ("runtime", lambda r: r.runtime or EMPTY),
    ("threads", lambda r: _number(r.threads, 0)),
)


def order(rows: Sequence[Row]) -> list[Row]:
    """By model, target and format as they came; in each group as the study lists its recipes, with what failed or cannot apply
    at the end."""
    groups = list(dict.fromkeys((r.model, r.target, r.format) for r in rows))
    rank = {"measured": 0, "built": 0, "failed": 1, "n/a": 2}
    return sorted(rows, key=lambda r: (groups.index((r.model, r.target, r.format)), rank[r.state]))


def render_study(rows: Sequence[Row], wide: bool = False) -> RenderableType:
    """One table a model, target and format; then what the marks mean."""
    if not rows:
        return Text("no cells")
    notes = Footnotes()
    parts: list[RenderableType] = []
    ordered = order(rows)
    for model, target, format_ in dict.fromkeys((r.model, r.target, r.format) for r in ordered):
        group = [r for r in ordered if (r.model, r.target, r.format) == (model, target, format_)]
        parts += [Text(_title(model, target, format_, group), style="bold"), _table(group, notes, wide), Text()]
    parts += [Text(line, style="dim") for line in legend(ordered)]
    parts += [Text(f"{str(i).translate(SUPERSCRIPT)} {text}") for i, text in enumerate(notes.texts, 1)]
    return Group(*parts)


def _title(model: str, target: str, format_: str, group: Sequence[Row]) -> str:
    runtimes = " and ".join(dict.fromkeys(r.runtime for r in group if r.runtime))
    counts = sorted({r.threads for r in group if r.threads})
    threads = f"{counts[0]} thread{'s' if counts[0] != 1 else ''}" if len(counts) == 1 else ""
    return " · ".join(
        part for part in (model, f"on {target}" if target else "not measured", runtimes or format_, threads) if part
    )


def _table(group: Sequence[Row], notes: Footnotes, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("recipe", overflow="fold", min_width=10, max_width=21)
    table.add_column("scheme", overflow="fold", max_width=12)
    columns = WIDE if wide else NARROW
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    several = len({r.threads for r in group if r.threads}) > 1
    for r in group:
        name = f"{r.recipe} ×{r.threads}" if several and r.threads else r.recipe
        cells = [Text(FRONT if r.front else "", style="green"), Text(name, style="bold" if r.front else ""), Text(r.scheme)]
        shown = [Text(make(r), style="dim" if make(r) == EMPTY else "") for _, make in columns]
        mark = _mark(r, notes)
        if mark:
            shown[0 if r.state in ("n/a", "failed") else 3].append(mark)
        if r.state in ("n/a", "failed"):
            shown[0] = Text.assemble((r.state, "red" if r.state == "failed" else "dim"), mark)
        table.add_row(*cells, *shown)
    return table


def _mark(r: Row, notes: Footnotes) -> str:
    if r.state != "measured":
        hint = f"; next: {r.hint}" if r.hint else ""
        return notes.mark(f"{r.state}: {r.reason}{hint}") if r.reason else ""
    if r.valid is False:
        return notes.mark("INVALID: " + "; ".join(r.verdict))
    return notes.mark(f"no top-1: {r.top1_absent}") if r.top1 is None and r.top1_absent else ""


def legend(rows: Iterable[Row]) -> list[str]:
    """What the columns mean, as far as the rows need it."""
    rows = list(rows)
    said = []
    if any(r.front for r in rows):
        said.append(f"{FRONT} no other row of its model and target is as good at top-1, p50 and file size and better at one")
    if any(r.speedup is not None for r in rows):
        said.append("× fp32: p50 of fp32 in the same run ÷ p50")
    if any(r.difference is not None for r in rows):
        images = " or ".join(f"{n:,}" for n in sorted({r.images for r in rows if r.images}))
        said.append(f"to fp32: top-1 less that of fp32 ± the standard error of the paired difference, over {images} images;")
        said.append("agrees: the same class as fp32; all on the exported file, on the target")
    return said


def markdown(rows: Sequence[Row], title: str) -> str:
    """The table for a document: every column of the narrow one, footnotes as a list."""
    ordered, notes = order(rows), Footnotes()
    parts = [f"# {title}\n"]
    heads = ["", "recipe", "scheme", *(head.replace("\n", " ") for head, _ in NARROW)]
    for model, target, format_ in dict.fromkeys((r.model, r.target, r.format) for r in ordered):
        group = [r for r in ordered if (r.model, r.target, r.format) == (model, target, format_)]
        lines = [f"## {_title(model, target, format_, group)}\n", _line(heads), _line(["---"] * 3 + ["---:"] * len(NARROW))]
        for r in group:
            mark = _mark(r, notes)
            shown = [make(r) for _, make in NARROW]
            if r.state in ("n/a", "failed"):
                shown[0] = r.state + mark
            elif mark:
                shown[3] += mark
            lines.append(_line([FRONT if r.front else "", r.recipe, r.scheme, *shown]))
        parts.append("\n".join(lines) + "\n")
    parts += [f"- {line}" for line in legend(ordered)]
    parts += [f"- {str(i).translate(SUPERSCRIPT)} {text}" for i, text in enumerate(notes.texts, 1)]
    return "\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def csv_text(rows: Sequence[Row]) -> str:
    """Every field of every row, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f.name for f in dataclasses.fields(Row)]
    writer.writerow(names)
    for r in order(rows):
        values = [getattr(r, n) for n in names]
        writer.writerow([as_cell("; ".join(v) if isinstance(v, tuple) else "" if v is None else v) for v in values])
    return out.getvalue()


def json_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every field of every row as JSON values, in the table's order."""
    return [{k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(r).items()} for r in order(rows)]
