"""Device-to-device spread beside run noise, for people within 100 columns and as plain values. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.report.table import EMPTY
from edgevit.results.spread import DeviceSpread, extremes
from edgevit.results.variance import Component

EXPLAINED = {
    "device": "between devices",
    "device and run": "between devices, run-to-run noise with it: bench again, and the two are told apart",
    "device and run and process": "between devices, all noise with it: one process each tells nothing apart",
}


def render_spreads(spreads: Sequence[DeviceSpread]) -> RenderableType:
    """One row a variant; standard deviations in percent of the latency, their 95 % intervals in brackets."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("devices of one profile", "variant", "p50 ms"):
        table.add_column(title, overflow="fold")
    for title in ("between\ndevices %", "run noise\n%", "process\nnoise %"):
        table.add_column(title, justify="right", no_wrap=True)
    lines: list[Text] = []
    for one in spreads:
        _row(table, one)
        lines += [line for line in _lines(one) if line not in lines]
    return Group(Text(""), table, *lines)


def _row(table: Table, one: DeviceSpread) -> None:
    variant = f"{one.label}, {one.runtime}, {one.threads} thread{'s' if one.threads != 1 else ''}"
    if one.found is None:
        table.add_row(one.profile, variant, EMPTY, EMPTY, EMPTY, EMPTY)
        return
    cells = [_percent(one.found.component(level), level) for level in ("device", "run", "process")]
    table.add_row(f"{one.found.devices} × {one.profile}", variant, f"{one.found.geometric_mean:,.3g}", *cells)


def _percent(component: Component, level: str) -> str:
    if component.levels[0] != level or component.spread is None:
        return EMPTY
    text = f"{100 * component.spread:.2g}"
    if component.interval is not None:
        text += f" ({100 * component.interval[0]:.2g}–{100 * component.interval[1]:.2g})"
    return text


def _lines(one: DeviceSpread) -> list[Text]:
    lines = []
    if one.found is None:
        lines.append(Text(f"{one.label}: no spread; fewer than two devices have a VALID figure", style="dim"))
    else:
        (fastest, low), (slowest, high) = extremes(one.found.device_means)
        differ = {True: "differ by more than the noise", False: "no difference beyond the noise can be told", None: ""}
        said = differ[one.found.devices_differ]
        lines.append(
            Text(
                f"{one.label}: fastest {fastest} {low:,.3g} ms, slowest {slowest} {high:,.3g} ms"
                + (f"; they {said}" if said else "")
            )
        )
        device = one.found.component("device")
        lines.append(Text(f"standard deviations, 95 % interval; {EXPLAINED[device.name]}", style="dim"))
        if device.absent:
            lines.append(Text(device.absent, style="dim"))
    if one.not_valid:
        lines.append(Text(f"{one.label}: left out, not VALID: {', '.join(one.not_valid)}", style="dim"))
    return lines


def json_spreads(spreads: Sequence[DeviceSpread]) -> list[dict[str, Any]]:
    """Every field; spreads are relative (0.01 = 1 %)."""
    return [asdict(one) for one in spreads]
