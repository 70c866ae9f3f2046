"""A slice of the cuts; `make soak` makes twenty."""

from __future__ import annotations

from pathlib import Path

from tests.support.cuts import RESENT_LIMIT, run_cuts


def test_an_upload_that_is_cut_again_and_again_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tally = run_cuts(tmp_path, seed=4, count=2, size=12_000_000)
    assert tally.problems == [], tally.text()
    assert len(tally.resent) == 3 and max(tally.resent) < RESENT_LIMIT / 20, tally.text()
