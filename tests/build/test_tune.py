"""Whole searches of a small real model through the command and the real local agent: found, found again, killed; and Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgevit import signing
from edgevit.build import build_bundle
from edgevit.bundle import open_bundle
from edgevit.cache import Cache
from edgevit.cli import run_cli
from edgevit.model import ModelSource
from edgevit.profile import load_profile
from edgevit.progress import Progress, Quiet
from edgevit.recipe import load_recipe
from edgevit.results.store import open_store
from edgevit.study.file import StudyModel
from edgevit.tune.host import Asked, Host, survey_model
from edgevit.tune.limits import Limits
from edgevit.tune.size import least_mb
from edgevit.tune.space import Drawn, Space, recipe_of, smallest
from edgevit.workers import Failure, Outcome, Task, perform
from tests.support.local import installed_locally

ROOT = Path(__file__).resolve().parents[2]
MODEL = ["tests.support.models:tiny_vit", "--random-weights"]
# INVALID figures count, for this machine may be busy; nothing here depends on how fast anything is.
QUICK = ["--target", "local", "--format", "onnx", "--threads", "1", "--confirm", "quick", "--anyway", "--jobs", "1"]


def tune(capsys: pytest.CaptureFixture[str], images: Path, *words: str | Path) -> tuple[int, dict[str, Any], str]:
    """One search: its exit code, its JSON, and what it said to people."""
    capsys.readouterr()
    code = run_cli(["tune", *MODEL, "--eval", str(images), *QUICK, *map(str, words), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def counted() -> int:
    with open_store() as store:
        return len(store.runs())


def test_a_winner_is_found_kept_and_rebuilt_to_the_same_digest_and_nothing_is_done_twice(
    home: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "won"
    code, got, said = tune(capsys, images, "--max-loss", "100", "--trials", "2", "-o", out)
    (here,) = got["targets"]
    won = here["winner"]
    assert code == 0 and won is not None and won["confirmed"], said
    assert len(got["candidates"]) == 2 and "local: on the front:" in said
    with open_store() as store:
        assert {r.job.run_id for r in store.runs()} >= set(won["figures"]["runs"]), "the evidence is not in the store"
    assert won["figures"]["top1"] is not None, "top-1 was not counted on the target"
    assert installed_locally() == [], "candidates are left on the target"

    # Its recipe builds, by the ordinary command, the very same bundle.
    kept = open_bundle(out / "local" / "bundle", None)
    assert kept.digest == won["candidate"]["bundle"]
    recipe = out / "local" / "recipe.yaml"
    assert load_recipe(str(recipe)).digest == won["candidate"]["recipe_digest"]
    words = ["--recipe", str(recipe), "--format", "onnx", "--for", "local", "--eval", str(images)]
    assert run_cli(["build", *MODEL, *words, "-o", str(tmp_path / "again")]) == 0
    assert open_bundle(tmp_path / "again", None).digest == kept.digest
    assert run_cli(["verify", str(out / "local" / "bundle")]) == 0

    # The same again measures nothing and answers the same.
    before = counted()
    code, again, said = tune(capsys, images, "--max-loss", "100", "--trials", "2")
    assert code == 0 and counted() == before and "measure" not in said
    assert again["targets"][0]["winner"]["candidate"]["bundle"] == kept.digest
    assert again["targets"][0]["winner"]["figures"] == won["figures"]

    # Limits that nothing meets: the nearest is named with what it misses. All of it is built and measured already.
    small = ["--max-loss", "100", "--max-size-mb", "0.01", "--trials", "2"]
    code, none, said = tune(capsys, images, *small)
    (here,) = none["targets"]
    assert code == 1 and here["winner"] is None and here["nearest"]["misses"][0].startswith("size 0.")
    assert sorted(c["bundle"] for c in none["candidates"]) == sorted(c["bundle"] for c in got["candidates"])
    assert counted() == before

    # A target that nobody answers for: the search goes on with the other, and the code says that one was not reached.
    fleet = home / "config" / "fleet.yaml"
    fleet.write_text(
        "schema: edgevit.fleet/1\ntargets:\n  ghost: {host: 127.0.0.1, port: 9, user: nobody, profile: generic-x86-64}\n"
    )
    fleet.chmod(0o600)
    code, rest, said = tune(capsys, images, *small, "--target", "ghost")
    assert code == 3 and "ghost" in said and len(rest["candidates"]) == 2
    assert {t["target"]: bool(t["dead"]) for t in rest["targets"]} == {"local": False, "ghost": True}


def test_a_search_killed_while_it_measures_goes_on_and_measures_nothing_twice(
    home: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--max-loss", "100", "--trials", "2"]
    argv = [sys.executable, "-m", "edgevit", "tune", *MODEL, "--eval", str(images), *QUICK, *words]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    while "on the front" not in seen:
        line = process.stderr.readline()
        assert line, f"it ended by itself: {seen}"
        seen += line
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert installed_locally(), "it was killed before it shipped anything"
    code, got, said = tune(capsys, images, *words)
    assert code == 0 and len(got["candidates"]) == 2, said
    assert installed_locally() == [], "candidates are left on the target"
    with open_store() as store:
        runs = [r for r in store.runs() if r.job.plan.name == "tune"]
    # Only the baseline, which every job has for comparison, was measured in more than one job.
    jobs = [{v.bundle for v in r.job.variants} for r in runs]
    base, other = (c["bundle"] for c in got["candidates"])
    assert sum(other in job for job in jobs) == 1 and all(base in job for job in jobs) and len(jobs) == 2


class Here:
    """An engine in this process."""

    jobs = 1

    def run(self, next_task: Callable[[], Task | None], progress: Progress) -> Iterator[Outcome]:
        while (task := next_task()) is not None:
            value = perform(task, progress)
            failed = isinstance(value, Failure)
            yield Outcome(task, None if failed else value, value if failed else None, os.getpid())


def test_a_candidate_is_packed_as_it_was_counted_whatever_was_built_since(
    home: Path, images: Path, key: Path, tmp_path: Path
) -> None:
    source = ModelSource("tests.support.models:tiny_vit", random_weights=True)
    model = StudyModel(source.name, source, None, images, (), None)
    asked = Asked(model, (load_profile("generic-x86-64"),), 1, key)
    engine, cache = Here(), Cache()
    survey = survey_model(source, engine, cache, Quiet())
    host = Host(asked, survey, engine, cache, tmp_path / "cells", Quiet(), Limits(1.0))
    drawn = Drawn(load_recipe("fp32"), "onnx", 1, "fp32")
    counted = host.baseline(0, drawn)
    # A bundle of the same name from other images, as another search makes it.
    other = replace(asked.request(drawn), calib_data=images)
    newer = build_bundle(other, tmp_path / "other", lambda d: signing.sign(d, key), Quiet())
    packed = host.pack(counted, tmp_path / "ship")
    assert packed.digest == counted.bundle and newer.manifest.version > packed.manifest.version


def test_a_ray_cluster_builds_the_same_files_as_processes(
    home: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "two.yaml"
    study.write_text(
        "schema: edgevit.study/1\nname: two\nsummary: for a test\ntargets: []\nprofiles: [generic-x86-64]\nmodels:\n"
        "  - {name: 'tests.support.models:tiny_vit', random_weights: true}\n"
        "  - {name: 'tests.support.models:raises', random_weights: true}\n"
        "recipes: [fp32, int8-dynamic]\n"
    )
    files = {}
    for engine in ("processes", "ray"):
        monkeypatch.setenv("EDGEVIT_HOME", str(tmp_path / engine))
        capsys.readouterr()
        out = tmp_path / f"out-{engine}"
        code = run_cli(["study", str(study), "--engine", engine, "--jobs", "1", "--json", "-o", str(out)])
        got = json.loads(capsys.readouterr().out)
        assert code == 1, "the model that cannot be loaded fails on both"
        reasons = [r["reason"] for r in got["rows"] if r["state"] == "failed"]
        assert len(reasons) == 2 and all("the moon is full" in r for r in reasons)
        assert os.getpid() not in got["processes"]
        found = [open_bundle(p.parent, None).manifest for p in sorted(out.rglob("manifest.json"))]
        files[engine] = [(m.name, [a.blob.sha256 for a in m.artifacts]) for m in found]
    assert len(files["ray"]) == 2 and files["ray"] == files["processes"]


def test_no_file_is_smaller_than_its_weights_alone(home: Path, images: Path, key: Path, tmp_path: Path) -> None:
    """What the gate of size goes by, against the files of draws of every kind."""
    source = ModelSource("tests.support.models:tiny_vit", random_weights=True)
    model = StudyModel(source.name, source, images, images, (), None)
    engine, cache = Here(), Cache()
    survey = survey_model(source, engine, cache, Quiet())
    host = Host(
        Asked(model, (load_profile("generic-x86-64"),), 1, key),
        survey,
        engine,
        cache,
        tmp_path / "cells",
        Quiet(),
        Limits(100.0),
    )
    space = Space(("onnx fp16", "onnx int8-weights", "onnx int4-weights"), ("prune", "low_rank"), (1,))
    draws = [recipe_of(one, space) for one in smallest(space)]
    draws += [recipe_of({**one, "prune": False, "low_rank": False}, space) for one in smallest(space)]
    made = host.evaluate(list(enumerate(draws)), 0.0)
    shares = {c.label: c.size_mb / least_mb(d, survey.bulk) for c, d in zip(made, draws, strict=True) if c.built}
    assert len(shares) == len(draws), [c.reason for c in made if not c.built]
    assert min(shares.values()) >= 1.0, shares
