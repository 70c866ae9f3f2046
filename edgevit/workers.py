"""Work in processes of their own: several at a time, each with its share of the threads, none taking another down with it.

Processes are started afresh (``spawn``), so that none inherits another's locks or threads. One that dies takes only the piece
of work it had; one whose parent dies ends at once, so that a killed study leaves nothing behind that still writes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from edgevit.errors import BuildError, EdgevitError
from edgevit.progress import Progress

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """``function(argument, progress)``, both picklable; ``name`` tells it apart for people."""

    name: str
    function: Callable[[Any, Progress], Any]
    argument: Any


@dataclass(frozen=True)
class Failure:
    """Why a piece of work failed: the class of the error, its message and its hint."""

    kind: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a task ended: ``value`` or ``failure``, and the process that worked on it."""

    task: Task
    value: Any
    failure: Failure | None
    pid: int


@dataclass
class _Worker:
    process: BaseProcess
    link: Connection
    task: Task | None = None
    open_pieces: set[str] = field(default_factory=set)


def default_jobs() -> int:
    """Half of the cores this process may use, at least one: a build keeps more than one core busy at times."""
    return max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else max(1, (os.cpu_count() or 2) // 2)


def threads_of(jobs: int) -> int:
    """Threads that each of ``jobs`` processes may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // jobs)


def run_tasks(next_task: Callable[[], Task | None], jobs: int, progress: Progress) -> Iterator[Outcome]:
    """Work through what ``next_task`` hands out, at most ``jobs`` at a time; outcomes as they come.

    ``next_task`` returns None where nothing can be started now; it is asked again after each outcome, and all is done once it
    returns None while nothing is running.
    """
    workers: list[_Worker] = []
    try:
        while True:
            workers[:] = [w for w in workers if w.task is not None or w.process.is_alive()]
            idle = [w for w in workers if w.task is None]
            while len(workers) - len(idle) < jobs:
                task = next_task()
                if task is None:
                    break
                if not idle:
                    workers.append(_start(threads_of(jobs)))
                    idle.append(workers[-1])
                worker = idle.pop()
                worker.task = task
                worker.link.send(task)
            busy = [w for w in workers if w.task is not None]
            if not busy:
                for worker in idle:
                    worker.link.send(None)
                    worker.process.join(10)
                return
            yield from _hear(busy, workers, progress)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.link.close()


def _start(threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    with threads_limited(threads):
        process.start()
    theirs.close()
    return _Worker(process, ours)


def threads_limited(threads: int) -> AbstractContextManager[None]:
    """What libraries read once, when they are loaded: it must stand in the environment before the process begins."""
    return changed_environment(dict.fromkeys(THREAD_VARIABLES, str(threads)))


@contextmanager
def changed_environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Inside the block the environment's variables are as ``changes`` say, those of None absent; behind it as before."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


def _hear(busy: list[_Worker], workers: list[_Worker], progress: Progress) -> Iterator[Outcome]:
    """Pass on what the busy workers say until at least one has ended its task."""
    ended = False
    while not ended:
        ready = wait([w.link for w in busy])
        for worker in [w for w in busy if w.link in ready]:
            task, pid = worker.task, worker.process.pid or 0
            if task is None:
                continue
            try:
                word, *content = worker.link.recv()
            except (EOFError, OSError):
                worker.process.join()
                workers.remove(worker)
                busy.remove(worker)
                _finish_pieces(worker, progress)
                ended = True
                yield Outcome(task, None, Failure("BuildError", f"its process ended: {_ending(worker.process)}"), pid)
                continue
            if word == "said":
                _pass_on(worker, task, content, progress)
                continue
            worker.task = None
            _finish_pieces(worker, progress)
            ended = True
            yield Outcome(task, content[0] if word == "done" else None, content[0] if word == "failed" else None, pid)


def _pass_on(worker: _Worker, task: Task, content: list[Any], progress: Progress) -> None:
    verb, key, *rest = content
    own = f"{worker.process.pid} {key}"
    if verb == "start":
        worker.open_pieces.add(own)
        rest[0] = f"{task.name}: {rest[0]}"
        progress.start(own, *rest)
    elif verb == "advance":
        progress.advance(own, *rest)
    else:
        worker.open_pieces.discard(own)
        progress.finish(own, f"{task.name}: {rest[0]}" if rest and rest[0] else "")


def _finish_pieces(worker: _Worker, progress: Progress) -> None:
    for key in sorted(worker.open_pieces):
        progress.finish(key)
    worker.open_pieces.clear()


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}; was there enough memory?" if name == "SIGKILL" else name
    return f"exit status {code}"


# --------------------------------------------------------------------------------------------------------------------
# In the process
# --------------------------------------------------------------------------------------------------------------------


class _Said:
    """A Progress that tells the parent."""

    def __init__(self, link: Connection) -> None:
        self._link = link

    def start(self, key: str, text: str, total: float | None = None, unit: str = "") -> None:
        self._link.send(("said", "start", key, text, total, unit))

    def advance(self, key: str, done: float, text: str = "") -> None:
        self._link.send(("said", "advance", key, done, text))

    def finish(self, key: str, text: str = "") -> None:
        self._link.send(("said", "finish", key, text))


def _serve(link: Connection) -> None:
    """Work on what comes through ``link`` until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends us
    end_with_parent()
    while True:
        try:
            task: Task | None = link.recv()
        except (EOFError, OSError):
            return
        if task is None:
            return
        value = perform(task, _Said(link))
        link.send(("failed" if isinstance(value, Failure) else "done", value))


def perform(task: Task, progress: Progress) -> Any:
    """What ``task`` returns, or the :class:`Failure` it ended with: a defect in one piece of work must not stop the others."""
    try:
        return task.function(task.argument, progress)
    except EdgevitError as e:
        return Failure(type(e).__name__, str(e), e.hint)
    except MemoryError:
        return Failure("BuildError", "out of memory", "give fewer --jobs")
    except Exception as e:  # noqa: BLE001 -- the edge of a process
        import traceback

        where = traceback.extract_tb(e.__traceback__)[-1]
        text = f"{type(e).__name__} in {where.name}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"
        return Failure(BuildError.__name__, text[:1000])


def end_with_parent() -> None:
    """Whatever this process is doing, it ends when its parent does, even by SIGKILL."""
    import threading

    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
