"""Recipes: the shipped ones load, a wrong one names every problem with its line, the digest is of what it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevit.errors import ConfigError, UnknownName
from edgevit.recipe import list_recipes, load_recipe, recipe_schema


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


GOOD = "schema: edgevit.recipe/1\nname: mine\nsummary: for a test\nsteps:\n  - quantize:\n      scheme: int8-static\n"


def test_shipped_recipes_load_under_their_own_name() -> None:
    assert {"fp32", "fp16", "int8-dynamic", "int8-static"} <= set(list_recipes())
    for name in list_recipes():
        assert load_recipe(name).name == name


def test_needs_follow_from_the_steps() -> None:
    assert load_recipe("int8-dynamic").needs == "no data"
    assert load_recipe("int8-static").needs == "unlabelled images"


def test_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match="int8-dynamic"):
        load_recipe("int8-dynamik")


def test_name_and_summary_leave_the_digest_alone(tmp_path: Path) -> None:
    first = load_recipe(write(tmp_path, GOOD))
    renamed = load_recipe(write(tmp_path, GOOD.replace("mine", "yours").replace("for a test", "other words")))
    changed = load_recipe(write(tmp_path, GOOD + "      images: 64\n"))
    assert first.digest == renamed.digest != changed.digest


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("- quantize:", "- quantise:"), r"mine.yaml:5: .*quantise.*did you mean 'quantize'"),
        (("scheme: int8-static", "scheme: int8-statik"), r"mine.yaml:6: .*did you mean 'int8-static'"),
        (("scheme: int8-static", "scheme: int8-static\n      imagse: 3"), r"mine.yaml:7: .*imagse.*did you mean 'images'"),
        (("summary: for a test\n", ""), r"summary"),
    ],
)
def test_wrong_recipes_name_line_and_nearest(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_recipe(write(tmp_path, GOOD.replace(*change)))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("  - merge_tokens: {ratio: 0.3, images: 64}\n", r"mine.yaml:5: .*images"),
        ("  - distil: {student: {depth: 1}, steps: 3, images: 64}\n", r"mine.yaml:5: .*images"),
        ("  - quantize: {scheme: fp16, images: 64}\n", "scheme fp16 does not look at images: leave it out"),
        ("  - quantize: {scheme: int8-weights, images: 64}\n", "scheme int8-weights does not look at images: leave it out"),
    ],
)
def test_a_number_of_calibration_images_is_no_setting_of_what_looks_at_none(tmp_path: Path, step: str, expected: str) -> None:
    head, _, last = GOOD.partition("  - quantize")
    with pytest.raises(ConfigError, match=expected):
        load_recipe(write(tmp_path, head + step + ("" if "quantize" in step else f"  - quantize{last}")))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, GOOD.replace("name:", "nmae:").replace("int8-static", "int9")))
    assert len(caught.value.problems) >= 3


def test_two_quantize_steps_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 quantize steps"):
        load_recipe(write(tmp_path, GOOD + "  - quantize:\n      scheme: fp32\n"))


def test_an_entry_of_no_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one of .*quantize"):
        load_recipe(write(tmp_path, GOOD + "  - {}\n"))


def test_the_schema_knows_the_schemes() -> None:
    assert "int8-dynamic" in str(recipe_schema())


SEVERAL = GOOD.replace("      scheme: int8-static\n", "      - scheme: fp32\n      - scheme: int8-static\n        images: 64\n")


def test_a_list_of_quantizations_makes_variants_in_its_order(tmp_path: Path) -> None:
    one, several = load_recipe(write(tmp_path, GOOD)), load_recipe(write(tmp_path, SEVERAL))
    assert [c.scheme for c in one.quantizations] == ["int8-static"]
    assert several.schemes == ("fp32", "int8-static") and several.quantizations[1].images == 64
    assert (several.needs, several.images) == ("unlabelled images", 64), "what one variant needs the recipe needs"
    assert load_recipe("variants").schemes[0] == "fp32", "without a choice the first that runs is activated: the float one"


def test_a_list_of_one_is_not_the_digest_of_another(tmp_path: Path) -> None:
    """Bundles already built keep their keys: a single mapping has the digest it always had."""
    assert load_recipe("int8-dynamic").digest == "b4e7ebbb19f9" + load_recipe("int8-dynamic").digest[12:]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("scheme: fp32", "scheme: int8-static"), r"mine.yaml:.*int8-static more than once"),
        (("scheme: fp32", "scheme: fp23"), r"mine.yaml:6: steps\[0\].quantize\[0\].scheme: .*did you mean 'fp32'"),
        (("images: 64", "imagse: 64"), r"mine.yaml:8: steps\[0\].quantize\[1\].imagse: .*did you mean 'images'"),
    ],
)
def test_a_wrong_variant_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_recipe(write(tmp_path, SEVERAL.replace(*change)))
