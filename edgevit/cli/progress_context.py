"""Progress of one command: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgevit.progress import Progress


@contextmanager
def showing_progress() -> Iterator[Progress]:
    """Progress on standard error for as long as the block runs."""
    from edgevit.report.cli_progress import RichProgress

    with RichProgress() as progress:
        yield progress
