"""The results store: every run that came home, with its raw samples, each exactly once.

SQLAlchemy Core over SQLite by default and PostgreSQL by URL (:mod:`edgevit.results.engine`). Samples are never averaged away:
they lie in the store as little-endian int64 nanoseconds, and a run read back equals the run that was added
(:mod:`edgevit.results.rows`). Each change is one transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from device_agents import wire
from edgevit.errors import StoreError
from edgevit.places import shown_url
from edgevit.progress import Progress, Quiet
from edgevit.results import schema
from edgevit.results.engine import open_engine, short
from edgevit.results.rows import AT_ONCE, insert_once, insert_run, keep_summaries, kept_summaries, restore_runs

if TYPE_CHECKING:
    from edgevit.results.summary import Summary
    from edgevit.select import Choice


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


@dataclass(frozen=True)
class RunOutline:
    """What is known of a run without reading it: where it was measured, when it ended (UTC, ISO 8601), the names of its
    bundles."""

    run_id: str
    batch_id: str
    target: str
    ended_at: str
    bundle_names: tuple[str, ...]


def open_store(url: str | None = None, *, read_only: bool = False) -> Store:
    """The operator's store: ``url``, else :func:`edgevit.places.db_url`. Close it, or use it as a context manager."""
    from edgevit import places

    return Store(url or places.db_url(), read_only=read_only)


class Store:
    """An open store. Raises :class:`StoreError` for everything that goes wrong in the database."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Open, creating or migrating it. ``url``: an SQLAlchemy URL, see :func:`edgevit.places.db_url`.

        A store that a newer edgevit has written is refused, and one that is half-written. ``read_only``: nothing is created,
        migrated or written, and the database itself refuses to; a store that is not there is refused then.
        """
        self._shown = shown_url(url)
        self._read_only = read_only
        self._engine = open_engine(url, read_only=read_only)
        # On SQLite a transaction that will write takes the write lock at once: no dead end between two readers-turned-writers.
        self._writing = self._engine.execution_options(edgevit_write=True)
        try:
            self._version = self._prepare()
        except StoreError:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Give back the connections; harmless when called twice."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _mapped(self, what: str, hint: str = "edgevit doctor") -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as e:
            said = short(e)
            damaged = isinstance(e, DatabaseError) and ("malformed" in said or "not a database" in said)
            if damaged:
                hint = "move that file away or set EDGEVIT_DB, then edgevit collect"
            raise StoreError(f"{what}: the store {self._shown} said: {said}", hint=hint) from e

    # ---- versions ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> int:
        """The store's version, after its migrations. Nothing is locked where none is due."""
        known = len(schema.MIGRATIONS)
        with self._mapped("opening"), self._engine.begin() as connection:
            version = self._read_version(connection)
        if self._read_only and version == 0:
            raise StoreError(f"there is nothing in the store {self._shown} yet", hint="edgevit bench BUNDLE TARGET")
        if self._read_only or version == known:
            return version
        with self._mapped("opening"), self._writing.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7246118)"))  # one migrator at a time
            schema.migrations.create(connection, checkfirst=True)
            for number in range(self._read_version(connection) + 1, known + 1):
                schema.MIGRATIONS[number - 1](connection)
                connection.execute(schema.migrations.insert().values(number=number, applied_at=_now()))
        return known

    def _read_version(self, connection: Connection) -> int:
        """0 where there is no store yet. StoreError for one of a newer edgevit and one of which a part is missing."""
        present = set(sa.inspect(connection).get_table_names())
        version = 0
        if schema.migrations.name in present:
            version = connection.scalar(sa.select(sa.func.max(schema.migrations.c.number))) or 0
        known = len(schema.MIGRATIONS)
        if version > known:
            raise StoreError(
                f"the store {self._shown} is of version {version}, written by a newer edgevit; this one knows {known}",
                hint="pip install --upgrade edgevit",
            )
        expected = schema.tables_of(version)
        missing = sorted(expected - present)
        if missing:
            raise StoreError(
                f"the store {self._shown} is half-written: of version {version}, without the table{'s'[: len(missing) > 1]} "
                f"{', '.join(missing)}",
                hint="put back a copy of it, or move it away or set EDGEVIT_DB, then edgevit collect",
            )
        foreign = sorted((schema.tables_of(known) - expected - {schema.migrations.name}) & present)
        if foreign:
            raise StoreError(
                f"the database {self._shown} has tables of these names that edgevit did not make: {', '.join(foreign)}",
                hint="set EDGEVIT_DB to a database of its own",
            )
        return version

    # ---- batches and runs -------------------------------------------------------------------------------------------

    def add_batch(self, batch: Batch) -> bool:
        """Add a batch; False, changing nothing, where its id is there already."""
        with self._mapped(f"adding batch {batch.id}"), self._writing.begin() as connection:
            return _insert_batch(connection, batch)

    def new_batch(self, command: str) -> str:
        """Begin a batch now; its id, which sorts by time and is unique."""
        batch_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:8]
        self.add_batch(Batch(batch_id, _now(), command))
        return batch_id

    def add_run(self, run: wire.Run) -> bool:
        """Add a run with all its samples in one transaction; False, changing nothing, where its ``run_id`` is there already,
        also when another writer adds it at this moment.

        A run whose batch this store does not know (collected from another operator's job) brings its batch along.
        """
        job = run.job
        # Only an acknowledged run leaves its device, so nothing is lost where the database is away.
        hint = f"once it answers again: edgevit collect {job.target} (the run waits on the device)"
        with self._mapped(f"adding run {job.run_id}", hint), self._writing.begin() as connection:
            if _has(connection, schema.runs.c.run_id, job.run_id):
                return False
            _insert_batch(connection, Batch(job.batch_id, job.submitted_at, f"submitted by {job.submitted_by}"))
            if not insert_run(connection, run):
                return False
        # Apart: what was measured is safe before anything is counted from it.
        with self._mapped(f"keeping the summary of run {job.run_id}"), self._writing.begin() as connection:
            keep_summaries(connection, [run])
        return True

    def batches(self, limit: int | None = None) -> list[Batch]:
        """Every batch, newest first, or the ``limit`` newest."""
        with self._mapped("listing batches"), self._engine.begin() as connection:
            return [Batch(**row) for row in connection.execute(_BATCHES.limit(limit)).mappings()]

    def count_batches(self) -> int:
        with self._mapped("counting batches"), self._engine.begin() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(schema.batches)) or 0

    def latest_batch(self) -> Batch | None:
        """The newest batch that holds a run; None where there is none."""
        held = sa.exists().where(schema.runs.c.batch_id == schema.batches.c.batch_id)
        with self._mapped("looking for the newest batch"), self._engine.begin() as connection:
            row = connection.execute(_BATCHES.where(held).limit(1)).mappings().first()
        return Batch(**row) if row is not None else None

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
        bundle_name: str | None = None,
    ) -> list[wire.Run]:
        """Runs with all their samples, oldest first, of everything or of what is named; ``bundles``: runs that measured any
        bundle of these digests, ``bundle_name``: of this name."""
        r, m = schema.runs, schema.measurements
        query = sa.select(r.c.run_id, r.c.document).order_by(r.c.started_at, r.c.run_id)
        for column, wanted in ((r.c.batch_id, batch_id), (r.c.run_id, run_id), (r.c.target, target)):
            if wanted is not None:
                query = query.where(column == wanted)
        if bundles is not None:
            query = query.where(r.c.run_id.in_(sa.select(m.c.run_id).where(m.c.bundle.in_(list(bundles)))))
        if bundle_name is not None:
            query = query.where(r.c.run_id.in_(sa.select(m.c.run_id).where(m.c.bundle_name == bundle_name)))
        with self._mapped("reading runs"), self._engine.begin() as connection:
            return list(restore_runs(connection, connection.execute(query).all()))

    def summaries(self, batch_id: str | None = None, progress: Progress | None = None) -> list[Summary]:
        """Every measurement of everything, or of a batch, in figures and related to its fp32; oldest run first. The same as of
        :meth:`runs`, but for operators' times, and far sooner: it is kept. What is not, or was made by other code, is made
        anew, and kept where the store may be written."""
        from edgevit.results.reference import relate
        from edgevit.results.stats import summarize, summarize_all

        with self._mapped("reading summaries"), self._engine.begin() as connection:
            if self._version < schema.SUMMARIES_VERSION:
                return summarize_all(self.runs(batch_id))
            found = kept_summaries(connection, batch_id)
        lacking = [run_id for run_id, kept in found.items() if kept is None]
        progress = progress or Quiet()
        if lacking:
            progress.start("summaries", "summarize runs that another version of edgevit kept", len(lacking), "runs")
        for done, some in enumerate(_portions(lacking, AT_ONCE)):
            progress.advance("summaries", done * AT_ONCE)
            runs = self.runs_of(some)
            if self._read_only:
                made = [summarize(run) for run in runs]
            else:
                with self._mapped("keeping summaries"), self._writing.begin() as connection:
                    made = keep_summaries(connection, runs)
            found |= {run.job.run_id: one for run, one in zip(runs, made, strict=True)}
        if lacking:
            progress.finish("summaries")
        return relate([s for kept in found.values() for s in kept or ()])

    def runs_of(self, run_ids: Sequence[str]) -> list[wire.Run]:
        """The runs of these ids that are there, oldest first."""
        r = schema.runs
        query = sa.select(r.c.run_id, r.c.document).where(r.c.run_id.in_(list(run_ids))).order_by(r.c.started_at, r.c.run_id)
        with self._mapped("reading runs"), self._engine.begin() as connection:
            return list(restore_runs(connection, connection.execute(query).all()))

    def recent_runs(self, bundles: Collection[str], targets: Collection[str], each: int) -> list[wire.Run]:
        """The ``each`` newest runs of every one of ``targets`` that measured any bundle of these digests, oldest first."""
        r, m = schema.runs, schema.measurements
        measured = sa.select(m.c.run_id).where(m.c.bundle.in_(list(bundles)))
        query = sa.select(r.c.run_id, r.c.target).where(r.c.target.in_(list(targets)), r.c.run_id.in_(measured))
        found: dict[str, list[str]] = {}
        with self._mapped("looking for runs"), self._engine.begin() as connection:
            for row in connection.execute(query.order_by(r.c.started_at.desc(), r.c.run_id.desc())):
                found.setdefault(row.target, []).append(row.run_id)
        newest = self.each_run([run_id for ids in found.values() for run_id in ids[:each]])
        return sorted(newest, key=lambda run: (run.started_at, run.job.run_id))

    def each_run(self, run_ids: Sequence[str]) -> Iterator[wire.Run]:
        """The runs of these ids in this order, a portion of them in memory at a time."""
        for some in _portions(run_ids, AT_ONCE):
            found = {run.job.run_id: run for run in self.runs_of(some)}
            yield from (found[run_id] for run_id in some if run_id in found)

    def last_run_ids(self, target: str, limit: int) -> list[str]:
        """Of the ``limit`` runs of ``target`` that ended last, the last one first."""
        query = sa.select(schema.runs.c.run_id).where(schema.runs.c.target == target)
        query = query.order_by(schema.runs.c.ended_at.desc(), schema.runs.c.run_id.desc()).limit(limit)
        with self._mapped(f"looking for the last runs of {target}"), self._engine.begin() as connection:
            return list(connection.scalars(query))

    def outlines(self) -> list[RunOutline]:
        """Every run in outline, oldest first."""
        r, m = schema.runs, schema.measurements
        query = sa.select(r.c.run_id, r.c.batch_id, r.c.target, r.c.ended_at).order_by(r.c.ended_at, r.c.run_id)
        names: dict[str, dict[str, None]] = {}
        with self._mapped("listing runs"), self._engine.begin() as connection:
            for run_id, name in connection.execute(sa.select(m.c.run_id, m.c.bundle_name).distinct()):
                names.setdefault(run_id, {})[name] = None
            rows = connection.execute(query).all()
        return [RunOutline(*row, tuple(sorted(names.get(row.run_id, {})))) for row in rows]

    def remove_runs(self, run_ids: Collection[str]) -> int:
        """Remove these runs, and the batches that hold none any more because of it, in one transaction; how many are gone.

        A run that a choice names as its evidence stays, also where that choice was made a moment ago.
        """
        wanted = set(run_ids)
        with self._mapped("removing runs"), self._writing.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("LOCK TABLE choices IN SHARE MODE"))  # no new choice until this is done
            wanted -= {run_id for one in self._read_choices(connection) for run_id in one.choice.runs}
            gone = 0
            for some in _portions(sorted(wanted)):
                batches = connection.scalars(sa.select(schema.runs.c.batch_id).where(schema.runs.c.run_id.in_(some)).distinct())
                emptied = list(batches)
                for table in (schema.summaries, schema.series, schema.measurements):
                    connection.execute(sa.delete(table).where(table.c.run_id.in_(some)))
                gone += connection.execute(sa.delete(schema.runs).where(schema.runs.c.run_id.in_(some))).rowcount
                held = sa.exists().where(schema.runs.c.batch_id == schema.batches.c.batch_id)
                connection.execute(sa.delete(schema.batches).where(schema.batches.c.batch_id.in_(emptied), ~held))
        return gone

    def compact(self) -> None:
        """Give what was removed back to the disk, where the database does not do so itself."""
        if self._engine.dialect.name != "sqlite":
            return
        with self._mapped("compacting"), self._engine.connect().execution_options(edgevit_bare=True) as connection:
            connection.exec_driver_sql("VACUUM")

    # ---- choices ----------------------------------------------------------------------------------------------------

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
            return _insert_choice(connection, StoredChoice(choice_id, _now(), choice))

    def add_stored_choice(self, stored: StoredChoice) -> bool:
        """Keep a choice that another store has; False, changing nothing, where its id is there already."""
        with self._mapped(f"adding choice {stored.id}"), self._writing.begin() as connection:
            return _insert_choice(connection, stored)

    def choices(self) -> list[StoredChoice]:
        """Every choice, newest first."""
        if schema.choices.name not in schema.tables_of(self._version):
            return []
        with self._mapped("reading choices"), self._engine.begin() as connection:
            return self._read_choices(connection)

    def _read_choices(self, connection: Connection) -> list[StoredChoice]:
        query = sa.select(schema.choices).order_by(schema.choices.c.choice_id.desc())
        rows = connection.execute(query).all()
        return [StoredChoice(row.choice_id, row.created_at, _choice(row.choice_id, row.document)) for row in rows]


def _insert_choice(connection: Connection, stored: StoredChoice) -> bool:
    choice = stored.choice
    row = {
        "choice_id": stored.id,
        "created_at": stored.created_at,
        "target": choice.target,
        "bundle": choice.bundle,
        "policy": choice.policy,
        "document": wire.dumps(choice).decode("utf-8"),
    }
    return insert_once(connection, schema.choices, row)


def _choice(choice_id: str, document: str) -> Choice:
    from edgevit.select import Choice

    try:
        return wire.loads(Choice, document.encode("utf-8"), "choice", wire.MAX_RUN_BYTES)
    except wire.WireError as e:
        raise StoreError(
            f"choice {choice_id} is damaged in the store: {e}", hint="edgevit deploy BUNDLE TARGET --select"
        ) from e


def _has(connection: Connection, column: sa.Column[str], value: str) -> bool:
    return connection.scalar(sa.select(sa.literal(1)).where(column == value)) is not None


_BATCHES = sa.select(
    schema.batches.c.batch_id.label("id"),
    schema.batches.c.created_at,
    schema.batches.c.command,
    sa.select(sa.func.count())
    .where(schema.runs.c.batch_id == schema.batches.c.batch_id)
    .correlate(schema.batches)
    .scalar_subquery()
    .label("runs"),
).order_by(schema.batches.c.created_at.desc(), schema.batches.c.batch_id.desc())


def _insert_batch(connection: Connection, batch: Batch) -> bool:
    row = {"batch_id": batch.id, "created_at": batch.created_at, "command": batch.command}
    return insert_once(connection, schema.batches, row)


def _portions(ids: Sequence[str], size: int = 500) -> Iterator[Sequence[str]]:
    """Within what a statement may have of parameters."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
