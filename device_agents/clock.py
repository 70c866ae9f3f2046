"""The wall clock as the wire writes it."""

from __future__ import annotations

import time


def utc_now() -> str:
    """This moment, as ``2026-01-31T12:00:00.123Z``."""
    now = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + ".{:03d}Z".format(now // 10**6 % 1000)
