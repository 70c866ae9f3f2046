"""All families in all formats, each in a process of its own, so that a crash, a hang or a memory blow-up is one named failure.

Rows are kept in the cache by the digest of the family and of all code and tools they depend on: a second run does nothing.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from edgevit.cache import Cache, digest_of, hash_file, tool_versions
from edgevit.coverage.cells import IMAGES, SCHEMES, Row
from edgevit.coverage.families import Family
from edgevit.progress import Progress

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """Of one process: seconds by the clock and 10⁶ bytes of resident memory."""

    seconds: float
    memory_mb: float


@dataclass(frozen=True)
class Piece:
    """One process's share: a family in one format."""

    family: Family
    format: str

    @property
    def name(self) -> str:
        return f"{self.family.name} {self.format}"


@dataclass
class _Worker:
    piece: Piece
    process: BaseProcess
    link: Connection
    began: float
    rows: list[Row]


def cover_all(
    families: Sequence[Family],
    formats: Sequence[str],
    jobs: int,
    limits: Limits,
    again: bool,
    cache: Cache,
    progress: Progress,
) -> Iterator[tuple[Row, ...]]:
    """The rows of each family in each format, as they become known. ``again`` does failed ones anew."""
    source = source_digest()
    waiting = []
    for piece in [Piece(family, format_) for format_ in formats for family in families]:
        known = _known(cache, piece, source)
        if known is None or (again and not all(row.passed for row in known)):
            waiting.append(piece)
        else:
            yield known
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0)))
                progress.start(running[-1].piece.name, running[-1].piece.name)
            wait([w.link for w in running], POLL_SECONDS)
            for worker in list(running):
                reason = _listen(worker, limits)
                if reason is None:
                    continue
                running.remove(worker)
                rows = _ended(worker, reason)
                cache.put(_key(worker.piece, source), {}, {"rows": [asdict(row) for row in rows]})
                progress.finish(worker.piece.name, _told(rows))
                yield rows
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.join()


def source_digest() -> str:
    """Over everything a row depends on besides the family: the code that a build runs through, this package, the tools."""
    from edgevit.build import code_digest

    here = sorted(Path(__file__).parent.glob("*.py"))
    return digest_of(code_digest(), [hash_file(f) for f in here if f.name != "families.py"], tool_versions())


def _key(piece: Piece, source: str) -> str:
    return digest_of("coverage", asdict(piece.family), piece.format, SCHEMES, IMAGES, source)


def _known(cache: Cache, piece: Piece, source: str) -> tuple[Row, ...] | None:
    entry = cache.get(_key(piece, source))
    if entry is None:
        return None
    names = {f.name for f in fields(Row)}
    return tuple(Row(**{k: v for k, v in row.items() if k in names}) for row in entry.meta["rows"])


def _start(piece: Piece) -> _Worker:
    from edgevit.workers import threads_limited

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(piece, theirs), daemon=True)
    with threads_limited(1):
        process.start()
    theirs.close()
    return _Worker(piece, process, ours, time.monotonic(), [])


def _work(piece: Piece, link: Connection) -> None:
    """In the process: each row as soon as it is known."""
    from edgevit.coverage.cells import cover
    from edgevit.torchsetup import import_torch
    from edgevit.workers import end_with_parent

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends us
    import_torch().set_num_threads(1)
    try:
        for row in cover(piece.family, piece.format, Cache()):
            link.send(row)
    except MemoryError:
        link.send("out of memory")
    except Exception as e:  # noqa: BLE001 -- the edge of a process: a defect that one family meets must not stop the others
        first = next((line for line in str(e).splitlines() if line.strip()), "no message")
        link.send(f"{type(e).__name__}: {first[:500]}")


def _listen(worker: _Worker, limits: Limits) -> str | None:
    """Take what the worker says. Why it ended, empty where it did its work; None while it goes on."""
    try:
        while worker.link.poll():
            said: Any = worker.link.recv()
            if isinstance(said, str):
                worker.process.join()
                return said
            worker.rows.append(said)
    except (EOFError, OSError):
        worker.process.join()
        return "" if len(worker.rows) == len(SCHEMES) else f"its process ended: {_ending(worker.process)}"
    held = resident_mb(worker.process.pid)
    reason = ""
    if time.monotonic() - worker.began > limits.seconds:
        reason = f"not done after {limits.seconds:,.0f} s"
    elif held is not None and held > limits.memory_mb:
        reason = f"its process held {held:,.0f} MB, at most {limits.memory_mb:,.0f} MB are allowed"
    if reason:
        worker.process.kill()
        worker.process.join()
    return reason or None


def _ended(worker: _Worker, reason: str) -> tuple[Row, ...]:
    """The worker's rows, with one that says ``reason`` for each scheme it did not get to."""
    family, seconds = worker.piece.family, time.monotonic() - worker.began
    known = {row.scheme: row for row in worker.rows}
    return tuple(
        known.get(scheme)
        or Row(
            family.name,
            family.kind,
            family.member,
            worker.piece.format,
            scheme,
            seconds=seconds,
            stage="process",
            reason=reason or "the process gave no row",
        )
        for scheme in SCHEMES
    )


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


def resident_mb(pid: int | None) -> float | None:
    """Resident memory of a process in 10⁶ bytes; None where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
        import resource

        return int(text.split()[1]) * resource.getpagesize() / 1e6
    except (OSError, ValueError, IndexError, ImportError):
        return None


def _told(rows: Sequence[Row]) -> str:
    parts = [f"{row.scheme} {'passed' if row.passed else f'failed ({row.stage}: {row.reason[:120]})'}" for row in rows]
    return f"{rows[0].family} {rows[0].format}: {', '.join(parts)}; {sum(row.seconds for row in rows):.0f} s"
