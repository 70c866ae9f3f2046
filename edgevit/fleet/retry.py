"""Going on after a lost link: how long to wait, and doing the same again over a new connection."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from edgevit.errors import LostLink, Unreachable

RETRIES = 6
FIRST_S = 1.0
LONGEST_S = 30.0
"""With six tries this waits for 31 to 61 s in all: as long as a board takes to start again."""

S = TypeVar("S")
T = TypeVar("T")


def backoff_s(attempt: int, draw: float) -> float:
    """Seconds before try ``attempt`` (from 0) is made again; ``draw`` from [0, 1). Doubling up to a limit, half of it drawn, so
    that devices which lost their links together do not come back together (Brooker, Exponential Backoff And Jitter, AWS
    Architecture Blog, 2015: "equal jitter")."""
    whole: float = min(LONGEST_S, FIRST_S * 2.0 ** min(attempt, 20))
    return whole / 2 + draw * whole / 2


def keep_trying(
    connect: Callable[[], AbstractContextManager[S]],
    work: Callable[[S], T],
    *,
    retries: int,
    on_wait: Callable[[str], None],
    draw: Callable[[], float] = random.random,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[T, int]:
    """``work`` on a connection; where the link is lost, again on a new one, at most ``retries`` times: (what came back, how
    often the link was lost). ``work`` must be harmless to repeat.

    A device that does not answer at the first try is off, and :class:`Unreachable` at once; one that was reached before is
    waited for. Raises what the last try raised.
    """
    lost = 0
    while True:
        try:
            with connect() as session:
                return work(session), lost
        except LostLink as error:
            why = str(error)
            if lost == retries:
                raise
        except Unreachable as error:
            why = str(error)
            if lost in (0, retries):
                raise
        delay = backoff_s(lost, draw())
        lost += 1
        on_wait(f"trying again in {delay:.1f} s ({lost} of {retries}): {why.splitlines()[0]}")
        sleep(delay)
