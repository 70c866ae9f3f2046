"""Which runs may go, and moving runs from one store to another. The choosing is pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from edgevit.progress import Progress
from edgevit.results.store import RunOutline, Store


@dataclass(frozen=True)
class Pruning:
    """``removed``: what goes, oldest first. ``evidence``: what would go, were it not what a choice rests on."""

    removed: tuple[RunOutline, ...]
    evidence: tuple[RunOutline, ...]


def plan_pruning(
    outlines: Sequence[RunOutline], evidence: Collection[str], *, before: datetime | None, keep_last: int | None
) -> Pruning:
    """``before``: only what ended earlier goes. ``keep_last``: of each bundle name on each target the newest so many stay; a
    run of several bundles stays where it is among the newest of any. ValueError where neither is given."""
    if before is None and keep_last is None:
        raise ValueError("got neither an age nor a number to keep")
    moment = None if before is None else before.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    newest_first = sorted(outlines, key=lambda o: (o.ended_at, o.run_id), reverse=True)
    seen: dict[tuple[str, str], int] = {}
    going = []
    for one in newest_first:
        groups = [(one.target, name) for name in one.bundle_names or ("",)]
        for group in groups:
            seen[group] = seen.get(group, 0) + 1
        old = moment is None or one.ended_at < moment
        surplus = keep_last is None or all(seen[group] > keep_last for group in groups)
        if old and surplus:
            going.append(one)
    going.reverse()
    held = set(evidence)
    return Pruning(tuple(o for o in going if o.run_id not in held), tuple(o for o in going if o.run_id in held))


@dataclass(frozen=True)
class Merged:
    """What came over; ``known`` was here already, ``differing`` under the same id with other content: ours stayed."""

    runs: int
    known: int
    differing: tuple[str, ...]
    batches: int
    choices: int


def merge_stores(source: Store, into: Store, progress: Progress, *, dry_run: bool = False) -> Merged:
    """Add every batch, run and choice of ``source`` that ``into`` lacks. ``source`` is not changed; each run is one
    transaction, so what is stopped goes on where it was. ``dry_run``: nothing is added, and counted all the same."""
    ours = {outline.run_id for outline in into.outlines()}
    theirs = [outline.run_id for outline in source.outlines()]
    fresh = [run_id for run_id in theirs if run_id not in ours]
    common = [run_id for run_id in theirs if run_id in ours]
    differing = tuple(
        run_id
        for run_id, one, other in zip(common, source.each_run(common), into.each_run(common), strict=True)
        if one != other
    )
    here = {batch.id for batch in into.batches()}
    batches = [batch for batch in source.batches() if batch.id not in here]
    kept = {stored.id for stored in into.choices()}
    choices = [stored for stored in source.choices() if stored.id not in kept]
    if not dry_run:
        for batch in batches:
            into.add_batch(batch)
        progress.start("import", "bringing runs over", total=len(fresh), unit="runs")
        for done, run in enumerate(source.each_run(fresh), 1):
            into.add_run(run)
            progress.advance("import", done)
        progress.finish("import", "runs are here")
        for stored in reversed(choices):
            into.add_stored_choice(stored)
    return Merged(len(fresh), len(common), differing, len(batches), len(choices))


def parse_moment(text: str) -> datetime:
    """``90d``, ``12w``, ``2026-01-31``: the moment before which things are older than that. UsageError else."""
    from edgevit.fleet.audit import parse_since

    return parse_since(text, datetime.now(UTC), "--older-than", "edgevit results prune --older-than 90d --dry-run")
