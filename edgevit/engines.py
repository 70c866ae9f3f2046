"""Who works on the host-side cells of a study or a search: processes of this machine, or a Ray cluster.

An engine is handed tasks one by one and gives back outcomes as they come; what it is made of is nobody else's business. Cells
keep what they make in the cache, so that is the store that all who work on them must share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from edgevit.progress import Progress
from edgevit.workers import Outcome, Task, default_jobs, run_tasks

ENGINES = ("processes", "ray")


class Engine(Protocol):
    """Works through tasks, at most ``jobs`` at a time."""

    @property
    def jobs(self) -> int: ...

    def run(self, next_task: Callable[[], Task | None], progress: Progress) -> Iterator[Outcome]:
        """As :func:`edgevit.workers.run_tasks`: ``next_task`` returns None where nothing can be started now."""
        ...


@dataclass(frozen=True)
class Processes:
    """Processes of this machine, started afresh."""

    jobs: int

    def run(self, next_task: Callable[[], Task | None], progress: Progress) -> Iterator[Outcome]:
        """See :class:`Engine`."""
        return run_tasks(next_task, self.jobs, progress)


def run_all(engine: Engine, tasks: list[Task], progress: Progress) -> list[Outcome]:
    """The outcome of every task, as they came."""
    rest = list(tasks)
    return list(engine.run(lambda: rest.pop(0) if rest else None, progress))


@contextmanager
def open_engine(name: str, jobs: int | None) -> Iterator[Engine]:
    """The engine called ``name``, for as long as the block runs. ``jobs`` None: as many as the machine or the cluster carries.

    Raises :class:`MissingExtra` where Ray is not installed, :class:`UsageError` where no cluster answers.
    """
    if name == "processes":
        yield Processes(jobs or default_jobs())
        return
    from edgevit.ray_engine import open_ray

    with open_ray(jobs) as engine:
        yield engine
