"""The plots of the page as figures for papers: each one's data as a table, with the run and the digest of every row.

A figure is made from the same document as the page, so that both show the same. :mod:`edgevit.report.figures_svg` draws them.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAIRS = (("p50", "top1"), ("p50", "file"), ("p50", "peak"), ("file", "top1"), ("energy", "top1"), ("energy", "p50"))
"""Trade-offs that are drawn where both figures are known, across and up."""
PRECISIONS = ("int8", "int4", "float")
IDENTITY = ("target", "board", "model", "variant", "scheme", "runtime", "version", "provider", "threads", "verdict")
PROOF = ("run", "artifact_sha256", "bundle_sha256")
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)

Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """``kind`` says how it is drawn, ``settings`` with what; ``rows`` hold its data, every row the same ``columns``."""

    name: str
    kind: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]

    @property
    def evidence(self) -> str:
        """The runs and artifacts shown, for the file itself."""
        runs = sorted({str(row["run"]) for row in self.rows})
        digests = sorted({str(row["artifact_sha256"]) for row in self.rows if row["artifact_sha256"]})
        return f"runs: {' '.join(runs)}; artifacts (SHA-256): {' '.join(digests)}"


class Table:
    """The page's columns, row by row."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.count: int = table["count"]
        self._texts, self._numbers = table["texts"], table["numbers"]

    def text(self, name: str, i: int) -> str:
        column = self._texts[name]
        return str(column["values"][column["at"][i]])

    def number(self, name: str, i: int) -> float | None:
        column = self._numbers.get(name)
        return None if column is None else column[i]

    def identity(self, i: int) -> Row:
        """What a row is of; with :meth:`proof` around the data of every figure."""
        named = {name: self.text("label" if name == "variant" else name, i) for name in IDENTITY if name != "threads"}
        return {**named, "threads": self.number("threads", i)}

    def proof(self, i: int) -> Row:
        return {
            "run": self.text("run", i),
            "artifact_sha256": self.text("artifact", i),
            "bundle_sha256": self.text("bundle", i),
        }


def make_figures(data: Mapping[str, Any]) -> list[Figure]:
    """Every plot that the page of ``data`` has something for."""
    table = Table(data["table"])
    makers: tuple[Callable[[Mapping[str, Any], Table], Iterator[Figure]], ...] = (
        _tradeoffs, _quantiles, _through_time, _operators, _coverage, _classes, _fleets,
    )  # fmt: skip
    names: dict[str, int] = {}
    found = []
    for maker in makers:
        for figure in maker(data, table):
            names[figure.name] = names.get(figure.name, 0) + 1
            again = names[figure.name]
            found.append(figure if again == 1 else dataclasses.replace(figure, name=f"{figure.name}-{again}"))
    return found


def write_csv(figures: Sequence[Figure], folder: Path) -> int:
    """One file a figure in ``folder``; how many. UsageError where one cannot be written."""
    from edgevit.outputs import as_cell, write_whole

    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, figure.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: as_cell(value) for name, value in row.items()} for row in figure.rows)
        write_whole(folder / f"{figure.name}.csv", stream.getvalue())
    return len(figures)


def _figure(name: str, kind: str, title: str, rows: Sequence[Row], **settings: Any) -> Figure:
    columns = tuple(rows[0])
    safe = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return Figure(safe[:120], kind, title, columns, tuple(rows), settings)


def _places(table: Table) -> dict[tuple[str, str], list[int]]:
    """Measurements by model and kind of board: what may share axes."""
    found: dict[tuple[str, str], list[int]] = {}
    for i in range(table.count):
        found.setdefault((table.text("model", i), table.text("board", i)), []).append(i)
    return found


def _tradeoffs(data: Mapping[str, Any], table: Table) -> Iterator[Figure]:
    metrics = {m["key"]: m for m in data["metrics"]}
    for (model, board), members in _places(table).items():
        for across, up in PAIRS:
            here = [i for i in members if table.number(across, i) is not None and table.number(up, i) is not None]
            if not here:
                continue
            x, y = metrics[across], metrics[up]
            front = _fronts(table, here, x, y)
            rows = [
                {
                    **table.identity(i), "batch": table.text("batch_id", i), **_with_error(table, i, x),
                    **_with_error(table, i, y), "on_front": int(i in front), **table.proof(i),
                }
                for i in here
            ]  # fmt: skip
            title = f"{model} on {board}: {y['label']} against {x['label']}"
            yield _figure(f"tradeoff-{across}-{up}-{model}-{board}", "tradeoff", title, rows, x=x, y=y)


def _with_error(table: Table, i: int, metric: Mapping[str, str]) -> Row:
    name = column_name(metric)
    told: Row = {name: table.number(metric["key"], i)}
    if "low" in metric:
        told |= {f"{name}_low": table.number(metric["low"], i), f"{name}_high": table.number(metric["high"], i)}
    return told


def column_name(metric: Mapping[str, str]) -> str:
    """A column's name with its unit, such as ``p50_ms``."""
    unit = {"%": "percent", "images/s": "images_per_s"}.get(metric["unit"], metric["unit"].lower())
    return f"{metric['key']}_{unit}"


def _fronts(table: Table, rows: Sequence[int], x: Mapping[str, str], y: Mapping[str, str]) -> set[int]:
    """The rows on the Pareto front of their own target and batch; only VALID ones count."""

    groups: dict[tuple[str, str], list[int]] = {}
    for i in rows:
        if table.text("verdict", i) in ("VALID", "warned"):
            groups.setdefault((table.text("target", i), table.text("batch_id", i)), []).append(i)
    found: set[int] = set()
    for members in groups.values():
        cost = [(table.number(x["key"], i) or 0.0) * (1 if x["better"] == "less" else -1) for i in members]
        gain = [(table.number(y["key"], i) or 0.0) * (1 if y["better"] == "more" else -1) for i in members]
        found |= {members[k] for k in pareto_front(list(zip(cost, gain, strict=True)))}
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other point beats at both: less cost with at least the gain, or more gain at
    no more cost. Of equal points the first counts."""
    front = []
    best = -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front


def _quantiles(data: Mapping[str, Any], table: Table) -> Iterator[Figure]:
    spread = data["spread"]
    for (model, board), members in _places(table).items():
        rows = [
            {
                **table.identity(i), "samples": table.number("n", i),
                **{f"p{q}_ms": spread[str(i)]["q"][q] for q in PERCENTILES},
                "p50_low_ms": table.number("p50_low", i), "p50_high_ms": table.number("p50_high", i),
                "process_p50_ms": " ".join(str(v) for v in spread[str(i)]["own"]), **table.proof(i),
            }
            for i in members
            if str(i) in spread
        ]  # fmt: skip
        if rows:
            yield _figure(f"latency-{model}-{board}", "quantiles", f"{model} on {board}: latency", rows)


def _through_time(data: Mapping[str, Any], table: Table) -> Iterator[Figure]:
    for run in data["runs"]:
        rows: list[Row] = []
        for series in run["series"]:
            i = series["row"]
            for at, low, middle, high in series["points"]:
                said = {"seconds": at, "latency_low_ms": low, "latency_p50_ms": middle, "latency_high_ms": high}
                rows.append({**table.identity(i), "process": series["process"], **said, **_board([]), **table.proof(i)})
        for reading in run["readings"]:
            row, _, process = reading[6].partition("/")
            said = {"seconds": reading[0], "latency_low_ms": None, "latency_p50_ms": None, "latency_high_ms": None}
            rows.append(
                {**table.identity(int(row)), "process": int(process), **said, **_board(reading), **table.proof(int(row))}
            )
        if rows:
            title = f"{rows[0]['target']}, {rows[0]['board']}: through time"
            yield _figure(f"time-{rows[0]['target']}-{run['id']}", "time", title, rows)


def _board(reading: Sequence[Any]) -> Row:
    at = reading if reading else [None] * 6
    return {"temperature_c": at[1], "frequency_mhz": at[2], "gpu_frequency_mhz": at[3], "power_w": at[4], "limited": at[5]}


def _operators(data: Mapping[str, Any], table: Table) -> Iterator[Figure]:
    places: dict[tuple[str, str], list[Row]] = {}
    for profile in data["operators"]:
        i = profile["row"]
        rows = places.setdefault((table.text("model", i), table.text("board", i)), [])
        for kind, ms, share in profile["kinds"]:
            said = {"kind": kind, "ms": ms, "share_percent": share, "inferences": profile["inferences"]}
            rows.append({**table.identity(i), **said, "profiler": profile["profiler"], **table.proof(i)})
    for (model, board), rows in places.items():
        title = f"{model} on {board}: time by kind of operator"
        yield _figure(f"operators-{model}-{board}", "stacked", title, rows, part="kind", value="ms", label="ms of an inference")


def _coverage(data: Mapping[str, Any], table: Table) -> Iterator[Figure]:
    rows = []
    for placed in data["coverage"]:
        if "absent" in placed:
            continue
        i = placed["row"]
        floats = 100 - placed["int8"] - placed["int4"]
        for precision, share in zip(PRECISIONS, (placed["int8"], placed["int4"], floats), strict=True):
            said = {"precision": precision, "share_percent": share, "macs": placed["macs"], "partitioned_by": placed["runtime"]}
            rows.append({**table.identity(i), **said, **table.proof(i)})
    if rows:
        title, label = "share of multiply-adds by precision", "share of multiply-adds (%)"
        yield _figure(
            "coverage", "stacked", title, rows, part="precision", value="share_percent", label=label, order=PRECISIONS
        )


def _classes(data: Mapping[str, Any], table: Table) -> Iterator[Figure]:
    for group in data["accuracy"]:
        rows = []
        for number, images, shares in group["classes"]:
            name = group["names"][number] if number < len(group["names"]) else f"class {number}"
            for i, share in zip(group["variants"], shares, strict=True):
                error = 100 * (share / 100 * (1 - share / 100) / images) ** 0.5
                said = {
                    "class": number,
                    "class_name": name,
                    "images": images,
                    "top1_percent": share,
                    "top1_error_percent": error,
                }
                rows.append({**table.identity(i), **said, **table.proof(i)})
        if not rows:
            continue
        title = f"{group['model']}: top-1 by class of {group['evaluation']}"
        yield _figure(f"classes-{group['model']}-{group['evaluation']}", "classes", title, rows)


def _fleets(data: Mapping[str, Any], table: Table) -> Iterator[Figure]:
    for group in data["fleet"]:
        rows = [
            {
                **table.identity(i), "p50_ms": table.number("p50", i), "p50_low_ms": table.number("p50_low", i),
                "p50_high_ms": table.number("p50_high", i), "process_p50_ms": " ".join(map(str, own)),
                "geometric_mean_ms": group["middle"], **table.proof(i),
            }
            for i, own in zip(group["rows"], group["own"], strict=True)
        ]  # fmt: skip
        first = rows[0]
        title = f"{first['variant']} in {first['runtime']} on {len(rows)} × {group['board']}"
        yield _figure(f"devices-{group['model']}-{first['variant']}-{group['board']}", "devices", title, rows)
