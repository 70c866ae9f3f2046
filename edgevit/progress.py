"""How long work says where it is, without knowing who looks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what long work says. ``key`` tells pieces of work apart; ``done`` and ``total`` count in ``unit``."""

    def start(self, key: str, text: str, total: float | None = None, unit: str = "") -> None: ...

    def advance(self, key: str, done: float, text: str = "") -> None: ...

    def finish(self, key: str, text: str = "") -> None: ...


class Quiet:
    """For callers who do not look."""

    def start(self, key: str, text: str, total: float | None = None, unit: str = "") -> None:
        """Say nothing."""

    def advance(self, key: str, done: float, text: str = "") -> None:
        """Say nothing."""

    def finish(self, key: str, text: str = "") -> None:
        """Say nothing."""


class OneLine:
    """All that is done to one device under a single ``key``: of work within work the latest stage is shown, in its place."""

    def __init__(self, progress: Progress, key: str) -> None:
        self._progress, self._key = progress, key

    def start(self, key: str, text: str, total: float | None = None, unit: str = "") -> None:
        """The next stage takes the line over."""
        self._progress.start(self._key, text, total, unit)

    def advance(self, key: str, done: float, text: str = "") -> None:
        """How far the stage is."""
        self._progress.advance(self._key, done, text)

    def finish(self, key: str, text: str = "") -> None:
        """The line stays: whoever began it says when the device is done."""
