"""The results store: every run that came home, with its raw samples, each exactly once.

SQLAlchemy Core over SQLite by default and PostgreSQL by URL. Samples are never averaged away: they lie in the store as
little-endian int64 nanoseconds, and a run read back equals the run that was added. Each change is one transaction.
"""

from __future__ import annotations

import dataclasses
import sys
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, SQLAlchemyError

from device_agents import wire
from edgevit.errors import StoreError
from edgevit.results import schema
from edgevit.select import Choice

BUSY_SECONDS = 30


@dataclass(frozen=True)
class Batch:
    """What one command measured: the runs of a batch are compared with each other. ``created_at`` is UTC, ISO 8601; ``runs``
    counts those that are home."""

    id: str
    created_at: str
    command: str = ""
    runs: int = 0


@dataclass(frozen=True)
class StoredChoice:
    """A choice that was made; ``created_at`` is UTC, ISO 8601."""

    id: str
    created_at: str
    choice: Choice


def open_store(url: str | None = None) -> Store:
    """The operator's store: ``url``, else :func:`edgevit.places.db_url`. Close it, or use it as a context manager."""
    from edgevit import places

    return Store(url or places.db_url())


def pack_int64(values: Sequence[int]) -> bytes:
    """Integers → little-endian int64 bytes."""
    packed = array("q", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_int64(data: bytes) -> tuple[int, ...]:
    """Little-endian int64 bytes → integers; ValueError where the length is no multiple of 8."""
    values = array("q")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(values)


class Store:
    """An open store. Raises :class:`StoreError` for everything that goes wrong in the database."""

    def __init__(self, url: str) -> None:
        """Open, creating or migrating it. ``url``: an SQLAlchemy URL, see :func:`edgevit.places.db_url`.

        A store that a newer edgevit has written is refused.
        """
        try:
            parsed = make_url(url)
        except ArgumentError as e:
            raise StoreError(
                f"the store's URL {url!r} is not one, expected such as sqlite:///results.sqlite", hint="edgevit doctor"
            ) from e
        self._shown = parsed.render_as_string(hide_password=True)
        self._engine = self._open(parsed)
        # On SQLite a transaction that will write takes the write lock at once: no dead end between two readers-turned-writers.
        self._writing = self._engine.execution_options(edgevit_write=True)
        try:
            self._migrate()
        except StoreError:
            self._engine.dispose()
            raise

    def _open(self, url: sa.URL) -> Engine:
        if url.get_backend_name() == "sqlite":
            if url.database and url.database != ":memory:":
                folder = Path(url.database).absolute().parent
                try:
                    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                except OSError as e:
                    raise StoreError(f"the store's folder {folder} cannot be made: {e.strerror}", hint="edgevit doctor") from e
            engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        try:
            return sa.create_engine(url, pool_pre_ping=True)
        except ModuleNotFoundError as e:
            raise StoreError(
                f"the store {self._shown} needs the Python package {e.name}, which is not installed",
                hint=f"pip install {e.name}",
            ) from e
        except SQLAlchemyError as e:
            raise StoreError(f"the store {self._shown} cannot be used: {_short(e)}", hint="edgevit doctor") from e

    def close(self) -> None:
        """Give back the connections; harmless when called twice."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as e:
            said = _short(e)
            damaged = isinstance(e, DatabaseError) and ("malformed" in said or "not a database" in said)
            hint = "move that file away or set EDGEVIT_DB, then edgevit collect" if damaged else "edgevit doctor"
            raise StoreError(f"{what}: the store {self._shown} said: {said}", hint=hint) from e

    def _migrate(self) -> None:
        with self._mapped("opening"), self._writing.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7246118)"))  # one migrator at a time
            schema.migrations.create(connection, checkfirst=True)
            version = connection.scalar(sa.select(sa.func.max(schema.migrations.c.number))) or 0
            known = len(schema.MIGRATIONS)
            if version > known:
                raise StoreError(
                    f"the store {self._shown} is of version {version}, written by a newer edgevit; this one knows {known}",
                    hint="pip install --upgrade edgevit",
                )
            for number in range(version + 1, known + 1):
                schema.MIGRATIONS[number - 1](connection)
                connection.execute(schema.migrations.insert().values(number=number, applied_at=_now()))

    def add_batch(self, batch: Batch) -> bool:
        """Add a batch; False, changing nothing, where its id is there already."""
        with self._mapped(f"adding batch {batch.id}"), self._writing.begin() as connection:
            if _has(connection, schema.batches.c.batch_id, batch.id):
                return False
            _insert_batch(connection, batch)
        return True

    def new_batch(self, command: str) -> str:
        """Begin a batch now; its id, which sorts by time and is unique."""
        batch_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:8]
        self.add_batch(Batch(batch_id, _now(), command))
        return batch_id

    def add_run(self, run: wire.Run) -> bool:
        """Add a run with all its samples in one transaction; False, changing nothing, where its ``run_id`` is there already.

        A run whose batch this store does not know (collected from another operator's job) brings its batch along.
        """
        run_id = run.job.run_id
        with self._mapped(f"adding run {run_id}"):
            try:
                with self._writing.begin() as connection:
                    if _has(connection, schema.runs.c.run_id, run_id):
                        return False
                    _insert_run(connection, run)
            except IntegrityError:
                # Another writer (only on PostgreSQL: SQLite's write lock excludes it) may have added it in between.
                with self._engine.begin() as connection:
                    if _has(connection, schema.runs.c.run_id, run_id):
                        return False
                raise
        return True

    def batches(self) -> list[Batch]:
        """Every batch, newest first."""
        with self._mapped("listing batches"), self._engine.begin() as connection:
            return [Batch(**row) for row in connection.execute(_BATCHES).mappings()]

    def latest_batch(self) -> Batch | None:
        """The newest batch that holds a run; None where there is none."""
        return next((b for b in self.batches() if b.runs), None)

    def has_run(self, run_id: str) -> bool:
        with self._mapped(f"looking for run {run_id}"), self._engine.begin() as connection:
            return _has(connection, schema.runs.c.run_id, run_id)

    def runs(
        self,
        batch_id: str | None = None,
        *,
        run_id: str | None = None,
        target: str | None = None,
        bundles: Sequence[str] | None = None,
    ) -> list[wire.Run]:
        """Runs with all their samples, oldest first, of everything or of what is named; ``bundles``: runs that measured any
        bundle of these digests."""
        query = sa.select(schema.runs.c.run_id, schema.runs.c.document).order_by(schema.runs.c.started_at, schema.runs.c.run_id)
        for column, wanted in (
            (schema.runs.c.batch_id, batch_id),
            (schema.runs.c.run_id, run_id),
            (schema.runs.c.target, target),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        if bundles is not None:
            measured = sa.select(schema.measurements.c.run_id).where(schema.measurements.c.bundle.in_(list(bundles)))
            query = query.where(schema.runs.c.run_id.in_(measured))
        with self._mapped("reading runs"), self._engine.begin() as connection:
            return [_restore(connection, row.run_id, row.document) for row in connection.execute(query).all()]

    def last_run(self, target: str) -> wire.Run | None:
        """The run of ``target`` that ended last, with all its samples; None where none came home."""
        query = sa.select(schema.runs.c.run_id, schema.runs.c.document).where(schema.runs.c.target == target)
        query = query.order_by(schema.runs.c.ended_at.desc(), schema.runs.c.run_id.desc()).limit(1)
        with self._mapped(f"reading the last run of {target}"), self._engine.begin() as connection:
            row = connection.execute(query).first()
            return None if row is None else _restore(connection, row.run_id, row.document)

    def add_choice(self, choice: Choice) -> bool:
        """Keep a choice; False, changing nothing, where the newest of that target, bundle and policy says the same."""
        table, document = schema.choices, wire.dumps(choice).decode("utf-8")
        same = (table.c.target == choice.target, table.c.bundle == choice.bundle, table.c.policy == choice.policy)
        newest = sa.select(table.c.document).where(*same).order_by(table.c.choice_id.desc()).limit(1)
        with self._mapped(f"adding a choice for {choice.target}"), self._writing.begin() as connection:
            if connection.scalar(newest) == document:
                return False
            # Two policies are often asked for within a second: the id alone gives their order.
            choice_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S.%f-") + uuid.uuid4().hex[:4]
            row = {"choice_id": choice_id, "created_at": _now(), "document": document}
            row.update(target=choice.target, bundle=choice.bundle, policy=choice.policy)
            connection.execute(table.insert().values(**row))
        return True

    def choices(self) -> list[StoredChoice]:
        """Every choice, newest first."""
        table = schema.choices
        query = sa.select(table).order_by(table.c.choice_id.desc())
        with self._mapped("reading choices"), self._engine.begin() as connection:
            rows = connection.execute(query).all()
        return [StoredChoice(row.choice_id, row.created_at, _choice(row.choice_id, row.document)) for row in rows]


def _choice(choice_id: str, document: str) -> Choice:
    try:
        return wire.loads(Choice, document.encode("utf-8"), "choice", wire.MAX_RUN_BYTES)
    except wire.WireError as e:
        raise StoreError(
            f"choice {choice_id} is damaged in the store: {e}", hint="edgevit deploy BUNDLE TARGET --select"
        ) from e


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not open transactions by itself, so that DDL is transactional and BEGIN IMMEDIATE possible:
    # docs.sqlalchemy.org, "Serializable isolation / Savepoints / Transactional DDL" of the SQLite dialect.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")
    # A device forgets its copy once the store has it, so a commit must survive a power cut.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("edgevit_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _has(connection: Connection, column: sa.Column[Any], value: str) -> bool:
    return connection.scalar(sa.select(sa.literal(1)).where(column == value)) is not None


_BATCHES = (
    sa.select(
        schema.batches.c.batch_id.label("id"),
        schema.batches.c.created_at,
        schema.batches.c.command,
        sa.func.count(schema.runs.c.run_id).label("runs"),
    )
    .outerjoin(schema.runs, schema.runs.c.batch_id == schema.batches.c.batch_id)
    .group_by(schema.batches.c.batch_id, schema.batches.c.created_at, schema.batches.c.command)
    .order_by(schema.batches.c.created_at.desc(), schema.batches.c.batch_id.desc())
)


def _insert_batch(connection: Connection, batch: Batch) -> None:
    row = {"batch_id": batch.id, "created_at": batch.created_at, "command": batch.command}
    connection.execute(schema.batches.insert().values(**row))


def _insert_run(connection: Connection, run: wire.Run) -> None:
    job = run.job
    if not _has(connection, schema.batches.c.batch_id, job.batch_id):
        _insert_batch(connection, Batch(job.batch_id, job.submitted_at, f"submitted by {job.submitted_by}"))
    connection.execute(
        schema.runs.insert().values(
            run_id=job.run_id,
            batch_id=job.batch_id,
            target=job.target,
            board=run.facts.board_model or run.facts.cpu_model or run.facts.machine,
            status=run.status,
            started_at=run.started_at,
            ended_at=run.ended_at,
            document=wire.dumps(_without_numbers(run)).decode("utf-8"),
        )
    )
    for position, m in enumerate(run.measurements):
        scored = m.accuracy
        connection.execute(
            schema.measurements.insert().values(
                run_id=job.run_id,
                position=position,
                model=m.model,
                recipe=m.recipe,
                bundle=m.variant.bundle,
                bundle_name=m.bundle_name,
                artifact=m.variant.artifact,
                artifact_sha256=m.artifact_sha256,
                format=m.format,
                scheme=m.scheme,
                runtime=m.variant.runtime,
                provider=m.variant.provider,
                threads=m.variant.threads,
                failure=m.failure.code if m.failure else None,
                images=scored.images if scored else None,
                correct=scored.correct if scored else None,
                predictions=pack_int64(scored.predictions) if scored else None,
                labels=pack_int64(scored.labels) if scored else None,
            )
        )
        rows = [
            {
                "run_id": job.run_id,
                "position": position,
                "number": number,
                "sample_count": len(one.samples_ns),
                "samples": pack_int64(one.samples_ns),
                "warmup": pack_int64(one.warmup_ns),
            }
            for number, one in enumerate(m.series)
        ]
        if rows:
            connection.execute(schema.series.insert(), rows)


def _without_numbers(run: wire.Run) -> wire.Run:
    def slim(m: wire.Measurement) -> wire.Measurement:
        series = tuple(dataclasses.replace(s, samples_ns=(), warmup_ns=()) for s in m.series)
        scored = dataclasses.replace(m.accuracy, predictions=(), labels=()) if m.accuracy else None
        return dataclasses.replace(m, series=series, accuracy=scored)

    return dataclasses.replace(run, measurements=tuple(slim(m) for m in run.measurements))


def _restore(connection: Connection, run_id: str, document: str) -> wire.Run:
    try:
        run = wire.loads(wire.Run, document.encode("utf-8"), "run", wire.MAX_RUN_BYTES)
        t, m = schema.series, schema.measurements
        numbers = {
            (row.position, row.number): (unpack_int64(row.samples), unpack_int64(row.warmup))
            for row in connection.execute(sa.select(t).where(t.c.run_id == run_id))
        }
        scores = {
            row.position: (unpack_int64(row.predictions), unpack_int64(row.labels))
            for row in connection.execute(sa.select(m).where(m.c.run_id == run_id, m.c.predictions.is_not(None)))
        }
        return _with_numbers(run, numbers, scores)
    except (wire.WireError, ValueError, KeyError) as e:
        raise StoreError(f"run {run_id} is damaged in the store: {e}", hint="edgevit collect") from e


def _with_numbers(
    run: wire.Run,
    numbers: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]],
    scores: dict[int, tuple[tuple[int, ...], tuple[int, ...]]],
) -> wire.Run:
    whole = []
    for position, m in enumerate(run.measurements):
        series = []
        for number, one in enumerate(m.series):
            samples, warmup = numbers[position, number]
            series.append(dataclasses.replace(one, samples_ns=samples, warmup_ns=warmup))
        scored = m.accuracy
        if scored is not None:
            predictions, labels = scores[position]
            scored = dataclasses.replace(scored, predictions=predictions, labels=labels)
        whole.append(dataclasses.replace(m, series=tuple(series), accuracy=scored))
    return dataclasses.replace(run, measurements=tuple(whole))


def _short(error: SQLAlchemyError) -> str:
    """The driver's own words, without SQLAlchemy's statement and parameters."""
    origin = getattr(error, "orig", None)
    return str(origin if origin is not None else error).strip().splitlines()[0]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
