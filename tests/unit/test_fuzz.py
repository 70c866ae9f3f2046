"""A seeded slice of the fuzzing; `make soak` feeds many more."""

from __future__ import annotations

from pathlib import Path

from tests.support.agent_bundle import make_signer
from tests.support.fuzz import fuzz, make_readers


def test_whatever_comes_is_read_or_refused_soon_and_nothing_is_written(tmp_path: Path) -> None:
    readers = make_readers(tmp_path, make_signer(tmp_path / "keys"))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    tally = fuzz(readers, seed=3, count=800 * len(readers))
    assert tally.problems == [], tally.text()
    assert sorted(str(p) for p in tmp_path.rglob("*") if p.name != "fuzzed.json") == before
    for reader in readers:
        refused = tally.answers[f"{reader.name} refused"] + tally.answers[f"{reader.name} read"]
        assert refused == 800, tally.text()
    assert tally.answers["job refused"] > 300 and tally.answers["manifest refused"] > 300, "the damage hardly damages"
