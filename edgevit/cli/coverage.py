"""``edgevit coverage``: which of timm's families can be exported, to what, and why not the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click

from edgevit.cli.console import FloatRange, emit_json, json_option, out
from edgevit.cli.progress_context import showing_progress


@click.command()
@click.argument("families", nargs=-1, metavar="[FAMILY]...")
@click.option("--format", "formats", multiple=True, type=click.Choice(["onnx", "tflite"]), help="Only this format.")
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes at a time; default: half of the cores.")
@click.option("--timeout", type=FloatRange(min=1), default=1200.0, show_default=True, help="Seconds for a family in a format.")
@click.option(
    "--memory", type=FloatRange(min=0.1), default=8.0, show_default=True, help="GB that a process may hold (on Linux)."
)
@click.option("--again", is_flag=True, help="Do families that failed again.")
@click.option("--list", "only_list", is_flag=True, help="Say which families there are, and do nothing.")
@json_option
def coverage(
    families: Sequence[str],
    formats: Sequence[str],
    jobs: int | None,
    timeout: float,
    memory: float,
    again: bool,
    only_list: bool,
    as_json: bool,
) -> None:
    """Export each FAMILY of timm (all of them where none is named) by its smallest member, with drawn weights, in float and
    dynamic int8, and hold each file against the PyTorch module.

    Each runs in a process of its own; what is known is kept, so that a second run does what is left.
    """
    from edgevit.coverage.families import chosen
    from edgevit.report.coverage_view import render_coverage, render_families

    wanted = chosen(tuple(families))
    if only_list:
        if as_json:
            emit_json("coverage", {"families": [asdict(f) for f in wanted]})
        else:
            out().print(render_families(wanted))
        return
    from edgevit.cache import Cache, tool_versions
    from edgevit.coverage.cells import FORMATS
    from edgevit.coverage.run import Limits, cover_all
    from edgevit.workers import default_jobs

    limits = Limits(timeout, memory * 1000)
    with showing_progress() as progress:
        rows = [
            row
            for found in cover_all(wanted, tuple(formats) or FORMATS, jobs or default_jobs(), limits, again, Cache(), progress)
            for row in found
        ]
    if as_json:
        emit_json("coverage", {"tools": dict(tool_versions()), "rows": [asdict(row) for row in rows]})
        return
    out().print(render_coverage(rows))
