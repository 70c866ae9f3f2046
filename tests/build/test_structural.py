"""Structural steps through whole builds: measured, kept by digest, taken up again, and refused where they make no sense."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevit.bundle import Bundle
from edgevit.cache import Cache
from edgevit.errors import BuildError, ConfigError, DataError
from tests.build.conftest import Build, Recorder, blob, write_images

PRUNE = "  - prune: {ratio: 0.2, images: 16}\n"
MERGE = "  - merge_tokens: {merge: {0: 3}}\n"
LAST = "  - quantize: {scheme: fp32}\n"


def recipe(folder: Path, *steps: str, name: str = "mine") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(f"schema: edgevit.recipe/1\nname: {name}\nsummary: for a test\nsteps:\n" + "".join(steps))
    return str(path)


def golden(bundle: Bundle) -> Any:
    return blob(bundle, bundle.manifest.artifacts[0].golden.blob.sha256)


def test_each_step_says_what_it_cost(build: Build, images: Path, tmp_path: Path) -> None:
    steps = build(recipe(tmp_path, PRUNE, MERGE, LAST), calib_data=images).manifest.steps
    prune, merge = steps[0], steps[1]
    assert (prune.step, merge.step) == ("prune", "merge_tokens")
    assert prune.macs and merge.macs and prune.parameters and merge.parameters and prune.damage and merge.damage
    assert prune.macs.after <= 0.8 * prune.macs.before
    assert prune.parameters.after < prune.parameters.before
    assert merge.macs.before == prune.macs.after > merge.macs.after
    assert merge.parameters.after == merge.parameters.before == prune.parameters.after
    assert prune.damage.images == 24 and 0 < prune.damage.cosine <= 1 and prune.seconds is not None
    assert all("blocks." in layer for layer in prune.details)


def test_recipes_that_begin_alike_share_the_beginning(build: Build, images: Path, tmp_path: Path) -> None:
    first = build(recipe(tmp_path, PRUNE, LAST, name="one"), calib_data=images)
    said = Recorder()
    other = "  - merge_tokens: {merge: {1: 2}}\n"
    both = build(recipe(tmp_path, PRUNE, other, LAST, name="two"), calib_data=images, progress=said)
    assert "prune: taken from the cache" in said.said
    assert both.manifest.steps[0] == first.manifest.steps[0]


def test_what_is_taken_from_the_cache_is_what_was_made(
    build: Build, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module restored from plan and weights exports to the very bytes of the one that was compressed."""
    text = recipe(tmp_path, PRUNE, MERGE, LAST)
    monkeypatch.setenv("EDGEVIT_HOME", str(tmp_path / "fresh"))
    made = build(text, calib_data=images)
    entries = Cache().root / "entries"
    for path in entries.iterdir():  # Everything is forgotten but what the steps left.
        if '"structure"' not in path.read_text():
            path.unlink()
    said = Recorder()
    again = build(text, calib_data=images, progress=said)
    assert any("merge_tokens: taken from the cache, with the 1 steps before it" in s for s in said.said)
    assert again.manifest.artifacts[0].blob == made.manifest.artifacts[0].blob
    assert np.array_equal(golden(made), golden(again))


def test_a_damaged_step_is_carried_out_anew(
    build: Build, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVIT_HOME", str(tmp_path / "fresh"))
    made = build(recipe(tmp_path, PRUNE, LAST, name="one"), calib_data=images)
    cache = Cache()
    kept = next(p for p in (cache.root / "entries").iterdir() if '"structure"' in p.read_text())
    sha256 = kept.read_text().split('"weights": ["')[1][:64]
    weights = cache.blob_path(sha256)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    said = Recorder()
    again = build(recipe(tmp_path, PRUNE, MERGE, LAST, name="two"), calib_data=images, progress=said)
    assert not any(s.startswith("prune: taken") for s in said.said)
    assert again.manifest.steps[0].damage == made.manifest.steps[0].damage


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("  - prune: {ratio: 1.0}\n", LAST), r"mine\.yaml:5.*less than 1"),
        (("  - low_rank: {ratio: 1.5}\n", LAST), r"mine\.yaml:5.*less than 1"),
        (("  - merge_tokens: {ratio: 1}\n", LAST), r"mine\.yaml:5.*less than 1"),
        (("  - merge_tokens: {merge: {0: 0}}\n", LAST), "each with 1 token or more"),
        (("  - low_rank: {ratio: 0.1}\n", PRUNE, LAST), "prune is step 2 of 3"),
        ((MERGE, PRUNE, LAST), "prune is step 2 of 3"),
        (("  - distil: {steps: 5}\n", LAST), "nothing before it needs recovery"),
        ((PRUNE, "  - distil: {steps: 5, student: {depth: 1}}\n", LAST), "a student starts anew, so it comes first"),
        ((LAST, PRUNE), "quantize is step 1 of 2, expected it last"),
        ((PRUNE, "  - distil: {}\n", LAST), "expected one of minutes, steps, epochs"),
    ],
)
def test_a_senseless_recipe_is_refused_before_any_work(tmp_path: Path, steps: tuple[str, ...], message: str) -> None:
    from edgevit.recipe import load_recipe

    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe(tmp_path, *steps))


def test_a_step_that_cannot_apply_says_why(build: Build, images: Path, tmp_path: Path) -> None:
    from edgevit.model import ModelSource

    source = ModelSource("tests.support.models:hybrid", random_weights=True)
    with pytest.raises(BuildError, match="only plain Vision Transformers merge"):
        build(recipe(tmp_path, MERGE, LAST), source=source, calib_data=images)


def test_more_than_there_is_is_refused_with_what_there_is(build: Build, images: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="at most"):
        build(recipe(tmp_path, "  - prune: {ratio: 0.99, images: 16}\n", LAST), calib_data=images)
    with pytest.raises(BuildError, match="expected at most 8: half of the 16"):
        build(recipe(tmp_path, "  - merge_tokens: {merge: {0: 9}}\n", LAST), calib_data=images)


def test_steps_that_learn_need_real_images_that_differ(build: Build, images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs unlabelled images for its step prune") as caught:
        build(recipe(tmp_path, PRUNE, LAST))
    assert "--calib" in caught.value.hint
    same = tmp_path / "same"
    same.mkdir()
    for i in range(20):
        (same / f"{i}.png").write_bytes(next(images.rglob("*.png")).read_bytes())
    with pytest.raises(DataError, match="calibration images are alike"):
        build(recipe(tmp_path, PRUNE, LAST), calib_data=same)
    with pytest.raises(DataError, match="label") as unlabelled:
        flat = tmp_path / "flat"
        flat.mkdir()
        for i, path in enumerate(sorted(images.rglob("*.png"))):
            (flat / f"{i}.png").write_bytes(path.read_bytes())
        steps = (PRUNE, "  - distil: {steps: 2, label_weight: 1.0}\n", LAST)
        build(recipe(tmp_path, *steps), calib_data=flat)
    assert unlabelled.value.hint


def test_images_of_other_classes_serve_where_no_label_is_needed(build: Build, tmp_path: Path) -> None:
    """The names of their folders mean nothing to the model: only a step that learns from labels has to know them."""
    others = write_images(tmp_path / "others", 18)
    shutil.rmtree(others / "colour8")
    static = "  - quantize: {scheme: int8-static, images: 16}\n"
    assert "over 16 images" in build(recipe(tmp_path, static), calib_data=others).manifest.steps[-1].summary
    learns = (PRUNE, "  - distil: {steps: 2, label_weight: 1.0}\n", LAST)
    with pytest.raises(DataError, match=r"got 9 class names such as 'colour0', .* has 10 classes"):
        build(recipe(tmp_path, *learns), calib_data=others)


def test_a_scheme_that_only_profits_from_images_sees_all_it_may(build: Build, images: Path, tmp_path: Path) -> None:
    dynamic = "  - quantize: {scheme: int8-dynamic, images: 64}\n"
    many = write_images(tmp_path / "many", 70)
    assert "over 64 images" in build(recipe(tmp_path, dynamic), calib_data=many).manifest.steps[-1].summary
