from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgres import Postgres, running_postgres


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    with running_postgres() as made:
        yield made


@pytest.fixture
def database(server: Postgres) -> str:
    """The URL of a new, empty database."""
    return server.new_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store that is not there yet, once on each database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'results.sqlite'}"
    server: Postgres = request.getfixturevalue("server")
    return server.new_database()
