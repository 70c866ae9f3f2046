"""Work on many devices: every device busy, never two pieces of work on one, at most so many at once from here.

A piece of work may put its rest off (:class:`Rest`) where others still wait for their beginning: a measurement is begun on
every device before the first is waited for, so no device idles because the host holds only so many connections.

The order is pure (:func:`choose_next`); :func:`run_schedule` is the runner over threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from edgevit.errors import EdgevitError

if TYPE_CHECKING:
    from edgevit.fleet.inventory import Target

AT_ONCE = 16
"""Connections held together where nobody says otherwise: each costs memory here and CPU for its encryption."""

T = TypeVar("T")


@dataclass(frozen=True)
class Rest(Generic[T]):
    """What is left of a piece of work, to be done once every device has its beginning; ``go_on`` may return a rest again."""

    go_on: Callable[[Turn], T | Rest[T]]


@dataclass(frozen=True)
class Piece(Generic[T]):
    """One piece of work: ``name`` for messages, ``device``: what no two pieces may hold at once, ``rests``: how often it was
    put off already."""

    name: str
    device: str
    work: Callable[[Turn], T | Rest[T]]
    rests: int = 0


class Turn:
    """What a piece of work may ask of the schedule while it runs."""

    def __init__(self, others_wait: Callable[[], bool]) -> None:
        self._others_wait = others_wait

    @property
    def others_wait(self) -> bool:
        """Whether some device still waits for its beginning, so that putting off a rest would help."""
        return self._others_wait()


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How one piece ended: ``value``, or the ``error`` it ended with."""

    name: str
    value: T | None
    error: EdgevitError | None


def device_of(target: Target) -> str:
    """What tells devices apart: two names of one address are one device, the same address behind another jump host is not."""
    if target.is_local:
        return target.name
    return f"{target.host}:{target.port or ''}:{target.jump or ''}"


def choose_next(waiting: Sequence[Piece[T]], busy: Collection[str]) -> int | None:
    """Which of ``waiting`` to begin now, as an index: the first whose device is free, beginnings before rests. None where every
    device that is waited for is busy. Pure."""
    free = [(piece.rests, index) for index, piece in enumerate(waiting) if piece.device not in busy]
    return min(free)[1] if free else None


@dataclass
class _Board(Generic[T]):
    """What the threads share, behind ``changed``. What waits stands with its place in the given order."""

    waiting: list[tuple[int, Piece[T]]]
    busy: set[str] = field(default_factory=set)
    outcomes: dict[int, Outcome[T]] = field(default_factory=dict)
    defect: BaseException | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def over(self) -> bool:
        return self.stopped.is_set() or (not self.waiting and not self.busy)

    def others_wait(self) -> bool:
        with self.changed:
            return any(piece.rests == 0 for _, piece in self.waiting)


def run_schedule(
    pieces: Iterable[Piece[T]], *, at_once: int = AT_ONCE, on_stop: Callable[[], None] | None = None
) -> list[Outcome[T]]:
    """Do all of ``pieces``, at most ``at_once`` together and one a device; how each ended, in their order.

    An EdgevitError of one piece does not stop the others. Anything else is a defect: nothing new is begun, what is under way
    is finished, and it is raised. Ctrl-C likewise, after ``on_stop``; a second one leaves at once.
    """
    if at_once < 1:
        raise ValueError(f"got at_once={at_once}, expected at least 1")
    board = _Board(list(enumerate(pieces)))
    count = len(board.waiting)
    threads = [
        threading.Thread(target=_work, args=(board,), daemon=True, name=f"edgevit-schedule-{number}")
        for number in range(min(at_once, count))
    ]
    try:
        for thread in threads:
            thread.start()
        _join(threads)
    except KeyboardInterrupt:
        with board.changed:
            board.stopped.set()
            board.changed.notify_all()
        if on_stop is not None:
            on_stop()
        _join(threads)
        raise
    if board.defect is not None:
        raise board.defect
    return [board.outcomes[index] for index in range(count)]


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        if thread.ident is not None:  # else Ctrl-C came before it was started
            thread.join()


def _work(board: _Board[T]) -> None:
    turn = Turn(board.others_wait)
    while True:
        with board.changed:
            index = None
            while not board.over and (index := choose_next([p for _, p in board.waiting], board.busy)) is None:
                board.changed.wait()
            if board.over or index is None:
                return
            place, piece = board.waiting.pop(index)
            board.busy.add(piece.device)
        _do(board, place, piece, turn)


def _do(board: _Board[T], place: int, piece: Piece[T], turn: Turn) -> None:
    value: T | Rest[T] | None = None
    error: EdgevitError | None = None
    defect: BaseException | None = None
    try:
        value = piece.work(turn)
    except EdgevitError as e:
        error = e
    except BaseException as e:  # noqa: BLE001 - a thread's defect must reach whoever runs the schedule
        defect = e
    with board.changed:
        board.busy.discard(piece.device)
        if defect is not None:
            board.defect = board.defect or defect
            board.stopped.set()
        elif isinstance(value, Rest):
            board.waiting.append((place, Piece(piece.name, piece.device, value.go_on, piece.rests + 1)))
        else:
            board.outcomes[place] = Outcome(piece.name, value, error)
        board.changed.notify_all()


def over_targets(
    names: Sequence[str],
    work: Callable[[str], T],
    *,
    at_once: int = AT_ONCE,
    device: Callable[[str], str] = str,
    on_stop: Callable[[], None] | None = None,
) -> tuple[list[tuple[str, T]], list[tuple[str, EdgevitError]]]:
    """``work`` once for each name, as :func:`run_schedule` does it: (what came back, what failed), in the given order.

    ``device`` tells which device a name stands for; by default each is its own.
    """

    def piece(name: str) -> Piece[T]:
        return Piece(name, device(name), lambda _turn: work(name))

    return sort_outcomes(run_schedule([piece(name) for name in names], at_once=at_once, on_stop=on_stop))


def sort_outcomes(outcomes: Sequence[Outcome[T]]) -> tuple[list[tuple[str, T]], list[tuple[str, EdgevitError]]]:
    """(What came back, what failed), each by name in the given order."""
    done: list[tuple[str, T]] = []
    failed: list[tuple[str, EdgevitError]] = []
    for one in outcomes:
        if one.error is not None:
            failed.append((one.name, one.error))
        else:
            done.append((one.name, one.value))  # type: ignore[arg-type]
    return done, failed
