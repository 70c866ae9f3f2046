"""What the results store has of a cell: a measurement is taken once for each bundle, target, plan and thread count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from device_agents import wire
from device_agents.verdict import judge
from edgevit.results.reference import relate
from edgevit.results.stats import summarize
from edgevit.results.summary import Summary


class RunsOfBundles(Protocol):
    """The part of the results store that is read here."""

    def runs(self, *, target: str | None = None, bundles: Sequence[str] | None = None) -> list[wire.Run]: ...


def measured_rows(
    store: RunsOfBundles, bundles: Sequence[str], target: str, plan: wire.RunPlan, threads: Sequence[int]
) -> dict[str, list[Summary]]:
    """Bundle digest → the newest measurement of each variant of it on ``target`` under ``plan``, related to the fp32 of its own
    run. Of several the newest VALID one counts, else the newest; bundles that were never measured are absent."""
    wanted = set(bundles)
    best: dict[tuple[str, str, str, str, int], tuple[tuple[bool, bool, str], Summary]] = {}
    for run in store.runs(target=target, bundles=bundles):
        if run.job.plan != plan:
            continue
        for s in relate(summarize(run, judge)):
            if s.bundle not in wanted or s.threads not in threads:
                continue
            key = (s.bundle, s.artifact, s.runtime, s.provider, s.threads)
            rank = (not s.failure, s.rankable, f"{s.started_at} {s.run_id}")
            if key not in best or rank > best[key][0]:
                best[key] = (rank, s)
    found: dict[str, list[Summary]] = {}
    for (bundle, *_), (_, summary) in best.items():
        found.setdefault(bundle, []).append(summary)
    return found


def is_measured(rows: Sequence[Summary], threads: Sequence[int]) -> bool:
    """Whether a cell needs no measuring: each thread count has a measurement, and all of them are VALID."""
    return all(s.rankable for s in rows) and set(threads) <= {s.threads for s in rows}
