"""The tables of the results store, and the numbered migrations that make and change them.

A migration is never edited once released: what it did is what stores in the world have been through.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Column, Connection, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

migrations = Table(
    "edgevit_migrations",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("applied_at", String(40), nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("batch_id", String(60), primary_key=True),
    Column("created_at", String(40), nullable=False),
    Column("command", Text, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(60), primary_key=True),
    Column("batch_id", String(60), ForeignKey("batches.batch_id"), nullable=False, index=True),
    Column("target", Text, nullable=False),
    Column("board", Text, nullable=False),
    Column("status", String(20), nullable=False),
    Column("started_at", String(40), nullable=False),
    Column("ended_at", String(40), nullable=False),
    # The wire document without the numbers that lie in the blobs below.
    Column("document", Text, nullable=False),
)

measurements = Table(
    "measurements",
    metadata,
    Column("run_id", String(60), ForeignKey("runs.run_id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("model", Text, nullable=False),
    Column("recipe", Text, nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("bundle_name", Text, nullable=False),
    Column("artifact", Text, nullable=False),
    Column("artifact_sha256", String(64), nullable=False),
    Column("format", String(20), nullable=False),
    Column("scheme", String(40), nullable=False),
    Column("runtime", String(40), nullable=False),
    Column("provider", Text, nullable=False),
    Column("threads", Integer, nullable=False),
    Column("failure", String(60)),
    Column("images", Integer),
    Column("correct", Integer),
    # Little-endian int64, one an image.
    Column("predictions", LargeBinary),
    Column("labels", LargeBinary),
)

series = Table(
    "series",
    metadata,
    Column("run_id", String(60), ForeignKey("runs.run_id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("sample_count", Integer, nullable=False),
    # Nanoseconds, little-endian int64.
    Column("samples", LargeBinary, nullable=False),
    Column("warmup", LargeBinary, nullable=False),
)

choices = Table(
    "choices",
    metadata,
    Column("choice_id", String(60), primary_key=True),
    Column("created_at", String(40), nullable=False),
    Column("target", Text, nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("policy", String(40), nullable=False),
    # edgevit.select.Choice in the wire's canonical JSON.
    Column("document", Text, nullable=False),
)

summaries = Table(
    "summaries",
    metadata,
    Column("run_id", String(60), ForeignKey("runs.run_id"), primary_key=True),
    # Of the code that made them: edgevit.results.kept.
    Column("code", String(16), nullable=False),
    Column("document", Text, nullable=False),
)

Index("runs_by_target", runs.c.target, runs.c.started_at)


def _first(connection: Connection) -> None:
    metadata.create_all(connection, tables=[migrations, batches, runs, measurements, series])


def _choices(connection: Connection) -> None:
    choices.create(connection)


def _by_name(connection: Connection) -> None:
    # In words, not as an Index of the table: the first migration would make that one too.
    connection.exec_driver_sql("CREATE INDEX measurements_by_bundle_name ON measurements (bundle_name, run_id)")


def _summaries(connection: Connection) -> None:
    summaries.create(connection)


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_first, _choices, _by_name, _summaries)
"""Number n of the store is the n-th entry, from 1."""

SUMMARIES_VERSION = 4
"""The first version that keeps summaries."""


def tables_of(version: int) -> set[str]:
    """The names of the tables that a store of ``version`` has; none of one that is not there yet."""
    made = {1: {migrations.name, batches.name, runs.name, measurements.name, series.name}, 2: {choices.name}}
    made[SUMMARIES_VERSION] = {summaries.name}
    return {name for number, names in made.items() if number <= version for name in names}
