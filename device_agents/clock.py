"""The wall clock as the wire writes it."""

from __future__ import annotations

import time


def utc_now() -> str:
    """This moment, as ``2026-01-31T12:00:00.123Z``."""
    return utc_text(time.time_ns())


def utc_text(now: int) -> str:
    """A moment in nanoseconds since 1970, in the same form."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + ".{:03d}Z".format(now // 10**6 % 1000)
