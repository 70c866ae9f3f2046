"""``edgevit profiles`` and ``profiles show NAME`` as rich renderables: pure functions, 80 columns suffice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from edgevit.profile_model import Profile

STATUS_STYLE = {"measured": "green", "documented": "", "unproven": "yellow"}


def render_profiles(titles: Mapping[str, str]) -> Table:
    """The listing: name and title."""
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("profile", no_wrap=True)
    table.add_column("board", overflow="fold")
    for name, title in titles.items():
        table.add_row(Text(name), Text(title))
    return table


def render_profile(profile: Profile) -> Table:
    """Every fact of one profile with how sure it is, and beneath it, dimmed, its source."""
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", title=profile.title, title_justify="left")
    table.add_column("fact", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("value, and its source", overflow="fold", ratio=1)
    for line in profile.fact_lines():
        value = Text(line.value)
        value.append(f"\n{line.source}", style="dim")
        table.add_row(Text(line.name), Text(line.status, style=STATUS_STYLE[line.status]), value)
    return table
