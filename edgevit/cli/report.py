"""``edgevit report``: the page of results, as a file or served, and figures for papers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevit.cli.console import say
from edgevit.cli.model_options import FILE
from edgevit.errors import UsageError

if TYPE_CHECKING:
    from edgevit.report.page_bundles import FromBundles
    from edgevit.report.page_load import Source

HOST, PORT = "127.0.0.1", 8350
FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--batch", help="One batch; default: the newest.")
@click.option("--all", "everything", is_flag=True, help="Every run in the store.")
@click.option("-o", "--output", type=FILE, metavar="FILE.html", help="Write the page to this file.")
@click.option(
    "--bundle",
    "bundles",
    type=FOLDER,
    multiple=True,
    help="A bundle that was measured: adds the share of int8, class names and the disputed images.",
)
@click.option("--svg", type=FOLDER, metavar="DIR", help="Each plot as an SVG file. Needs the extra: figures.")
@click.option("--csv", "csv_folder", type=FOLDER, metavar="DIR", help="The data of each plot as a CSV file.")
@click.option("--serve", is_flag=True, help="Serve the page and keep it up to date until Ctrl-C; the store is only read.")
@click.option("--host", default=HOST, show_default=True, help="Where to listen; anything but loopback lets others read.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 takes a free one.")
def report(
    batch: str | None,
    everything: bool,
    output: Path | None,
    bundles: tuple[Path, ...],
    svg: Path | None,
    csv_folder: Path | None,
    serve: bool,
    host: str,
    port: int,
) -> None:
    """One self-contained page of results that works offline.

    What to ship on each target comes first, then every measurement with filters, trade-offs, latency, time, operators, accuracy
    by class, devices, verdicts and evidence: docs/report.md.
    """
    from edgevit.report.page_load import Source
    from edgevit.results.store import open_store

    if batch and everything:
        raise UsageError("--batch and --all exclude each other")
    if serve and (output or svg or csv_folder):
        raise UsageError("--serve excludes -o, --svg and --csv: it shows what comes, they what is there")
    if not serve and (host, port) != (HOST, PORT):
        raise UsageError("--host and --port say where the page is served", hint="edgevit report --serve")
    if not (serve or output or svg or csv_folder):
        raise UsageError("nothing was asked for", hint="edgevit report -o report.html (or --serve)")
    _verify_places(output, svg, csv_folder)
    with open_store(read_only=serve) as store:
        source = Source(store, batch, everything, _read(bundles))
        source.verify()
        if serve:
            _serve(source, host, port)
        else:
            _write(source, output, svg, csv_folder)


def _verify_places(output: Path | None, svg: Path | None, csv_folder: Path | None) -> None:
    from edgevit.outputs import verify_writable_file, verify_writable_folder

    if output:
        verify_writable_file(output)
    for folder in (svg, csv_folder):
        if folder:
            verify_writable_folder(folder)
    if svg:
        from edgevit.report.figures_svg import import_matplotlib

        import_matplotlib()


def _read(bundles: tuple[Path, ...]) -> FromBundles:
    from edgevit.bundle import open_bundle
    from edgevit.report.page_bundles import read_bundles

    return read_bundles([open_bundle(path, None) for path in bundles])


def _serve(source: Source, host: str, port: int) -> None:
    from edgevit.report.page_serve import PageServer, is_loopback, serve_until_interrupted

    server = PageServer(source, host, port)
    if not is_loopback(host):
        say(f"listening on {host}: whoever reaches this port can read these results")
    serve_until_interrupted(server, lambda url: say(f"serving {url} until Ctrl-C"))
    say("stopped serving")


def _write(source: Source, output: Path | None, svg: Path | None, csv_folder: Path | None) -> None:
    from edgevit.cli.progress_context import showing_progress
    from edgevit.outputs import write_whole
    from edgevit.report.page import render_data
    from edgevit.report.page_data import page_data

    with showing_progress() as progress:
        shown = source.load(progress=progress)
        data = page_data(shown)
    if output:
        write_whole(output, render_data(data))
        say(f"{output}: {shown.runs:,} run{'s' if shown.runs != 1 else ''}, {output.stat().st_size / 1e6:.2f} MB")
    if svg or csv_folder:
        from edgevit.report.figures import make_figures, write_csv

        figures = make_figures(data)
        if csv_folder:
            say(f"{csv_folder}: {write_csv(figures, csv_folder)} CSV files")
        if svg:
            from edgevit.report.figures_svg import write_svg

            say(f"{svg}: {write_svg(figures, svg)} SVG files")
