"""The results store: what went in comes out, each run once, nothing half-written, a newer store refused."""

from __future__ import annotations

import dataclasses
import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from device_agents import wire
from edgevit.errors import StoreError, UsageError
from edgevit.results import schema
from edgevit.results.rows import pack_int64, unpack_int64
from edgevit.results.store import Batch, Store, open_store
from edgevit.select import Choice, Dropped
from tests.support.runs import failed, run


def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'new' / 'results.sqlite'}"


def rows(tmp_path: Path, table: str) -> int:
    with sqlite3.connect(tmp_path / "new" / "results.sqlite") as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_a_run_comes_back_as_it_went_in(tmp_path: Path) -> None:
    whole = run(measurements=(*run().measurements, failed()))
    with Store(url(tmp_path)) as store:
        assert store.latest_batch() is None
        assert store.add_batch(Batch("b1", "2025-01-15T10:00:00Z", "edgevit bench"))
        assert store.add_run(whole)
    with Store(url(tmp_path)) as store:
        assert store.runs() == [whole]
        assert store.runs("b1", target="pi4", run_id="b1-pi4") == [whole]
        assert store.runs("b2") == []
        assert store.has_run("b1-pi4")
        assert not store.has_run("b1-pi5")
        assert store.latest_batch() == Batch("b1", "2025-01-15T10:00:00Z", "edgevit bench", runs=1)


def test_samples_lie_in_the_store_as_little_endian_int64(tmp_path: Path) -> None:
    one = run()
    with Store(url(tmp_path)) as store:
        store.add_run(one)
    with sqlite3.connect(tmp_path / "new" / "results.sqlite") as db:
        blob, count = db.execute("SELECT samples, sample_count FROM series WHERE position = 0 AND number = 0").fetchone()
        document = db.execute("SELECT document FROM runs").fetchone()[0]
    samples = one.measurements[0].series[0].samples_ns
    assert (len(blob), count) == (8 * len(samples), len(samples))
    assert int.from_bytes(blob[8:16], "little") == samples[1]
    assert str(samples[1]) not in document, "samples are kept once, in the blob"


def test_a_run_is_added_once_and_a_duplicate_changes_nothing(tmp_path: Path) -> None:
    first = run()
    other = dataclasses.replace(first, reason="a different document under the same id")
    with Store(url(tmp_path)) as store:
        assert store.add_run(first) is True
        assert store.add_run(first) is False
        assert store.add_run(other) is False
        assert store.runs() == [first]
    assert (rows(tmp_path, "measurements"), rows(tmp_path, "series")) == (4, 12)


def test_a_run_of_an_unknown_batch_brings_its_batch(tmp_path: Path) -> None:
    with Store(url(tmp_path)) as store:
        store.add_run(run(batch="elsewhere"))
        batch = store.latest_batch()
        assert batch is not None
        assert (batch.id, batch.command) == ("elsewhere", "submitted by someone@desk")
        assert store.add_batch(Batch("elsewhere", "2026-01-01T00:00:00Z")) is False


def test_batches_newest_first_and_an_empty_one_is_not_the_latest(tmp_path: Path) -> None:
    with Store(url(tmp_path)) as store:
        for day, name in ((1, "old"), (2, "new"), (3, "empty")):
            store.add_batch(Batch(name, f"2025-01-0{day}T00:00:00Z"))
        store.add_run(run(batch="old"))
        store.add_run(run(batch="new"))
        assert [(b.id, b.runs) for b in store.batches()] == [("empty", 0), ("new", 1), ("old", 1)]
        latest = store.latest_batch()
        assert latest is not None
        assert latest.id == "new"


def test_the_operators_store_is_where_the_environment_says(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open_store() as store:
        batch = store.new_batch("bench deit")
        store.add_run(run(batch=batch))
        assert [(b.id, b.command, b.runs) for b in store.batches()] == [(batch, "bench deit", 1)]
    assert (home / "data" / "results.sqlite").exists()
    monkeypatch.setenv("EDGEVIT_DB", str(tmp_path / "other.sqlite"))
    with open_store() as store:
        assert store.batches() == []


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    broken = run()
    odd = dataclasses.replace(broken.measurements[3], recipe=None)  # NOT NULL: the last row fails, after all the others
    with Store(url(tmp_path)) as store:
        with pytest.raises(StoreError, match="adding run b1-pi4"):
            store.add_run(dataclasses.replace(broken, measurements=(*broken.measurements[:3], odd)))
        assert store.runs() == []
        for table in ("batches", "runs", "measurements", "series"):
            assert rows(tmp_path, table) == 0, f"{table} kept part of a run that failed"
        assert store.add_run(broken)


def test_a_store_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    with Store(url(tmp_path)) as store:
        store.add_run(run())
    path = tmp_path / "new" / "results.sqlite"
    newer = len(schema.MIGRATIONS) + 1
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO edgevit_migrations VALUES (?, 'later')", (newer,))
    with pytest.raises(StoreError, match=f"version {newer}, written by a newer edgevit") as caught:
        Store(url(tmp_path))
    assert "upgrade" in caught.value.hint
    assert rows(tmp_path, "edgevit_migrations") == newer


def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run()
    with Store(url(tmp_path)) as store:
        store.add_run(whole)

    def adds_then_fails(connection: object) -> None:
        connection.exec_driver_sql("ALTER TABLE runs ADD COLUMN note TEXT")  # type: ignore[attr-defined]
        connection.exec_driver_sql("SELECT no_such_function()")  # type: ignore[attr-defined]

    known = schema.MIGRATIONS
    monkeypatch.setattr(schema, "MIGRATIONS", (*known, adds_then_fails))
    with pytest.raises(StoreError, match="no_such_function"):
        Store(url(tmp_path))
    monkeypatch.setattr(schema, "MIGRATIONS", known)
    with Store(url(tmp_path)) as store:
        assert store.runs() == [whole]
    with sqlite3.connect(tmp_path / "new" / "results.sqlite") as db:
        assert "note" not in [c[1] for c in db.execute("PRAGMA table_info(runs)")]


def test_what_is_not_a_store(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    path.write_bytes(b"this is no database, however long it may be made" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Store(f"sqlite:///{path}")
    with pytest.raises(UsageError, match="is not one"):
        Store("results.sqlite")
    with pytest.raises(UsageError, match="nosuchdatabase"):
        Store("nosuchdatabase://host/name")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        Store(f"sqlite:///{tmp_path / 'file' / 'below' / 'results.sqlite'}")


def test_a_damaged_blob_is_an_error_not_fewer_samples(tmp_path: Path) -> None:
    with Store(url(tmp_path)) as store:
        store.add_run(run())
        with sqlite3.connect(tmp_path / "new" / "results.sqlite") as db:
            db.execute("UPDATE series SET samples = substr(samples, 1, 13) WHERE position = 1 AND number = 2")
        with pytest.raises(StoreError, match="run b1-pi4 is damaged"):
            store.runs()


def test_a_password_in_the_url_is_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        Store("postgresql+nosuchdriver://me:secret@127.0.0.1:1/edgevit")
    assert "secret" not in str(caught.value)


def _add(address: str, number: int) -> int:
    with Store(address) as store:
        return sum(store.add_run(run(f"pi{i}", run_id=f"r{i}")) for i in range(6))


def test_writers_at_once_add_each_run_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        added = pool.starmap(_add, [(url(tmp_path), n) for n in range(3)])
    assert sum(added) == 6
    with Store(url(tmp_path)) as store:
        assert [r.job.run_id for r in store.runs()] == [f"r{i}" for i in range(6)]


@pytest.mark.parametrize("values", [(), (0,), (1, -1, 2**62, -(2**63), 2**63 - 1)])
def test_int64_round_trip(values: tuple[int, ...]) -> None:
    assert unpack_int64(pack_int64(values)) == values


def test_the_document_stays_readable_as_a_wire_run(tmp_path: Path) -> None:
    with Store(url(tmp_path)) as store:
        store.add_run(run())
    with sqlite3.connect(tmp_path / "new" / "results.sqlite") as db:
        document = db.execute("SELECT document FROM runs").fetchone()[0]
    assert wire.loads(wire.Run, document.encode(), "run", wire.MAX_RUN_BYTES).job == run().job


def choice(policy: str = "fastest", artifact: str = "onnx-int8", target: str = "pi4") -> Choice:
    one = wire.Variant("b" * 64, artifact, "onnxruntime", "CPUExecutionProvider", 4)
    dropped = (Dropped(dataclasses.replace(one, artifact="onnx-fp16"), "INVALID: the board was throttled"),)
    return Choice(
        target, one.bundle, "model.variants", policy, 1.0, False, one, "8.1 ms", ("run-1",), (), dropped, ("no images",), (one,)
    )


def test_a_choice_comes_back_whole_and_the_same_again_adds_nothing(tmp_path: Path) -> None:
    with Store(url(tmp_path)) as store:
        assert store.choices() == []
        assert store.add_choice(choice()) and not store.add_choice(choice())
        assert store.add_choice(choice("smallest")) and store.add_choice(choice(target="pi5"))
        assert not store.add_choice(choice()), "others in between change nothing"
        assert store.add_choice(choice(artifact="tflite-int8")) and store.add_choice(choice()), "what changed is kept, and back"
    with Store(url(tmp_path)) as store:
        kept = [one.choice for one in store.choices()]
    assert kept == [choice(), choice(artifact="tflite-int8"), choice(target="pi5"), choice("smallest"), choice()], (
        "newest first"
    )


def test_a_store_of_before_choices_gets_them_and_keeps_its_runs(tmp_path: Path) -> None:
    with Store(url(tmp_path)) as store:
        store.add_run(run())
    with sqlite3.connect(tmp_path / "new" / "results.sqlite") as db:
        db.executescript("DROP TABLE choices; DROP TABLE summaries; DROP INDEX measurements_by_bundle_name")
        db.execute("DELETE FROM edgevit_migrations WHERE number > 1")
    with Store(url(tmp_path)) as store:
        assert store.runs() == [run()] and store.add_choice(choice())
    assert rows(tmp_path, "edgevit_migrations") == len(schema.MIGRATIONS)


def test_a_damaged_choice_is_named(tmp_path: Path) -> None:
    with Store(url(tmp_path)) as store:
        store.add_choice(choice())
    with sqlite3.connect(tmp_path / "new" / "results.sqlite") as db:
        db.execute("UPDATE choices SET document = replace(document, '\"policy\"', '\"polycy\"')")
    with Store(url(tmp_path)) as store, pytest.raises(StoreError, match=r"choice .* is damaged in the store: choice.polycy"):
        store.choices()
