"""The board read while something is timed: from a thread of the server, outside the timed process."""

from __future__ import annotations

import threading
import time
from typing import List, Optional, Tuple

from device_agents import wire
from device_agents.boards.generic import GenericBoard

READ_EVERY_S = 1.0


class BoardSampler:
    """Reads the board once a second, and at both ends, from a thread of the server: outside the timed process."""

    def __init__(self, board: GenericBoard) -> None:
        self._board = board
        self._readings: List[wire.Reading] = []
        self._stop = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._start = 0.0

    def start(self) -> None:
        if self._thread is None:
            self._start = time.monotonic()
            self._board.begin()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None and not self._stop.is_set():
            self._stop.set()
            self._thread.join(10)

    def readings(self) -> Tuple[wire.Reading, ...]:
        """Those that hold anything at all."""
        return tuple(
            r for r in self._readings if r.temperature_c is not None or r.frequency_mhz is not None or r.throttle is not None
        )

    def _sample(self) -> None:
        while True:
            ended = self._stop.wait(READ_EVERY_S if self._readings else 0)
            self._readings.append(
                wire.Reading(
                    at_ms=int((time.monotonic() - self._start) * 1000),
                    temperature_c=self._board.temperature_c(),
                    frequency_mhz=self._board.frequency_mhz(),
                    throttle=self._board.throttle(),
                )
            )
            if ended:
                return
