"""Every draw on disk, and Optuna that draws the next; the only import of Optuna.

One SQLite file a search. A draw is written down before anything is done with it: one whose evaluation a kill interrupted is
taken up again. Optuna's own study lives in memory and is told again, at the start, what the file holds; its sampler is seeded
anew for each trial from the search's seed and the trial's number. So an interrupted search draws what it would have drawn.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevit.errors import MissingExtra, StoreError, UsageError
from edgevit.tune.candidate import Candidate, from_json, to_json
from edgevit.tune.space import Draw, Trial, Value

SEEDS_AT_ONCE = 8
"""So many shipped recipes are tried first; from then on they, draws at the boundary of the limits, and Optuna's take turns."""

STARTUP = 10
"""Trials before Optuna's model of the space says anything (Optuna's own default of TPE)."""

_TABLES = """
CREATE TABLE IF NOT EXISTS trials (number INTEGER PRIMARY KEY, seed INTEGER, drawn TEXT NOT NULL, candidate TEXT, ended TEXT);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

Draws = Callable[[Trial], dict[str, Value]]


@dataclass(frozen=True)
class Kept:
    """A trial as it is on disk; ``candidate`` None where it was drawn and not evaluated, ``told`` whether the sampler knows how
    it ended."""

    number: int
    drawn: Draw
    candidate: Candidate | None
    told: bool


class Trials:
    """The trials of one search; close it. Only one process at a time may have it open.

    Raises :class:`MissingExtra` without Optuna, :class:`UsageError` where the search is running already, :class:`StoreError`
    for a file that cannot be read, or written, at any moment.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        try:
            import optuna
        except ModuleNotFoundError as e:
            raise MissingExtra("optuna", "tune") from e
        self._optuna, self._seed = optuna, seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.close()
            raise UsageError(f"this very search is running already ({folder})", hint="wait for it, or end it") from e
        try:
            self._file = sqlite3.connect(folder / "trials.sqlite", isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.executescript(_TABLES)
        except sqlite3.Error as e:
            self._lock.close()
            raise StoreError(f"the trials in {folder} cannot be read: {e}", hint=f"move {folder} away") from e
        self._folder = folder
        self._study: Any = None
        self._open: dict[int, Any] = {}

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()
        self._lock.close()

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kept(self) -> list[Kept]:
        """Every trial, in order."""
        rows = self._execute("SELECT number, drawn, candidate, ended FROM trials ORDER BY number")
        return [
            Kept(number, json.loads(drawn), None if candidate is None else from_json(json.loads(candidate)), ended is not None)
            for number, drawn, candidate, ended in rows
        ]

    def ask(self, draws: Draws, seeds: Sequence[Draw], at_boundary: Callable[[], Draw | None]) -> Kept:
        """The next draw: a shipped recipe's, what ``at_boundary`` has, or the sampler's own."""
        study = self._recalled(draws)
        ((number, seeded),) = self._execute("SELECT count(*), count(seed) FROM trials")
        turn = number % 3 if number >= SEEDS_AT_ONCE else 0
        seed = seeded if turn == 0 and seeded < len(seeds) else None
        given = seeds[seed] if seed is not None else at_boundary() if turn < 2 else None
        if given is not None:
            study.enqueue_trial(dict(given))
        study.sampler = self._optuna.samplers.TPESampler(seed=(self._seed * 100_003 + number) % 2**32, n_startup_trials=STARTUP)
        drawn = self._draw(study, number, draws)
        self._execute("INSERT INTO trials (number, seed, drawn) VALUES (?, ?, ?)", (number, seed, json.dumps(drawn)))
        return Kept(number, drawn, None, False)

    def drawn(self) -> dict[int, Draw]:
        """Every draw, by the number of its trial."""
        return {number: json.loads(drawn) for number, drawn in self._execute("SELECT number, drawn FROM trials")}

    def note(self, candidate: Candidate) -> None:
        """Keep what became of a trial so far."""
        text = json.dumps(to_json(candidate))
        self._execute("UPDATE trials SET candidate = ? WHERE number = ?", (text, candidate.number))

    def tell(self, draws: Draws, number: int, value: float | None, constraints: Mapping[str, float]) -> None:
        """How a trial ended, for the sampler: ``value`` is the less the better, None for one that failed; of ``constraints``
        those above 0 are not held."""
        self._recalled(draws)
        self._tell(number, value, constraints)
        ended = json.dumps({"value": value, "constraints": dict(constraints)})
        self._execute("UPDATE trials SET ended = ? WHERE number = ?", (ended, number))

    def reopen(self, number: int) -> None:
        """As if a trial had only been drawn; before the sampler is first asked or told anything."""
        self._execute("UPDATE trials SET candidate = NULL, ended = NULL WHERE number = ?", (number,))

    def begin_anew(self) -> None:
        """Forget every trial and how long was searched; what was shipped, and what is searched, stays."""
        self._execute("DELETE FROM facts WHERE name IN ('spent_s', 'ended', 'exhausted')")
        self._execute("DELETE FROM trials")  # the last: a kill between the two leaves trials that are known to be of no use
        self._study, self._open = None, {}

    def get(self, name: str) -> Any:
        """A value of the whole search, None where it was not set."""
        rows = self._execute("SELECT value FROM facts WHERE name = ?", (name,))
        return json.loads(rows[0][0]) if rows else None

    def set(self, name: str, value: Any) -> None:
        """Keep a JSON value of the whole search."""
        self._execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, json.dumps(value)))

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._file.execute(statement, values).fetchall()
        except sqlite3.Error as e:
            raise StoreError(
                f"the trials in {self._folder} cannot be kept: {e}",
                hint=f"df -h {self._folder}, then the same command again: it goes on where it stood",
            ) from e

    def _recalled(self, draws: Draws) -> Any:
        """Optuna's study, told once what the file holds: each trial is drawn over with its own values."""
        if self._study is None:
            self._study = self._optuna.create_study(sampler=self._optuna.samplers.RandomSampler(seed=self._seed))
            for number, drawn, ended in self._execute("SELECT number, drawn, ended FROM trials ORDER BY number"):
                self._study.enqueue_trial(json.loads(drawn))
                self._draw(self._study, number, draws)
                if ended is not None:
                    told = json.loads(ended)
                    self._tell(number, told["value"], told["constraints"])
        return self._study

    def _draw(self, study: Any, number: int, draws: Draws) -> dict[str, Value]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values between two hundredths, which floats are
            trial = study.ask()
            self._open[number] = trial
            return draws(trial)

    def _tell(self, number: int, value: float | None, constraints: Mapping[str, float]) -> None:
        trial = self._open.pop(number)
        if value is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        for name, share in constraints.items():
            trial.set_constraint(name, share)
        self._study.tell(trial, value)
