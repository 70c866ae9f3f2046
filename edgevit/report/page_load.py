"""From the results store to what a page shows: one batch, the newest, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevit.errors import UnknownName, UsageError
from edgevit.progress import Progress
from edgevit.report.page_bundles import NOTHING, FromBundles
from edgevit.report.page_data import DETAIL_RUNS, Shown

if TYPE_CHECKING:
    from edgevit.results.store import Store


@dataclass(frozen=True)
class Source:
    """``batch``: its id, or None for the newest that holds a run, whichever that is when asked; ``everything``: every run."""

    store: Store
    batch: str | None = None
    everything: bool = False
    bundles: FromBundles = NOTHING

    def verify(self) -> None:
        """Raises :class:`UnknownName` for a batch that is not there."""
        known = [b.id for b in self.store.batches()]
        if self.batch is not None and self.batch not in known:
            raise UnknownName("batch", self.batch, known, hint="edgevit results list")

    def revision(self) -> str:
        """Changes whenever a run is added to what is shown."""
        counts = {b.id: b.runs for b in self.store.batches() if b.runs}
        if self.everything:
            return f"all:{sum(counts.values())}"
        batch = self.batch or next(iter(counts), "")
        return f"{batch}:{counts.get(batch, 0)}"

    def load(self, live: bool = False, progress: Progress | None = None) -> Shown:
        """What is there now. UsageError where there is nothing, unless it is ``live``: then it may come."""
        newest = self.store.latest_batch()
        batch = None if self.everything else self.batch or (newest.id if newest else "")
        summaries = self.store.summaries(batch, progress)
        if not summaries and not live:
            told = f"batch {self.batch} holds no run yet" if self.batch else "nothing has been measured yet"
            raise UsageError(told, hint="edgevit bench BUNDLE TARGET")
        runs = sorted({(s.started_at, s.run_id) for s in summaries})
        details = self.store.runs_of([run_id for _, run_id in runs[-DETAIL_RUNS:]])
        return Shown(summaries, details, len(runs), self.bundles, live)
