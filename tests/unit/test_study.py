"""Studies without a device or torch: files and their settings, which cells apply, processes, figures and the table."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edgevit.cli import run_cli
from edgevit.errors import BuildError, ConfigError, DataError, UnknownName, UsageError
from edgevit.profile import load_profile
from edgevit.progress import Progress, Quiet
from edgevit.report.study_view import csv_text, json_rows, markdown, render_study
from edgevit.results.store import Store
from edgevit.study.file import StudyFile, list_studies, load_study
from edgevit.study.measured import is_measured, measured_rows
from edgevit.study.plan import plan_cells, startable
from edgevit.study.rows import Row, beats, mcnemar, pair, pareto, related
from edgevit.workers import Outcome, Task, run_tasks
from tests.support import runs

GOOD = """\
schema: edgevit.study/1
name: mine
summary: for a test
settings:
  weights: {about: "safetensors of the model"}
  calib: {about: "images", optional: true}
  model: {about: "a timm name", default: deit_tiny_patch16_224}
models:
  - name: ${model}
    weights: ${weights}
    calib: ${calib}
recipes:
  - fp32
  - int8-dynamic
  - name: own
    steps:
      - quantize: {scheme: int8-static}
formats: [onnx, tflite]
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return str(path)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def test_settings_fill_the_file_in(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, GOOD), {"weights": "w.safetensors", "calib": "images"})
    (model,) = study.models
    assert model.source.name == model.title == "deit_tiny_patch16_224"
    assert model.source.weights == Path.cwd() / "w.safetensors", "what is typed is relative to where it is typed"
    assert model.calib == Path.cwd() / "images"
    assert [r.name for r in study.recipes] == ["fp32", "int8-dynamic", "own"]
    assert study.digest != load_study(write(tmp_path, GOOD), {"weights": "v.safetensors"}).digest


def test_paths_of_a_file_are_relative_to_it_and_optional_settings_leave_their_key_out(tmp_path: Path) -> None:
    own = "schema: edgevit.recipe/1\nname: mine-too\nsummary: beside it\nsteps:\n  - quantize: {scheme: fp16}\n"
    (tmp_path / "r.yaml").write_text(own)
    text = GOOD.replace("${weights}", "in/w.safetensors").replace("- int8-dynamic", "- r.yaml")
    study = load_study(write(tmp_path, text), {"weights": "unused"})
    assert study.models[0].source.weights == tmp_path / "in" / "w.safetensors"
    assert study.models[0].calib is None
    assert study.recipes[1].name == "mine-too"


def test_missing_settings_are_listed_with_what_they_are(tmp_path: Path) -> None:
    text = GOOD.replace("optional: true", "optional: false")
    with pytest.raises(UsageError) as caught:
        load_study(write(tmp_path, text))
    assert "--set weights=…  safetensors of the model" in str(caught.value)
    assert "--set calib=…  images" in str(caught.value) and "--set model" not in str(caught.value)
    assert "--set weights=… --set calib=…" in caught.value.hint


def test_an_unknown_setting_offers_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean weights"):
        load_study(write(tmp_path, GOOD), {"wieghts": "x"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("  - int8-dynamic", "  - int8-dynamik"), r"study.yaml:14: recipes\[1\]: no recipe named .*did you mean int8-dynamic"),
        (("formats:", "fromats:"), r"study.yaml:18: fromats: unknown key; did you mean 'formats'"),
        (("    calib:", "    clib:"), r"study.yaml:11: models\[0\].clib: unknown key; did you mean 'calib'"),
        (("[onnx, tflite]", "[onxx]"), r"study.yaml:18: .*did you mean 'onnx'"),
        (("scheme: int8-static", "scheme: int8-statik"), r"study.yaml:17: .*did you mean 'int8-static'"),
        (
            ("weights: ${weights}", "weights: ${weihgts}"),
            r"study.yaml:10: models\[0\].weights: no setting .*did you mean weights",
        ),
        (("    weights: ${weights}\n", ""), r"study.yaml:9: models\[0\]: got 0 sources of weights"),
        (("  - name: own", "  - name: fp32"), r"study.yaml:15: recipes\[2\]: two recipes are called 'fp32'"),
        (("- quantize: {scheme: int8-static}", "- {}"), r"study.yaml:17: .*expected one of"),
    ],
)
def test_wrong_files_name_line_and_nearest(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError, match=expected):
        load_study(write(tmp_path, GOOD.replace(*change)), {"weights": "w"})


def test_an_inline_recipe_in_a_senseless_order_says_so(tmp_path: Path) -> None:
    text = GOOD.replace("      - quantize: {scheme: int8-static}\n", "      - quantize: {scheme: fp32}\n" * 2)
    with pytest.raises(ConfigError, match=r"study.yaml:15: .*2 quantize steps"):
        load_study(write(tmp_path, text), {"weights": "w"})


def test_a_recipe_of_several_variants_is_no_cell(tmp_path: Path) -> None:
    text = GOOD.replace("int8-dynamic", "variants", 1)
    assert text != GOOD
    with pytest.raises(ConfigError, match=r"'variants' has 4 variants \(fp32, fp16, int8-dynamic, int8-static\), expected"):
        load_study(write(tmp_path, text), {"weights": "w"})


def test_shipped_studies_load(home: Path) -> None:
    assert {"deit", "digits", "cifar10"} <= set(list_studies())
    given = {"deit": ("weights", "calib", "eval"), "cifar10": ("weights", "train", "eval"), "digits": ()}
    for name, names in given.items():
        study = load_study(name, {n: f"/nowhere/{n}" for n in names})
        assert study.name == name and "fp32" in [r.name for r in study.recipes]
        if names:
            with pytest.raises(UsageError, match="settings are missing"):
                load_study(name)


def test_unknown_study_and_wrong_settings_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["study", "digist"]) == 2
    assert "did you mean digits" in capsys.readouterr().err
    assert run_cli(["study", "deit", "--set", "weights"]) == 2
    assert "expected NAME=VALUE" in capsys.readouterr().err
    assert run_cli(["study", "deit"]) == 2
    assert "--set weights=…" in capsys.readouterr().err


def test_the_schema_names_every_key_with_a_word_on_it() -> None:
    for name, field in StudyFile.model_fields.items():
        assert field.description or name in ("schema_", "name", "summary", "models"), name


# --------------------------------------------------------------------------------------------------------------------
# Cells
# --------------------------------------------------------------------------------------------------------------------


def test_what_no_board_runs_is_told_from_the_files_alone(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, GOOD), {"weights": "w"})
    cells = plan_cells(study, [load_profile("generic-x86-64")])
    assert [(c.recipe.name, c.format) for c in cells][:4] == [
        ("fp32", "onnx"), ("int8-dynamic", "onnx"), ("own", "onnx"), ("fp32", "tflite"),
    ]  # fmt: skip
    assert not any(c.not_applicable for c in cells)
    assert len({c.request.name for c in cells}) == len({c.folder for c in cells}) == len(cells)
    onnx_only = [p for p in load_profile("generic-x86-64").runtimes if p.runtime == "onnxruntime"]
    bare = load_profile("generic-x86-64").model_copy(update={"runtimes": tuple(onnx_only)})
    reasons = {c.name: c.not_applicable for c in plan_cells(study, [bare])}
    assert [bool(r) for r in reasons.values()] == [False] * 3 + [True] * 3
    assert "no runtime of generic-x86-64 runs tflite" in list(reasons.values())[3]


def test_cells_wait_for_a_piece_of_work_that_a_running_one_is_doing(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, GOOD), {"weights": "w"})
    fp32, dynamic, own, tflite, *_ = plan_cells(study, [load_profile("generic-x86-64")])
    assert startable([fp32, dynamic], [], set()) == 0
    assert startable([dynamic, own, tflite], [fp32], set()) == 2, "onnx exports share the float file, tflite does not"
    assert startable([dynamic, own], [fp32], set()) is None
    assert startable([dynamic, own], [fp32], fp32.shares) == 0, "once it is there, all may take it"


def test_needed_images_are_missed_before_a_build_begins(home: Path, tmp_path: Path) -> None:
    from edgevit.build import BuildRequest, build_bundle
    from edgevit.images import DataSets, lacks_data
    from edgevit.model import ModelSource
    from edgevit.recipe import load_recipe

    static = load_recipe("int8-static")
    assert lacks_data(load_recipe("int8-dynamic"), DataSets(None, None, ())) is None
    said = lacks_data(static, DataSets(None, None, ()))
    assert said is not None and "needs unlabelled images" in said[0] and "--calib" in said[1]
    # A weights file that is no model: were the model loaded first, that would be the complaint.
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    source = ModelSource("deit_tiny_patch16_224", weights=tmp_path / "w.safetensors")
    request = BuildRequest(source, static, (load_profile("generic-x86-64"),), ("onnx",))
    with pytest.raises(DataError, match="int8-static needs unlabelled images"):
        build_bundle(request, tmp_path / "out", lambda d: d, Quiet())


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


def work(what: str, progress: Progress) -> Any:
    """What the processes of these tests do."""
    progress.start("piece", f"doing {what}")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "refuse":
        raise BuildError("no layer", hint="another recipe")
    if what == "defect":
        raise ZeroDivisionError("by nothing")
    if what.startswith("meet"):
        # Only two processes at a time can both see the other's file.
        place, me, other = what.split(" ")[1:]
        (Path(place) / me).touch()
        deadline = time.monotonic() + 60
        while not (Path(place) / other).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return (Path(place) / other).exists()
    progress.finish("piece", "did it")
    return what, os.environ["OMP_NUM_THREADS"], os.environ["EDGEVIT_HOME"]


def outcomes(tasks: list[str], jobs: int, progress: Progress | None = None) -> dict[str, Outcome]:
    rest = [Task(t, work, t) for t in tasks]
    found = run_tasks(lambda: rest.pop(0) if rest else None, jobs, progress or Quiet())
    return {o.task.name: o for o in found}


class Heard:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.open: set[str] = set()

    def start(self, key: str, text: str, total: float | None = None, unit: str = "") -> None:
        self.said.append(text)
        self.open.add(key)

    def advance(self, key: str, done: float, text: str = "") -> None:
        """Nothing in these tests advances."""

    def finish(self, key: str, text: str = "") -> None:
        self.said.append(text)
        self.open.discard(key)


def test_what_fails_in_one_process_keeps_its_error_and_the_others_finish(home: Path) -> None:
    heard = Heard()
    found = outcomes(["one", "die", "refuse", "defect", "two"], 1, heard)
    assert [found[n].value[0] for n in ("one", "two")] == ["one", "two"]
    assert found["one"].value[2] == str(home)
    died, refused, defect = (found[n].failure for n in ("die", "refuse", "defect"))
    assert died is not None and "SIGKILL" in died.message
    assert refused is not None and (refused.kind, refused.message, refused.hint) == ("BuildError", "no layer", "another recipe")
    assert defect is not None and "ZeroDivisionError in work: by nothing" in defect.message
    assert found["one"].pid == found["die"].pid != found["refuse"].pid == found["two"].pid, "a new process after a death alone"
    assert os.getpid() not in {o.pid for o in found.values()}
    assert "one: doing one" in heard.said and "one: did it" in heard.said and not heard.open


def test_two_processes_really_work_at_the_same_time(home: Path, tmp_path: Path) -> None:
    found = outcomes([f"meet {tmp_path} a b", f"meet {tmp_path} b a"], 2)
    assert [o.value for o in found.values()] == [True, True]
    assert len({o.pid for o in found.values()}) == 2


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------

points = st.lists(st.tuples(*[st.integers(0, 6).map(float)] * 3), max_size=30)


@given(points)
def test_nothing_beats_the_front_and_the_front_beats_the_rest(found: list[tuple[float, float, float]]) -> None:
    front = pareto(found)
    for i in front:
        assert not any(beats(found[j], found[i]) for j in range(len(found)))
    for i in set(range(len(found))) - front:
        assert any(beats(found[j], found[i]) for j in front), "what is off the front is beaten by a member of it"


def test_more_accuracy_is_better_and_less_time_and_size() -> None:
    assert pareto([(0.8, 10.0, 5.0), (0.9, 10.0, 5.0), (0.7, 9.0, 5.0), (0.7, 10.0, 4.0), (0.9, 10.0, 5.0)]) == {1, 2, 3, 4}


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=60))
def test_paired_figures_are_those_of_the_differences(images: list[tuple[int, int, int]]) -> None:
    import statistics

    a, b, labels = zip(*images, strict=True)
    p = pair(a, b, labels)
    differences = [(y == z) - (x == z) for x, y, z in images]
    assert p.difference == pytest.approx(statistics.fmean(differences))
    assert p.error == pytest.approx(statistics.pstdev(differences) / len(images) ** 0.5, abs=1e-12)
    assert (p.lost, p.gained) == (differences.count(-1), differences.count(1))
    assert 0 < p.p_value <= 1
    back = pair(b, a, labels)
    assert (back.difference, back.lost, back.p_value) == (-p.difference, p.gained, p.p_value)


def test_mcnemar_on_known_figures() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(10, 0) == pytest.approx(2 / 1024)
    assert mcnemar(12, 5) == pytest.approx(0.1435, abs=1e-4)  # scipy.stats.binomtest(5, 17).pvalue


def row(recipe: str, **changes: Any) -> Row:
    made = Row(
        "deit_tiny_patch16_224", recipe, "onnx", "int8-dynamic", "local", "measured", parameters=5_717_416, macs=1_258_000_000,
        file_mb=22.91, runtime="onnxruntime 1.23.2", threads=1, p50_ms=1234.5, speedup=1.0, peak_mb=123.4, top1=0.8246,
        top1_error=0.015, images=650, difference=-0.0031, difference_error=0.0023, agreement=0.9923, valid=True,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


ROWS = [
    row("fp32", scheme="fp32", front=True),
    row("prune-recover-int8", scheme="int4-weights"),
    row("merge-int8", valid=False, verdict=("others kept 2.00 of 2 cores busy",)),
    row(
        "low-rank",
        state="failed",
        reason="BuildError: low_rank touched no layer",
        hint="a larger ratio",
        file_mb=None,
        p50_ms=None,
        top1=None,
    ),
    row("all", state="n/a", reason="merge_tokens: its tokens are images | windows", file_mb=None, p50_ms=None, top1=None),
    row("student", format="tflite", top1=None, top1_absent="built without --eval"),
]


def test_the_table_fits_100_columns_and_explains_what_is_missing() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(render_study(ROWS))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "prune-recover-int8" in text and "-0.31 ±0.23" in text and "●" in text and "int4-weights" in text
    for said in (
        "failed: BuildError: low_rank touched no layer; next: a larger ratio",
        "n/a: merge_tokens",
        "INVALID: others kept",
        "no top-1: built",
    ):
        assert said in text
    assert text.index("merge-int8") < text.index("low-rank") < text.index("all ")
    wide = Console(file=io.StringIO(), width=300)
    wide.print(render_study(ROWS, wide=True))
    assert "McNemar" in wide.file.getvalue()  # type: ignore[attr-defined]


def test_documents_hold_the_same_rows() -> None:
    text = markdown(ROWS, "a title")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in lines} == {11}
    assert "| -0.31 ±0.23 |" in text and "failed¹" in text.replace("²", "¹").replace("³", "¹")
    import csv

    table = list(csv.DictReader(io.StringIO(csv_text(ROWS))))
    assert [r["recipe"] for r in table] == [r["recipe"] for r in json_rows(ROWS)]
    assert float(table[0]["top1"]) == 0.8246 and table[0]["front"] == "True"


def test_a_measurement_is_found_by_bundle_target_plan_and_threads(tmp_path: Path) -> None:
    fp32, int8 = runs.sha("bundle fp32"), runs.sha("bundle int8")
    run = study_run({"fp32": fp32, "int8-dynamic": int8})
    with Store(f"sqlite:///{tmp_path / 'r.sqlite'}") as store:
        store.add_run(run)
        plan, threads = run.job.plan, [run.job.variants[0].threads]
        found = measured_rows(store, [fp32, int8], run.job.target, plan, threads)
        assert set(found) == {fp32, int8} and all(is_measured(rows, threads) for rows in found.values())
        assert found[int8][0].speedup is not None
        assert not is_measured(found[fp32], [*threads, 7]) and not is_measured((), threads)
        assert measured_rows(store, [fp32], "elsewhere", plan, threads) == {}
        assert measured_rows(store, [fp32], run.job.target, dataclasses.replace(plan, processes=9), threads) == {}
        assert measured_rows(store, [fp32], run.job.target, plan, [7]) == {}
        assert store.runs(bundles=[runs.sha("another")]) == [] and store.runs(bundles=[int8]) == [run]


def test_an_invalid_measurement_is_taken_again_and_a_valid_one_wins(tmp_path: Path) -> None:
    bundle = runs.sha("bundle")
    good = study_run({"fp32": bundle}, run_id="run-1")
    busy = study_run({"fp32": bundle}, run_id="run-2", foreign_cpu=4.0)
    with Store(f"sqlite:///{tmp_path / 'r.sqlite'}") as store:
        store.add_run(busy)
        args = (store, [bundle], busy.job.target, busy.job.plan, [busy.job.variants[0].threads])
        assert not is_measured(measured_rows(*args)[bundle], args[-1])
        store.add_run(good)
        (only,) = measured_rows(*args)[bundle]
        assert only.run_id == "run-1" and is_measured([only], args[-1])


def study_run(bundles: dict[str, str], run_id: str = "run-1", **series: Any) -> Any:
    """One run of one variant a bundle."""
    measurements = []
    for recipe, bundle in bundles.items():
        m = runs.measurement(recipe)
        changed = tuple(dataclasses.replace(s, **series) for s in m.series)
        measurements.append(dataclasses.replace(m, variant=dataclasses.replace(m.variant, bundle=bundle), series=changed))
    return runs.run(run_id=run_id, measurements=tuple(measurements))


def test_rows_are_paired_with_fp32_of_their_own_model_and_target() -> None:
    from edgevit.results.stats import summarize_all

    rng = random.Random(3)
    base = runs.accuracy(90, 100, rng)
    worse = runs.accuracy(0, 100, rng, like=base, flips=7)
    run = study_run({"fp32": runs.sha("a"), "int8-dynamic": runs.sha("b")})
    run = dataclasses.replace(
        run,
        measurements=tuple(dataclasses.replace(m, accuracy=a) for m, a in zip(run.measurements, (base, worse), strict=True)),
    )
    first, second = summarize_all([run])
    made = [
        row("fp32", scheme="fp32", difference=None, agreement=None),
        row("int8-dynamic", difference=None, agreement=None),
        row("int8-dynamic", target="elsewhere", difference=None, agreement=None),
    ]
    fp32, int8, elsewhere = related(made, [first, second, second])
    assert fp32.difference == 0 and fp32.agreement == 1 and fp32.p_value == 1
    assert int8.agreement == pytest.approx(0.93) and int8.difference is not None and int8.lost is not None
    assert elsewhere.difference is None, "another target has an fp32 of its own, or none"


def test_two_of_the_same_study_do_not_take_away_each_others_bundles(tmp_path: Path) -> None:
    from edgevit.cli.study import alone

    root = tmp_path / "cache" / "studies" / "0123456789abcdef"
    with alone(root), pytest.raises(UsageError, match="running already"), alone(root):
        pass
    with alone(root):
        pass


def test_what_is_measured_later_stands_beside_a_float_that_the_target_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 in ONNX comes first; a board that runs TFLite alone would have no × fp32 of it."""
    from types import SimpleNamespace

    from edgevit import variants
    from edgevit.cli import study as command

    def cell(recipe: str, format: str, scheme: str) -> Any:
        made = SimpleNamespace(
            model=SimpleNamespace(title="m"), recipe=SimpleNamespace(name=recipe), format=format, scheme=scheme
        )
        return SimpleNamespace(
            cell=SimpleNamespace(name=f"m {recipe} {format}", **vars(made)), known=SimpleNamespace(manifest=format, digest="")
        )

    def list_variants(format: Any, *_: Any, **__: Any) -> Any:
        return variants.Runnable((object(),) if format == "tflite" else (), ())  # type: ignore[arg-type]

    results = [cell("fp32", "onnx", "fp32"), cell("fp32", "tflite", "fp32"), cell("int8-dynamic", "tflite", "int8-dynamic")]
    taken: list[Any] = []
    monkeypatch.setattr(variants, "list_variants", list_variants)
    monkeypatch.setattr(command, "bench_session", lambda session, wanted, *_: taken.extend(wanted.bundles))
    monkeypatch.setattr(command.Measuring, "pack", lambda self, result: result)
    study: Any = SimpleNamespace(plan="quick", threads=(1,), name="s", digest="d" * 64)
    store: Any = SimpleNamespace(new_batch=lambda what: "b")
    session: Any = SimpleNamespace(
        target=SimpleNamespace(name="small"), agent=SimpleNamespace(probe=lambda: None), profile=lambda facts: None
    )
    measuring = command.Measuring(study, results, {}, Path(), Path(), store, Quiet(), again=False, keep=True)
    measuring._measure_model(session, "m", results[2:])
    assert [r.cell.name for r in taken] == ["m fp32 tflite", "m int8-dynamic tflite"]
