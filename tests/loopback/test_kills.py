"""A seeded slice of the kill trials; `make soak` runs many more."""

from __future__ import annotations

from pathlib import Path

from tests.support.kills import run_trials


def test_killed_anywhere_the_active_bundle_verifies_and_no_run_is_lost_or_doubled(tmp_path: Path) -> None:
    tally = run_trials(tmp_path, seed=7, count=5)
    assert tally.problems == []
    assert tally.killed.total() == 5, f"the slice hardly killed anything: {tally.text()}"
