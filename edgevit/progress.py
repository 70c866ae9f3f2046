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
