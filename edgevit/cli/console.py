"""How commands speak: people on standard error or a table on standard output, programs through one JSON document."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from edgevit.errors import EdgevitError

if TYPE_CHECKING:
    from rich.console import Console


class FloatRange(click.FloatRange):
    """A number within its limits. nan is within none, but is neither below nor above them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if math.isnan(found):
            self.fail(f"{value!r} is no number.", param, ctx)
        return found


json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on standard output, the rest on standard error."
)


WIDE_COLUMNS = 400
"""Room for every column of a ``--wide`` table: a narrower terminal breaks its lines, nothing is abbreviated."""


def out(wide: bool = False) -> Console:
    """The console for results: as wide as the terminal, 100 columns where there is none; room for ``wide`` tables if asked.
    What others named is shown as they wrote it: brackets and colons are neither styles nor pictures."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 100)
    if wide and console.width < WIDE_COLUMNS:
        console.width = WIDE_COLUMNS
    return console


def say(message: str) -> None:
    """One line for people, on standard error."""
    click.echo(message, err=True)


def emit_json(name: str, payload: dict[str, Any]) -> None:
    """The one document of a ``--json`` command; ``schema`` comes first."""
    click.echo(json.dumps({"schema": f"edgevit.{name}/1", **payload}, indent=2, ensure_ascii=False))


def error_json(error: EdgevitError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "code": getattr(error, "code", None), "message": str(error), "hint": error.hint}


def json_failed(failed: Sequence[tuple[str, EdgevitError]]) -> list[dict[str, Any]]:
    """Targets on which a command failed, each with its error."""
    return [{"target": name, "error": error_json(error)} for name, error in failed]


def has_terminal() -> bool:
    """Whether a person can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()
