"""Summaries kept beside their runs are those that the runs themselves would give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import sqlalchemy as sa

from device_agents.wire import Cooling, Window
from edgevit.results import kept, schema
from edgevit.results.stats import summarize_all
from edgevit.results.store import Store
from edgevit.results.summary import Summary
from tests.support.judged import mixed
from tests.support.runs import measurement, run


def hot() -> tuple[Window, ...]:
    return tuple(Window(i * 1000, 1000, 100 if i < 120 else 70, 10**7 if i < 120 else 14 * 10**6, 1) for i in range(300))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with a failure, a run that was interrupted, minutes of load and a wait for a cool board."""
    made = f"sqlite:///{tmp_path / 'results.sqlite'}"
    base = measurement(processes=1)
    cooled = Cooling("reached", 70.0, 50.0, 49.5, 12.5)
    load = dataclasses.replace(base, series=(dataclasses.replace(base.series[0], windows=hot(), cooling=cooled),))
    with Store(made) as store:
        for one in (*mixed(), run(batch="b2", measurements=(load,))):
            store.add_run(one)
    return made


def anew(store: Store, batch: str | None = None) -> list[Summary]:
    return [dataclasses.replace(s, profile=None) for s in summarize_all(store.runs(batch))]


def execute(url: str, statement: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def test_kept_summaries_are_those_of_the_runs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(url) as store:
        expected, of_one = anew(store), anew(store, "b2")

        def refuse(*_: object) -> None:
            raise AssertionError("a run was summarized anew")

        monkeypatch.setattr("edgevit.results.stats.summarize", refuse)
        assert store.summaries() == expected
        assert store.summaries("b2") == of_one
    assert of_one[0].sustained is not None and of_one[0].cooling


@pytest.mark.parametrize(
    "damage", ["DELETE FROM summaries", "UPDATE summaries SET code = 'older'", "UPDATE summaries SET document = '[[1]]'"]
)
def test_what_is_not_kept_is_made_anew_and_kept_then(url: str, damage: str) -> None:
    with Store(url) as store:
        expected = anew(store)
    execute(url, damage)
    with Store(url, read_only=True) as reading:
        assert reading.summaries() == expected
    with Store(url) as store:
        assert store.summaries() == expected
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        assert set(connection.scalars(sa.select(schema.summaries.c.code))) == {kept.code_digest()}
    engine.dispose()


def test_a_store_of_before_gives_them_too(url: str) -> None:
    with Store(url) as store:
        expected = anew(store)
    execute(url, "DROP TABLE summaries")
    execute(url, f"DELETE FROM edgevit_migrations WHERE number >= {schema.SUMMARIES_VERSION}")
    with Store(url, read_only=True) as reading:
        assert reading.summaries() == expected
    with Store(url) as store:
        assert store.summaries() == expected


def test_a_run_that_is_removed_takes_its_summaries_along(url: str) -> None:
    with Store(url) as store:
        assert store.remove_runs(["b2-pi4"]) == 1
        assert "b2" not in {s.batch_id for s in store.summaries()}
