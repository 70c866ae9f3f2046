"""The one seam between host and device: start a program there, and talk to it.

Everything edgevit does on a device goes through :meth:`Transport.open`; there is no second road (no SFTP, no remote
shell scripts, no port forwarding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Channel(Protocol):
    """A program running on the device. Every method raises :class:`~edgevit.errors.LostLink` when the link is gone."""

    def write(self, data: bytes) -> None:
        """Send all of ``data`` to its standard input."""

    def close_input(self) -> None:
        """Signal the end of its standard input."""

    def read_line(self, timeout: float) -> bytes:
        """The next line of its standard output without the newline, ``b""`` at its end.

        ``timeout`` is the longest silence accepted, in seconds: long work must say that it is alive.
        A line over 64 MiB is a LostLink, not a memory problem.
        """

    def error_text(self) -> str:
        """What it wrote to standard error so far: always drained, the last 64 KiB kept."""

    def wait(self, timeout: float) -> int:
        """Its exit status. A status of −1 is a lost link, never a result."""

    def close(self) -> None:
        """End it and free the channel; harmless when called twice."""


class Transport(Protocol):
    """A way to one device. ``name`` is the target's, for messages."""

    @property
    def name(self) -> str: ...

    def open(self, argv: Sequence[str]) -> Channel:
        """Start ``argv`` on the device. Arguments arrive as they are: quoting is the transport's business."""

    def close(self) -> None:
        """Give back the connection; harmless when called twice."""
