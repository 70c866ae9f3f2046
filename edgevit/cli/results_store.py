"""``edgevit results export``, ``import`` and ``prune``: results leave the store, come from another, or go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevit.cli.console import emit_json, has_terminal, json_option, out, say
from edgevit.cli.model_options import FILE
from edgevit.cli.progress_context import showing_progress
from edgevit.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from edgevit.results.store import Store

EXPERIMENT = "edgevit"
FORMATS = ("json", "csv", "parquet", "bencher", "mlflow")


@click.command()
@click.option("--batch", help="One batch; default: everything.")
@click.option("-o", "--output", type=FILE, help="The file; .json, .csv and .parquet say the format.")
@click.option("--format", "wanted", type=click.Choice(FORMATS), help="Default: by the file's ending.")
@click.option("--samples", is_flag=True, help="CSV and Parquet: one row a timed inference instead of one a measurement.")
@click.option("--to", "uri", metavar="URI", help="MLflow's tracking server or folder; default: MLflow's own.")
@click.option("--experiment", default=EXPERIMENT, show_default=True, help="The experiment in MLflow.")
def export(batch: str | None, output: Path | None, wanted: str | None, samples: bool, uri: str | None, experiment: str) -> None:
    """Results in the formats of other programs.

    json: runs whole, with every raw sample. csv, parquet: one row a measurement with all its figures. bencher: Bencher's metric
    format, VALID figures alone. mlflow: one MLflow run a measurement, each once however often it is exported.
    """
    from edgevit.outputs import verify_writable_file
    from edgevit.results.store import open_store

    format_ = wanted or _format_of(output)
    if (format_ == "mlflow") == (output is not None):
        raise UsageError(
            "MLflow takes no --output" if output is not None else f"the format {format_} needs a file",
            hint=f"edgevit results export --format {format_} {'--to URI' if format_ == 'mlflow' else '-o FILE'}",
        )
    if format_ != "mlflow" and (uri is not None or experiment != EXPERIMENT):
        raise UsageError(
            f"--to and --experiment are MLflow's, got the format {format_}",
            hint="edgevit results export --format mlflow --to URI",
        )
    if samples and format_ not in ("csv", "parquet"):
        raise UsageError(f"--samples is for csv and parquet, got the format {format_}", hint="edgevit results export --help")
    if output is not None:
        verify_writable_file(output)
    with open_store() as store:
        ids = [run.run_id for run in store.outlines() if batch is None or run.batch_id == batch]
        if batch is not None and not ids:
            raise UnknownName("batch with a run", batch, [b.id for b in store.batches()], hint="edgevit results list")
        said = _export(store, ids, output, format_, samples, uri, experiment)
    say(said)


def _format_of(output: Path | None) -> str:
    ending = output.suffix.lower().removeprefix(".") if output is not None else ""
    if ending not in ("json", "csv", "parquet"):
        raise UsageError(
            f"no format follows from {output.name!r}" if output is not None else "give a file or a format",
            hint="edgevit results export -o FILE.csv, or --format " + "|".join(FORMATS),
        )
    return ending


def _export(
    store: Store, ids: list[str], output: Path | None, format_: str, samples: bool, uri: str | None, experiment: str
) -> str:
    from device_agents.wire import encode
    from edgevit.results import exports
    from edgevit.results.reference import relate
    from edgevit.results.stats import summarize

    if output is not None and format_ == "json":
        exports.write_json(output, {"schema": "edgevit.runs/1", "runs": [encode(run) for run in store.each_run(ids)]})
        return f"{output}: {len(ids):,} runs"
    write = exports.write_csv if format_ == "csv" else exports.write_parquet
    if output is not None and samples:
        count = write(output, exports.SAMPLES, exports.sample_rows(store.each_run(ids)))
        return f"{output}: {count:,} samples of {len(ids):,} runs"
    summaries = relate([s for run in store.each_run(ids) for s in summarize(run)])
    if output is None:
        from edgevit.results.mlflow_export import export_to_mlflow

        with showing_progress() as progress:
            added, there = export_to_mlflow(summaries, list(exports.figure_rows(summaries)), uri, experiment, progress)
        return f"MLflow, experiment {experiment}: {added:,} measurements added, {there:,} were there"
    if format_ == "bencher":
        document, older = exports.bencher_document(summaries)
        exports.write_json(output, document)
        left = sum(not s.rankable for s in summaries)
        return f"{output}: {len(document):,} benchmarks; left out: {left:,} failed or INVALID, {older:,} older of the same name"
    count = write(output, exports.FIGURES, exports.figure_rows(summaries))
    return f"{output}: {count:,} measurements of {len(ids):,} runs"


@click.command("import")
@click.argument("other", metavar="OTHER_DB")
@click.option("--dry-run", is_flag=True, help="Count, and add nothing.")
@json_option
def import_(other: str, dry_run: bool, as_json: bool) -> None:
    """Add what the store OTHER_DB (a file or a URL) has and this one lacks: batches, runs, choices. A run comes over once,
    whatever is imported again; OTHER_DB is only read."""
    import dataclasses

    from edgevit.places import as_db_url, db_url
    from edgevit.results.retention import merge_stores
    from edgevit.results.store import open_store

    if "://" not in other and not Path(other).expanduser().is_file():
        raise UsageError(f"no store to import at {other}", hint=f"ls {Path(other).expanduser().parent}")
    if as_db_url(other) == db_url():
        raise UsageError("OTHER_DB is this very store", hint="edgevit doctor")
    with open_store(as_db_url(other), read_only=True) as source, open_store() as into, showing_progress() as progress:
        merged = merge_stores(source, into, progress, dry_run=dry_run)
    if as_json:
        emit_json("import", {"dry_run": dry_run, **dataclasses.asdict(merged)})
        return
    word = "would come over" if dry_run else "came over"
    click.echo(
        f"{merged.runs:,} runs {word}, {merged.known:,} were here; {merged.batches:,} batches, {merged.choices:,} choices"
    )
    for run_id in merged.differing:
        click.echo(f"run {run_id} is here with other content; what is here stays")


@click.command()
@click.option("--older-than", metavar="AGE", help="Only runs that ended before that: 90d, 12w, or a date (2026-01-31).")
@click.option("--keep-last", type=click.IntRange(0), metavar="N", help="Keep the newest N of each bundle on each target.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def prune(older_than: str | None, keep_last: int | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove old runs for good. With both limits only what is older AND not among the newest N goes.

    A run that a choice rests on is never removed. Look first: --dry-run.
    """
    from edgevit.report.prune_view import json_pruning, render_pruning
    from edgevit.results.retention import parse_moment, plan_pruning
    from edgevit.results.store import open_store

    if older_than is None and keep_last is None:
        raise UsageError("say what may go", hint="edgevit results prune --older-than 90d --keep-last 3 --dry-run")
    before = parse_moment(older_than) if older_than is not None else None
    with open_store() as store:
        evidence = {run_id for stored in store.choices() for run_id in stored.choice.runs}
        pruning = plan_pruning(store.outlines(), evidence, before=before, keep_last=keep_last)
        if not as_json:
            out().print(render_pruning(pruning))
        gone = 0
        if pruning.removed and not dry_run:
            if not yes:
                if not has_terminal():
                    raise UsageError("this removes results for good; nobody can be asked", hint="edgevit results prune … --yes")
                click.confirm(f"Remove {len(pruning.removed):,} runs for good?", abort=True, err=True)
            gone = store.remove_runs([run.run_id for run in pruning.removed])
            store.compact()
        if as_json:
            emit_json("prune", {"dry_run": dry_run, "gone": gone, **json_pruning(pruning)})
        else:
            say("nothing was removed" if not gone else f"{gone:,} runs are gone")
