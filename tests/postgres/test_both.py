"""The same store on SQLite and on a real PostgreSQL: what holds on one holds on the other."""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from edgevit.errors import StoreError, UsageError
from edgevit.results import schema
from edgevit.results.rows import insert_run
from edgevit.results.stats import summarize_all
from edgevit.results.store import Batch, RunOutline, Store
from tests.support.postgres import PASSWORD, Postgres
from tests.support.runs import failed, run
from tests.unit.test_store import choice


def execute(url: str, *statements: str) -> list[tuple[object, ...]]:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        rows = [
            tuple(row)
            for text in statements
            for found in [connection.execute(sa.text(text))]
            if found.returns_rows
            for row in found
        ]
    engine.dispose()
    return rows


def test_a_run_comes_back_as_it_went_in(url: str) -> None:
    whole = run(measurements=(*run().measurements, failed()))
    with Store(url) as store:
        assert store.latest_batch() is None
        assert store.add_batch(Batch("b1", "2025-01-15T10:00:00Z", "edgevit bench")) and store.add_run(whole)
        assert not store.add_run(whole) and not store.add_batch(Batch("b1", "later"))
    with Store(url) as store:
        assert store.runs() == [whole] == store.runs("b1", target="pi4", run_id="b1-pi4")
        assert store.runs(bundle_name="deit-tiny-fp32") == [whole] and store.runs(bundle_name="other") == []
        assert store.runs(bundles=[whole.job.variants[0].bundle]) == [whole] == store.runs_of(["b1-pi4", "gone"])
        assert store.last_run_ids("pi4", 2) == ["b1-pi4"] and store.last_run_ids("pi5", 2) == []
        assert store.latest_batch() == Batch("b1", "2025-01-15T10:00:00Z", "edgevit bench", runs=1) == store.batches(limit=1)[0]
        names = ("deit-tiny-fp32", "deit-tiny-int8-dynamic", "deit-tiny-int8-static")
        assert store.outlines() == [RunOutline("b1-pi4", "b1", "pi4", whole.ended_at, names)]


def test_many_runs_are_read_in_portions_and_in_order(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevit.results.rows.AT_ONCE", 3)
    several = [run(run_id=f"r{i}", started_at=f"2025-01-{i + 10}T00:00:00Z") for i in range(8)]
    with Store(url) as store:
        for one in reversed(several):
            store.add_run(one)
        assert store.runs() == several


def test_summaries_are_kept_and_made_anew_where_they_are_not(url: str) -> None:
    with Store(url) as store:
        for number in range(3):
            store.add_run(run(run_id=f"r{number}", measurements=(*run().measurements, failed())))
        expected = summarize_all(store.runs())
        assert store.summaries() == expected == store.summaries("b1")
        execute(url, "UPDATE summaries SET code = 'older' WHERE run_id = 'r0'", "DELETE FROM summaries WHERE run_id = 'r1'")
        with Store(url, read_only=True) as reading:
            assert reading.summaries() == expected
        assert store.summaries() == expected
    assert execute(url, "SELECT count(*) FROM summaries WHERE code <> 'older'") == [(3,)]


def _add(address: str, number: int) -> int:
    with Store(address) as store:
        return sum(store.add_run(run(f"pi{i}", run_id=f"r{i}")) for i in range(6))


def test_two_processes_create_and_fill_one_store_at_once(url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        added = pool.starmap(_add, [(url, n) for n in range(2)])
    assert sum(added) == 6, "each run once, whoever was first"
    with Store(url) as store:
        assert [r.job.run_id for r in store.runs()] == [f"r{i}" for i in range(6)]
        assert [b.runs for b in store.batches()] == [6]
    assert execute(url, "SELECT count(*) FROM edgevit_migrations") == [(len(schema.MIGRATIONS),)]


def test_two_who_read_figures_that_are_not_kept_both_get_them(url: str) -> None:
    with Store(url) as first, Store(url) as second:
        for i in range(4):
            first.add_run(run(run_id=f"r{i}"))
        for attempt in range(3):
            execute(url, "DELETE FROM summaries")
            with ThreadPoolExecutor(2) as pool:
                one, other = pool.map(Store.summaries, (first, second))
            assert one == other and len(one) == 16, f"attempt {attempt}"


OLDEST = (Path(__file__).parent.parent / "cases" / "stores" / "version-1.sql").read_text("utf-8")


def test_a_store_of_the_oldest_version_is_brought_up_and_keeps_its_run(url: str) -> None:
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir()
    blob = "BYTEA" if url.startswith("postgresql") else "BLOB"
    execute(url, *[text for text in OLDEST.replace("@BLOB@", blob).split(";\n") if text.strip()])
    old = run(run_id="old")
    engine = sa.create_engine(url)
    with engine.begin() as connection:  # run by run the rows are those of the first release
        connection.execute(schema.batches.insert().values(batch_id="b1", created_at=old.started_at, command="bench"))
        assert insert_run(connection, old)
    engine.dispose()
    with Store(url, read_only=True) as reading:
        assert reading.runs() == [old] and reading.choices() == []
    assert execute(url, "SELECT max(number) FROM edgevit_migrations") == [(1,)], "reading changes nothing"
    with Store(url) as store:
        assert store.runs() == [old] and store.add_choice(choice()) and len(store.choices()) == 1
    assert execute(url, "SELECT max(number) FROM edgevit_migrations") == [(len(schema.MIGRATIONS),)]


def test_a_migration_that_fails_leaves_the_store_as_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(url) as store:
        store.add_run(run())

    def adds_then_fails(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE runs ADD COLUMN note TEXT")
        connection.exec_driver_sql("SELECT no_such_function()")

    known = schema.MIGRATIONS
    monkeypatch.setattr(schema, "MIGRATIONS", (*known, adds_then_fails))
    with pytest.raises(StoreError, match="no_such_function"):
        Store(url)
    monkeypatch.setattr(schema, "MIGRATIONS", known)
    with Store(url) as store:
        assert store.runs() == [run()]
    with pytest.raises(sa.exc.DBAPIError, match="note"):
        execute(url, "SELECT note FROM runs")


def test_a_store_of_a_newer_version_is_refused_and_not_touched(url: str) -> None:
    Store(url).close()
    newer = len(schema.MIGRATIONS) + 1
    execute(url, f"INSERT INTO edgevit_migrations VALUES ({newer}, 'later')")
    for read_only in (False, True):
        with pytest.raises(StoreError, match=f"version {newer}, written by a newer edgevit") as caught:
            Store(url, read_only=read_only)
        assert "upgrade" in caught.value.hint
    assert execute(url, "SELECT count(*) FROM edgevit_migrations") == [(newer,)]


def test_a_half_written_store_is_refused_and_names_what_is_missing(url: str) -> None:
    with Store(url) as store:
        store.add_run(run())
    execute(url, "DROP TABLE series")
    with pytest.raises(StoreError, match=r"half-written: of version \d+, without the table series") as caught:
        Store(url)
    assert "collect" in caught.value.hint and PASSWORD not in str(caught.value)
    execute(url, "DROP TABLE edgevit_migrations")
    with pytest.raises(StoreError, match="tables of these names that edgevit did not make: batches, choices"):
        Store(url)


def test_reading_only_creates_and_changes_nothing(url: str) -> None:
    with pytest.raises(StoreError, match=r"there is (nothing in the store|no results store)"):
        Store(url, read_only=True)
    if url.startswith("sqlite"):
        assert not Path(url.removeprefix("sqlite:///")).exists()
    with Store(url) as store:
        store.add_run(run())
    with Store(url, read_only=True) as reading:
        with pytest.raises(StoreError, match=r"read-?only"):
            reading.add_run(run(run_id="other"))
        assert [r.job.run_id for r in reading.runs()] == ["b1-pi4"]


def test_a_failure_in_the_middle_leaves_nothing(url: str) -> None:
    broken = run()
    odd = dataclasses.replace(broken.measurements[3], recipe=None)  # NOT NULL: the last row fails
    with Store(url) as store:
        with pytest.raises(StoreError, match="adding run b1-pi4") as caught:
            store.add_run(dataclasses.replace(broken, measurements=(*broken.measurements[:3], odd)))
        assert store.runs() == [] and store.batches() == []
        assert PASSWORD not in str(caught.value)
        assert store.add_run(broken)


def test_runs_are_removed_whole_and_never_one_that_a_choice_rests_on(url: str) -> None:
    with Store(url) as store:
        for name in ("a", "b"):
            store.add_run(run(batch=name))
        store.add_run(run(batch="a", run_id="run-1"))
        store.add_batch(Batch("waiting", "2025-01-01T00:00:00Z"))
        store.add_choice(choice())  # its evidence is run-1
        assert store.remove_runs(["a-pi4", "b-pi4", "run-1", "gone"]) == 2
        store.compact()
        assert [r.job.run_id for r in store.runs()] == ["run-1"]
        assert {b.id: b.runs for b in store.batches()} == {"a": 1, "waiting": 0}, "only what became empty by it is gone"
    assert execute(url, "SELECT DISTINCT run_id FROM series") == [("run-1",)]


def test_a_server_that_is_away_is_said_without_the_password(server: Postgres, database: str) -> None:
    store = Store(database)
    try:
        server.stop()
        with pytest.raises(StoreError, match="adding run b1-pi4: the store postgresql") as caught:
            store.add_run(run())
        assert "edgevit collect pi4" in caught.value.hint and PASSWORD not in str(caught.value)
        with pytest.raises(StoreError, match="opening") as caught:
            Store(database)
        assert PASSWORD not in str(caught.value)
    finally:
        server.start()
    assert store.add_run(run()), "the same store works again once the server does"
    store.close()


def test_wrong_passwords_and_hosts_are_said_without_them(server: Postgres, database: str) -> None:
    wrong = database.replace(PASSWORD, "wr0ng-one")
    with pytest.raises(StoreError, match="password authentication failed") as caught:
        Store(wrong)
    assert "wr0ng-one" not in str(caught.value)
    with pytest.raises(UsageError) as caught:
        Store(f"postgresql:edgevit:{PASSWORD}@127.0.0.1")
    assert PASSWORD not in str(caught.value)


def test_a_run_is_kept_though_its_summary_cannot_be_made(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect in the statistics")

    with Store(url) as store:
        with monkeypatch.context() as patch:
            patch.setattr("edgevit.results.stats.summarize", broken)
            with pytest.raises(ZeroDivisionError):
                store.add_run(run())
        assert store.runs() == [run()] and not store.add_run(run()), "the device may forget it now"
        assert len(store.summaries()) == 4


def test_the_newest_runs_of_each_target(url: str) -> None:
    with Store(url) as store:
        for target in ("pi4", "pi5", "pi6"):
            for day in range(1, 5):
                store.add_run(run(target, run_id=f"{target}-{day}", started_at=f"2025-01-{day:02}T00:00:00Z"))
        bundle = run().job.variants[0].bundle
        found = [r.job.run_id for r in store.recent_runs([bundle], ["pi4", "pi6"], 2)]
        assert found == ["pi4-3", "pi6-3", "pi4-4", "pi6-4"]
        assert store.recent_runs(["0" * 64], ["pi4"], 2) == []
