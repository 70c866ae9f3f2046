"""Figures drawn as SVG by matplotlib: text stays text, and the file says which runs and artifacts it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgevit.errors import MissingExtra
from edgevit.report.figures import Figure, Row, column_name

SCHEMES = {
    "fp32": "#0072b2", "fp16": "#d55e00", "int8-dynamic": "#009e73", "int8-static": "#a8478d", "int8-weights": "#8a6d00",
    "int4-weights": "#3b8fb8", "mixed": "#5c636b",
}  # fmt: skip
"""Okabe and Ito's palette, as on the page."""
PARTS = tuple(SCHEMES.values())
MARKERS = {"onnxruntime": "o", "litert": "s", "tflite-runtime": "^"}
MOST_PARTS = 6
MOST_FRONTS = 4


def import_matplotlib() -> Any:
    """matplotlib.figure, drawing without a screen. :class:`MissingExtra` where it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as e:
        raise MissingExtra("matplotlib", "figures") from e
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "edgevit", "font.size": 9, "axes.grid": True})
    matplotlib.rcParams.update({"text.parse_math": False})  # a class or a model may be called anything
    matplotlib.rcParams.update({"grid.color": "#e3e5e8", "axes.axisbelow": True, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True})
    return matplotlib.figure


def write_svg(figures: Sequence[Figure], folder: Path) -> int:
    """One file a figure in ``folder``; how many. UsageError where one cannot be written."""
    import io

    from edgevit.outputs import write_whole

    library = import_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        drawn = _DRAW[figure.kind](library, figure)
        stream = io.StringIO()
        told = {"Title": figure.title, "Description": figure.evidence, "Creator": "edgevit", "Date": None}
        drawn.savefig(stream, format="svg", metadata=told)
        write_whole(folder / f"{figure.name}.svg", stream.getvalue())
    return len(figures)


def _colour(row: Row) -> str:
    return SCHEMES.get(str(row["scheme"]), "#5c636b")


def _name(row: Row, rows: Sequence[Row]) -> str:
    """A row's name, with what tells it from others of that name."""
    told = str(row["variant"])
    for field in ("target", "runtime", "threads"):
        if len({r[field] for r in rows if r["variant"] == row["variant"]}) > 1:
            told += f", {row[field]}"
    return told


def _legend(axes: Any, rows: Sequence[Row], markers: bool = True) -> None:
    from matplotlib.lines import Line2D

    schemes = [s for s in SCHEMES if any(r["scheme"] == s for r in rows)]
    shown = [Line2D([], [], color=SCHEMES[s], marker="o", linestyle="", label=s) for s in schemes]
    runtimes = [r for r in MARKERS if any(row["runtime"] == r for row in rows)]
    if markers and len(runtimes) > 1:
        shown += [Line2D([], [], color="#555", marker=MARKERS[r], linestyle="", label=r) for r in runtimes]
    axes.legend(handles=shown, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _error(row: Row, column: str) -> list[list[float]] | None:
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    return None if low is None or high is None else [[row[column] - low], [high - row[column]]]


def _tradeoff(library: Any, figure: Figure) -> Any:
    drawn = library.Figure(figsize=(6.0, 4.0))
    axes = drawn.subplots()
    x, y = figure.settings["x"], figure.settings["y"]
    across, up = column_name(x), column_name(y)
    for row in figure.rows:
        valid = row["verdict"] in ("VALID", "warned")
        axes.errorbar(
            row[across], row[up], xerr=_error(row, across), yerr=_error(row, up), color=_colour(row), elinewidth=0.8,
            markersize=5, marker=MARKERS.get(str(row["runtime"]), "o"), markerfacecolor=_colour(row) if valid else "white",
        )  # fmt: skip
    groups = sorted({(str(row["target"]), str(row["batch"])) for row in figure.rows})
    for group in groups if len(groups) <= MOST_FRONTS else ():
        front = sorted((r[across], r[up]) for r in figure.rows if (r["target"], r["batch"]) == group and r["on_front"])
        where = "post" if x["better"] == "less" else "pre"
        axes.step([p[0] for p in front], [p[1] for p in front], where=where, color="#777", linestyle="--", linewidth=0.9)
    axes.set(xlabel=f"{x['label']} ({x['unit']})", ylabel=f"{y['label']} ({y['unit']})", title=figure.title)
    _legend(axes, figure.rows)
    return drawn


def _tall(library: Any, figure: Figure, names: Sequence[str]) -> tuple[Any, Any]:
    """A figure with one line a name, the first on top."""
    drawn = library.Figure(figsize=(6.4, 1.2 + 0.28 * len(names)))
    axes = drawn.subplots()
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title(figure.title)
    return drawn, axes


def _quantiles(library: Any, figure: Figure) -> Any:
    rows = figure.rows
    drawn, axes = _tall(library, figure, [_name(row, rows) for row in rows])
    for at, row in enumerate(rows):
        axes.hlines(at, row["p1_ms"], row["p99_ms"], color=_colour(row), linewidth=1)
        axes.hlines(at, row["p25_ms"], row["p75_ms"], color=_colour(row), linewidth=7, alpha=0.7)
        if row["p50_low_ms"] is not None:
            axes.hlines(at, row["p50_low_ms"], row["p50_high_ms"], color="black", linewidth=2)
        axes.plot(row["p50_ms"], at, "k|", markersize=9)
    axes.set(xlabel="latency (ms): p1–p99, middle half, p50 and its interval", xlim=(0, None))
    _legend(axes, rows, markers=False)
    return drawn


def _time(library: Any, figure: Figure) -> Any:
    sensors = [
        (column, label)
        for column, label in (
            ("temperature_c", "°C"), ("frequency_mhz", "CPU MHz"), ("gpu_frequency_mhz", "GPU MHz"), ("power_w", "W"),
        )
        if any(row[column] is not None for row in figure.rows)
    ]  # fmt: skip
    drawn = library.Figure(figsize=(6.4, 2.8 + 1.2 * len(sensors)))
    panels = drawn.subplots(1 + len(sensors), 1, sharex=True, squeeze=False, height_ratios=[2.4] + [1.0] * len(sensors))[:, 0]
    timed = [row for row in figure.rows if row["latency_p50_ms"] is not None]
    for row, points in _by_series(timed):
        low = [p["latency_p50_ms"] if p["latency_low_ms"] is None else p["latency_low_ms"] for p in points]
        seconds = [p["seconds"] for p in points]
        panels[0].fill_between(seconds, low, [p["latency_high_ms"] for p in points], color=_colour(row), alpha=0.2, linewidth=0)
        panels[0].plot(seconds, [p["latency_p50_ms"] for p in points], color=_colour(row), linewidth=1)
    panels[0].set(ylabel="latency (ms)", ylim=(0, None), title=figure.title)
    _legend(panels[0], timed, markers=False)
    for panel, (column, label) in zip(panels[1:], sensors, strict=True):
        for _, points in _by_series([row for row in figure.rows if row[column] is not None]):
            panel.plot([p["seconds"] for p in points], [p[column] for p in points], color="#555", linewidth=0.9)
            hit = [p for p in points if p["limited"]]
            panel.plot([p["seconds"] for p in hit], [p[column] for p in hit], "o", color="#b3261e", markersize=2)
        panel.set(ylabel=label)
    panels[-1].set(xlabel="seconds since the run began")
    return drawn


def _by_series(rows: Sequence[Row]) -> list[tuple[Row, list[Row]]]:
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row["variant"], row["runtime"], row["provider"], row["threads"], row["artifact_sha256"], row["process"])
        found.setdefault(key, []).append(row)
    return [(points[0], points) for points in found.values()]


def _stacked(library: Any, figure: Figure) -> Any:
    part, value = figure.settings["part"], figure.settings["value"]
    bars = list(dict.fromkeys(_name(row, figure.rows) for row in figure.rows))
    totals: dict[str, float] = dict.fromkeys(figure.settings.get("order", ()), 0.0)
    for row in figure.rows:
        totals[row[part]] = totals.get(row[part], 0.0) + row[value]
    leading = list(figure.settings.get("order") or sorted(totals, key=lambda kind: -totals[kind])[:MOST_PARTS])
    drawn, axes = _tall(library, figure, bars)
    ends = [0.0] * len(bars)
    for k, kind in enumerate([*leading, "other"] if len(totals) > len(leading) else leading):
        sums = [0.0] * len(bars)
        for row in figure.rows:
            if row[part] == kind or (kind == "other" and row[part] not in leading):
                sums[bars.index(_name(row, figure.rows))] += row[value]
        axes.barh(range(len(bars)), sums, left=ends, color=PARTS[k % len(PARTS)], label=kind, height=0.7)
        ends = [a + b for a, b in zip(ends, sums, strict=True)]
    axes.set(xlabel=figure.settings["label"])
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawn


def _classes(library: Any, figure: Figure) -> Any:
    names = list(dict.fromkeys(row["class_name"] for row in figure.rows))
    drawn, axes = _tall(library, figure, names)
    first = _name(figure.rows[0], figure.rows)
    for row in figure.rows:
        error = row["top1_error_percent"] if _name(row, figure.rows) == first else None
        axes.errorbar(
            row["top1_percent"], names.index(row["class_name"]), xerr=error, color=_colour(row), ecolor="#777", elinewidth=0.8,
            marker=MARKERS.get(str(row["runtime"]), "o"), markersize=4, alpha=0.75,
        )  # fmt: skip
    axes.set(xlabel=f"top-1 (%); bars: {first} ± its standard error")
    _legend(axes, figure.rows)
    return drawn


def _devices(library: Any, figure: Figure) -> Any:
    rows = figure.rows
    drawn, axes = _tall(library, figure, [str(row["target"]) for row in rows])
    axes.axvline(rows[0]["geometric_mean_ms"], color="#777", linestyle="--", linewidth=0.9)
    for at, row in enumerate(rows):
        if row["p50_low_ms"] is not None:
            axes.hlines(at, row["p50_low_ms"], row["p50_high_ms"], color=_colour(row), linewidth=1.6)
        own = [float(v) for v in row["process_p50_ms"].split()]
        axes.plot(own, [at] * len(own), ".", color="#555", markersize=3)
        axes.plot(row["p50_ms"], at, "o", color=_colour(row), markersize=5)
    axes.set(xlabel="p50 latency (ms) with its 95 % interval; dashed: geometric mean")
    return drawn


_DRAW: dict[str, Callable[[Any, Figure], Any]] = {
    "tradeoff": _tradeoff, "quantiles": _quantiles, "time": _time, "stacked": _stacked, "classes": _classes,
    "devices": _devices,
}  # fmt: skip
