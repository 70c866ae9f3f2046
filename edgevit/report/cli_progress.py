"""Progress for people on standard error: bars with times on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Task

BESIDE_THE_TEXT = 60
"""Columns that bar, count and times take."""

LINE_EVERY_SECONDS = 10.0
"""Where there is no terminal, how often a piece of work that goes on says how far it is."""


@dataclass
class _Piece:
    text: str
    total: float | None
    unit: str
    began: float
    task: TaskID | None = None
    done: float = 0.0
    said: float = field(default=0.0)


class _CountColumn(TextColumn):
    """``3.1 / 25.0 MB``, ``12 / 64 samples``, or what was done where no total is known."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(count(task.completed, task.total, str(task.fields.get("unit", ""))))


def count(done: float, total: float | None, unit: str) -> str:
    """How far, in words; bytes as megabytes."""
    if unit in ("B", "byte", "bytes"):
        done, unit = done / 1e6, "MB"
        total = None if total is None else total / 1e6
        shown = f"{done:.1f}" + (f" / {total:.1f}" if total is not None else "")
    else:
        shown = f"{done:g}" + (f" / {total:g}" if total is not None else "")
    return f"{shown} {unit}".rstrip() if total is not None or done else ""


class RichProgress:
    """An :class:`edgevit.progress.Progress` for several threads at once, one line per key. Use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._lock = threading.Lock()
        self._pieces: dict[str, _Piece] = {}
        self._bars: Progress | None = None
        if self._console.is_terminal:
            # Long texts give way, so that bars and times of many devices stay below one another.
            text = Column(max_width=max(24, self._console.width - BESIDE_THE_TEXT), no_wrap=True, overflow="ellipsis")
            self._bars = Progress(
                TextColumn("{task.description}", table_column=text),
                BarColumn(bar_width=24),
                _CountColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=False,
            )

    def __enter__(self) -> RichProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def start(self, key: str, text: str, total: float | None = None, unit: str = "") -> None:
        """Begin a piece of work, or the next stage of the one that has this key."""
        with self._lock:
            before = self._pieces.get(key)
            now = time.monotonic()
            piece = _Piece(text, total, unit, before.began if before else now, before.task if before else None)
            piece.said = now
            self._pieces[key] = piece
            if self._bars is None:
                self._line(text)
            elif piece.task is None:
                piece.task = self._bars.add_task(escape(text), total=total, unit=unit)
            else:
                self._bars.reset(piece.task, total=total, description=escape(text), unit=unit)
                if total is None:
                    # reset() keeps an old total where None is given; this stage has none.
                    self._bars.tasks[self._bars.task_ids.index(piece.task)].total = None

    def advance(self, key: str, done: float, text: str = "") -> None:
        """``done`` of the total so far, not the difference."""
        with self._lock:
            piece = self._pieces.get(key)
            if piece is None:
                return
            piece.done = done
            if text:
                piece.text = text
            if self._bars is not None and piece.task is not None:
                self._bars.update(piece.task, completed=done, description=escape(piece.text))
            elif time.monotonic() - piece.said >= LINE_EVERY_SECONDS:
                piece.said = time.monotonic()
                self._line(f"{piece.text}: {count(done, piece.total, piece.unit)}".rstrip(": "))

    def finish(self, key: str, text: str = "") -> None:
        """End it; ``text`` is what to keep on the screen."""
        with self._lock:
            piece = self._pieces.pop(key, None)
            if piece is None:
                return
            took = time.monotonic() - piece.began
            if self._bars is not None and piece.task is not None:
                self._bars.remove_task(piece.task)
                self._bars.console.print(Text(f"{text or piece.text} ({took:.1f} s)", style="dim"))
            else:
                self._line(f"{text or piece.text} ({took:.1f} s)")

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)
