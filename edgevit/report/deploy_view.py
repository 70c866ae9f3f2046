"""A deployment as one table for people, within 100 columns: what it would do, what it did, how a roll-out went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgevit.fleet.deploy import describe_freed

if TYPE_CHECKING:
    from edgevit.cli.ship import Planned, Shipped
    from edgevit.fleet.gates import Gate

GOOD = ("deployed", "was there", "passed", "finished")


def render_plans(plans: Sequence[tuple[str, Planned]]) -> RenderableType:
    """One row a target: what would be sent, installed, activated and removed, and how long that takes."""
    table = _table("device", "send MB", "seconds", "install", "activate", "remove", right=(1, 2))
    notes: list[Text] = []
    for name, planned in plans:
        plan, expected = planned.plan, planned.estimate
        mark = ""
        if expected.seconds is None:
            notes.append(Text(f"{len(notes) + 1}  {name}: seconds: {expected.absent}"))
            mark = f" [{len(notes)}]"
        _row(
            table,
            name,
            f"{plan.send_bytes / 1e6:.1f}",
            f"–{mark}" if expected.seconds is None else f"{expected.seconds:.1f}",
            f"{plan.bundle_name} v{plan.bundle_version}" if plan.install else "is there",
            plan.activate.artifact if plan.activate else "is active",
            describe_freed(plan.remove) if plan.remove and plan.remove.freed_bytes else "nothing",
        )
    return Group(table, *([Text(""), *notes] if notes else []))


def render_shipped(
    bundle: str,
    rows: Sequence[tuple[str, Shipped | str]],
    waves: Mapping[str, int] | None = None,
    ends: Mapping[str, str] | None = None,
) -> RenderableType:
    """The name of the ``bundle``, and one row a target: what was done, or the word for why not. ``waves``: the wave of each,
    from 1; ``ends``: how a roll-out left it, where that is more than what was shipped."""
    titles = ["device", *(["wave"] if waves is not None else []), "outcome", "sent MB", "s", "version", "variant"]
    table = _table(*titles, right=tuple(i for i, title in enumerate(titles) if title in ("wave", "sent MB", "s")))
    for name, one in rows:
        wave = [str(waves.get(name, "–"))] if waves is not None else []
        if isinstance(one, str):
            _row(table, name, *wave, _word((ends or {}).get(name, one)), "–", "–", "–", "–")
            continue
        done = (ends or {}).get(name) or ("deployed" if one.outcome.changed else "was there")
        active = one.before if done == "rolled back" and one.before is not None else one.active
        variant = active.variant
        _row(
            table,
            name,
            *wave,
            _word(done),
            f"{one.outcome.sent_bytes / 1e6:.1f}",
            f"{one.seconds:.1f}",
            f"{'' if active.bundle_name == bundle else active.bundle_name + ' '}v{active.bundle_version}",
            f"{variant.artifact}, {variant.runtime}, {variant.threads} thr",
        )
    return Group(Text(bundle, style="bold"), table)


def render_gates(gates: Sequence[tuple[str, Sequence[Gate]]]) -> RenderableType:
    """What each gate said on each device."""
    table = _table("device", "gate", "", "what was measured")
    for name, found in gates:
        for gate in found:
            word = "held" if gate.held else ("not held" if gate.judged else "not judged")
            _row(table, name, gate.name, Text(word, style="green" if gate.held else "red"), gate.text.removeprefix(gate.name))
    return table


def _word(word: str) -> Text:
    return Text(word, style="green" if word in GOOD else "yellow" if word in ("rolled back", "not tried") else "red")


def _table(*titles: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, overflow="fold", justify="right" if number in right else "left")
    return table


def _row(table: Table, *cells: str | Text) -> None:
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
