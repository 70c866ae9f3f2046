"""The recipes page holds to the code: every step with every option, every shipped recipe with what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts.recipe_docs import BLOCK, options, step_configs

ROOT = Path(__file__).resolve().parents[2]


def test_the_generated_tables_are_in_step() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/recipe_docs.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_every_step_has_a_table_and_every_option_a_word_on_it() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    blocks = {what for _, what, _ in BLOCK.findall(page)}
    assert blocks == {"recipes", *(f"options {kind}" for kind in step_configs())}
    for kind, config in step_configs().items():
        assert f"## `{kind}`" in page
        for name, _, _, what in options(config):
            assert what, f"{kind}.{name} has no description"
