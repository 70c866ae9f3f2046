"""The board read while something is timed: from a thread of the server, outside the timed process, and at a cost that is shown.

How often is what the budget allows: watching may take :data:`MAX_CPU` of one core. A reading of files costs far less than a
millisecond on most boards; a program that has to be started (``vcgencmd``) costs several, so it is asked less often. Both costs
are measured as they come, and the cadence follows.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import List, Optional, Tuple

from device_agents import wire
from device_agents.boards.generic import GenericBoard

MAX_CPU = 0.005
"""Of one core, on the mean."""

READ_EVERY_S = 1.0
POWER_EVERY_S = 0.5
"""Where a board tells its power: few readings make a poor mean, and a short timed part has few."""

RARELY_S = 30.0
"""Never further apart than this: the counters of energy wrap, and a throttled board must be seen."""

SETTLE_S = 0.5
IDLE_EVERY_S = 0.2


def idle_power_mw(board: GenericBoard, seconds: float) -> Optional[float]:
    """The mean power in mW over ``seconds`` in which nothing of edgevit's runs; None where the board does not tell.

    Waits half a second first: a board that was busy a moment ago clocks down.
    """
    if board.power_scope() is None:
        return None
    time.sleep(SETTLE_S)
    board.begin()
    known: List[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(IDLE_EVERY_S)
        total = board.total_mw(board.rails_mw())
        if total is not None:
            known.append(total)
    counted = board.counted_mw()
    if counted is not None:
        return counted
    return sum(known) / len(known) if known else None


def read_board(board: GenericBoard, at_ms: int, full: bool) -> wire.Reading:
    """One reading; without ``full``, of what needs no program to be started."""
    asked = frozenset() if full else board.asks_programs
    clusters = board.clusters_mhz()
    load, clock = board.gpu()
    rails = () if "power" in asked else board.rails_mw()
    return wire.Reading(
        at_ms=at_ms,
        temperature_c=board.temperature_c(),
        frequency_mhz=max((mhz for _, mhz in clusters), default=None),
        throttle=None if "throttle" in asked else board.throttle(),
        clusters=tuple(wire.ClusterClock(name[:60], mhz) for name, mhz in clusters),
        gpu_load=load,
        gpu_frequency_mhz=clock,
        rails=tuple(wire.RailPower(name, mw) for name, mw in rails),
        power_mw=board.total_mw(rails),
        full=full,
    )


def _tells(reading: wire.Reading) -> bool:
    told = (reading.temperature_c, reading.frequency_mhz, reading.throttle, reading.gpu_load, reading.gpu_frequency_mhz)
    return bool(reading.rails) or any(value is not None for value in told)


class _Cadence:
    """When to read next, from what readings have cost so far."""

    def __init__(self, board: GenericBoard) -> None:
        self._asks = bool(board.asks_programs)
        self._shortest = POWER_EVERY_S if board.power_scope() is not None else READ_EVERY_S
        self.every_s = self._shortest
        self._full_every_s = self._shortest
        self._full_at = 0.0
        self._readings, self._files_cpu_s = 0, 0.0
        self._asked, self._programs_cpu_s = 0, 0.0

    def is_full(self, now_s: float) -> bool:
        """Whether programs are asked at the reading that is due at ``now_s`` of the measurement."""
        return not self._asks or now_s >= self._full_at

    def count(self, now_s: float, full: bool, files_cpu_s: float, programs_cpu_s: float) -> None:
        """One reading has cost this much CPU time."""
        share = MAX_CPU / 2 if self._asks else MAX_CPU
        self._readings += 1
        self._files_cpu_s += files_cpu_s
        self.every_s = _between(self._shortest, self._files_cpu_s / self._readings / share, RARELY_S)
        if full and self._asks:
            self._asked += 1
            self._programs_cpu_s += programs_cpu_s
            self._full_every_s = _between(self.every_s, self._programs_cpu_s / self._asked / share, RARELY_S)
            self._full_at = now_s + self._full_every_s


def _between(low: float, value: float, high: float) -> float:
    return min(max(low, value), high)


class BoardSampler:
    """Readings from :meth:`start` to :meth:`stop`, at both ends and between. ``idle_mw``: see :func:`idle_power_mw`."""

    def __init__(self, board: GenericBoard, idle_mw: Optional[float] = None) -> None:
        self._board = board
        self._idle_mw = idle_mw
        self._cadence = _Cadence(board)
        self._readings: List[wire.Reading] = []
        self._stop = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._start = self._end = 0.0
        self._cpu_s = 0.0

    def start(self) -> None:
        """The timed part begins."""
        if self._thread is None:
            asked, before = self._board.programs_cpu_s, time.thread_time()
            self._start = time.monotonic()
            self._board.begin()
            self._cpu_s = time.thread_time() - before + self._board.programs_cpu_s - asked
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """The timed part has ended. One more reading is made, then the thread ends."""
        if self._thread is not None and not self._stop.is_set():
            self._end = time.monotonic()
            self._stop.set()
            self._thread.join(10)

    def readings(self) -> Tuple[wire.Reading, ...]:
        """All of them; none where not one holds anything at all."""
        made = tuple(self._readings)
        return made if any(_tells(r) for r in made) else ()

    def record(self, series: wire.Series) -> wire.Series:
        """``series`` with what was read while it was timed, and what reading it cost. Call after :meth:`stop`."""
        wall_s = max(self._end - self._start, 1e-3)
        return dataclasses.replace(
            series,
            readings=self.readings(),
            sampling=wire.Sampling(int(wall_s * 1000), self._cpu_s / wall_s, int(self._cadence.every_s * 1000)),
            power=self._power(),
            power_absent="" if self._board.power_scope() else self._board.power_absent()[:400],
        )

    def _power(self) -> Optional[wire.Power]:
        scope = self._board.power_scope()
        if scope is None:
            return None
        reason = "" if self._idle_mw is not None else "the sensor gave no reading while the board was idle"
        return wire.Power(scope.scope, scope.covers[:400], self._idle_mw, reason, self._board.counted_mw())

    def _sample(self) -> None:
        due = 0.0
        while True:
            ended = self._stop.wait(max(due - (time.monotonic() - self._start), 0.0))
            now = time.monotonic() - self._start
            full = ended or self._cadence.is_full(now)
            before = (time.thread_time(), self._board.programs_cpu_s, self._board.asking_cpu_s)
            self._readings.append(read_board(self._board, int(now * 1000), full))
            after = (time.thread_time(), self._board.programs_cpu_s, self._board.asking_cpu_s)
            own, programs, asking = (b - a for a, b in zip(before, after))
            self._cpu_s += own + programs
            self._cadence.count(now, full, own - asking, programs + asking)
            if ended:
                return
            due = now + self._cadence.every_s
