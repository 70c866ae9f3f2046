"""A throw-away real PostgreSQL server from Debian's package, on a port of its own, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PASSWORD = "s3cret-of-a-test"
SECONDS = 60


def find_postgres() -> Path | None:
    """The folder of the newest server's programs; Debian keeps them off the PATH."""
    there = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if there:
        return there[-1].parent
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found else None


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server that answers. RuntimeError where none is installed."""
    programs = find_postgres()
    if programs is None:
        raise RuntimeError("these tests need a real PostgreSQL server: sudo apt install postgresql (make test installs it)")
    made = Postgres(programs)
    try:
        made.start()
        yield made
    finally:
        made.close()


class Postgres:
    """A server that can be stopped and started again. It refuses to run as root: then the account ``postgres`` runs it."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="edgevit-postgres-"))
        self._as: dict[str, Any] = {}
        if os.getuid() == 0:
            account = pwd.getpwnam("postgres")
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(self._folder, account.pw_uid, account.pw_gid)
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        initdb = [str(programs / "initdb"), "-D", str(self._folder / "data"), "-U", "edgevit", "--auth=scram-sha-256"]
        initdb += [f"--pwfile={secret}", "--no-sync", "--encoding=UTF8", "--no-locale", "--no-instructions"]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/", **self._as)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._server: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def start(self) -> None:
        """Start it and wait until it answers."""
        argv = [str(self._programs / "postgres"), "-D", str(self._folder / "data"), "-p", str(self.port), "-F"]
        argv += ["-h", "127.0.0.1", "-k", str(self._folder), "-c", "shared_buffers=32MB"]
        log = (self._folder / "log").open("ab")
        self._server = subprocess.Popen(argv, stdout=log, stderr=log, cwd="/", **self._as)
        log.close()
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                self.run("postgres", "SELECT 1")
                return
            except Exception as error:
                if time.monotonic() > deadline or self._server.poll() is not None:
                    raise RuntimeError(f"PostgreSQL does not start: {(self._folder / 'log').read_text()[-2000:]}") from error
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop it at once: connections are cut, what was committed stays."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(SECONDS)
            self._server = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://edgevit:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        self._databases += 1
        name = f"results{self._databases}"
        self.run("postgres", f"CREATE DATABASE {name}")
        return self.url(name)

    def run(self, database: str, statement: str) -> list[Any]:
        """Execute a statement beside the store; its rows."""
        import psycopg

        place = {"host": "127.0.0.1", "port": self.port, "user": "edgevit", "password": PASSWORD, "dbname": database}
        with psycopg.connect(**place, autocommit=True, connect_timeout=5) as connection:  # type: ignore[arg-type]
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []
