"""The database behind the store, by URL: SQLite or PostgreSQL, set up so that nothing is lost and nothing hangs for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from edgevit.errors import MissingExtra, StoreError, UsageError
from edgevit.places import shown_url

BUSY_SECONDS = 30
"""How long a writer waits for another, and the network for an answer to what was sent."""
CONNECT_SECONDS = 10


def open_engine(url: str, *, read_only: bool = False) -> Engine:
    """An engine for ``url``. ``read_only``: nothing is created or changed. UsageError where the URL names no store that there
    could be, MissingExtra and StoreError for what else is wrong; no message shows a password."""
    shown = shown_url(url)
    try:
        parsed = make_url(url)
    except ArgumentError as e:
        raise UsageError(
            f"the store's URL {shown!r} is not one, expected such as sqlite:///results.sqlite", hint="edgevit doctor"
        ) from e
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, read_only)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    try:
        parsed.get_dialect()  # names an unknown one
        if parsed.get_backend_name() != "postgresql":
            raise UsageError(
                f"the store {shown} is neither SQLite nor PostgreSQL", hint="edgevit results list --db sqlite:///results.sqlite"
            )
        engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=_patience(parsed))
    except ImportError as e:
        if parsed.get_driver_name() == "psycopg":
            raise MissingExtra("psycopg", "postgres") from e
        raise StoreError(f"the store {shown} cannot be used: {e}", hint="pip install 'edgevit[postgres]'") from e
    except SQLAlchemyError as e:
        raise UsageError(f"the store {shown} cannot be used: {short(e)}", hint="edgevit doctor") from e
    event.listen(engine, "connect", _prepare_postgresql)
    return engine.execution_options(postgresql_readonly=True) if read_only else engine


def short(error: SQLAlchemyError) -> str:
    """The driver's own words, without SQLAlchemy's statement and parameters."""
    origin = getattr(error, "orig", None)
    lines = str(origin if origin is not None else error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _open_sqlite(url: sa.URL, read_only: bool) -> Engine:
    path = Path(url.database).absolute() if url.database and url.database != ":memory:" else None
    if path is not None and read_only and not path.is_file():
        raise StoreError(f"there is no results store at {path} yet", hint="edgevit bench BUNDLE TARGET")
    if path is not None and not read_only:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise StoreError(f"the store's folder {path.parent} cannot be made: {e.strerror}", hint="edgevit doctor") from e
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _prepare_sqlite_reader if read_only else _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _patience(url: sa.URL) -> dict[str, Any]:
    """libpq would wait for a vanished server for good; what the URL says itself stands."""
    if url.get_driver_name() not in ("psycopg", "psycopg2"):
        return {}
    wanted = {"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": BUSY_SECONDS * 1000, "application_name": "edgevit"}
    return {name: value for name, value in wanted.items() if name not in url.query}


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{BUSY_SECONDS}s'")
    connection.commit()


def _prepare_sqlite_reader(connection: Any, _record: Any) -> None:
    # The driver must not open transactions by itself, so that DDL is transactional and BEGIN IMMEDIATE possible:
    # docs.sqlalchemy.org, "Serializable isolation / Savepoints / Transactional DDL" of the SQLite dialect.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA query_only = ON")
    cursor.close()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")
    # A device forgets its copy once the store has it, so a commit must survive a power cut.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if not options.get("edgevit_bare"):  # VACUUM works outside of a transaction alone
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("edgevit_write") else "BEGIN")
