"""The same work on a Ray cluster; the only import of Ray.

Ray starts the processes, on this machine where ``RAY_ADDRESS`` names no cluster. Every node needs this very version of edgevit
and, under the same path, the cache and the images: both are checked before a node works on a cell.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevit.errors import BuildError, MissingExtra, UsageError
from edgevit.progress import Progress, Quiet
from edgevit.workers import THREAD_VARIABLES, Failure, Outcome, Task, perform

KEPT = ("EDGEVIT_HOME", "EDGEVIT_RUNTIMES", "XDG_CACHE_HOME")
"""What of the environment says where things are; workers on all nodes get the same."""


@dataclass(frozen=True)
class Shared:
    """A file in the cache with ``content``, by which a node proves that it sees the same cache with the same code."""

    path: Path
    content: str
    code: str


@dataclass(frozen=True)
class RayEngine:
    """A running Ray; ``work`` is the remote function."""

    jobs: int
    shared: Shared
    ray: Any
    work: Any

    def run(self, next_task: Callable[[], Task | None], progress: Progress) -> Iterator[Outcome]:
        """See :class:`edgevit.engines.Engine`. A task says when it begins and how it ended, nothing between."""
        running: dict[Any, Task] = {}
        try:
            while True:
                while len(running) < self.jobs:
                    task = next_task()
                    if task is None:
                        break
                    progress.start(f"ray {task.name}", f"{task.name}: on Ray")
                    running[self.work.remote(task, self.shared)] = task
                if not running:
                    return
                (ready,), _ = self.ray.wait(list(running), num_returns=1)
                task = running.pop(ready)
                outcome = self._outcome(task, ready)
                progress.finish(f"ray {task.name}", f"{task.name}: {'failed' if outcome.failure else 'done'} on Ray")
                yield outcome
        finally:
            for reference, task in running.items():
                self.ray.cancel(reference, force=True)
                progress.finish(f"ray {task.name}", f"{task.name}: ended")

    def _outcome(self, task: Task, reference: Any) -> Outcome:
        try:
            answer, pid = self.ray.get(reference)
        except self.ray.exceptions.RayError as e:
            text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            return Outcome(task, None, Failure(BuildError.__name__, f"its Ray worker ended: {text[:400]}"), 0)
        if isinstance(answer, Failure):
            return Outcome(task, None, answer, pid)
        return Outcome(task, answer, None, pid)


def work_on(task: Task, shared: Shared) -> tuple[Any, int]:
    """In a Ray worker: the task's value or its :class:`Failure`, and this process's id."""

    def refuse(what: str) -> tuple[Any, int]:
        return Failure("UsageError", f"a Ray node {what}", "docs/tune.md, “More than one machine”"), os.getpid()

    try:
        seen = shared.path.read_text(encoding="utf-8")
    except OSError:
        seen = ""
    if seen != shared.content:
        return refuse(f"does not see this machine's cache: {shared.path.parent} is another folder there, or none")
    if made_by() != shared.code:
        return refuse("has another version of edgevit, or of what it builds with")
    return perform(task, Quiet()), os.getpid()


def made_by() -> str:
    """Of all that decides here what a build writes: another torch or exporter on a node would write other files under this
    machine's keys."""
    from edgevit.build import code_digest
    from edgevit.cache import digest_of, tool_versions

    return digest_of(code_digest(), tool_versions())


@contextmanager
def open_ray(jobs: int | None) -> Iterator[RayEngine]:
    """Connect to the cluster that ``RAY_ADDRESS`` names, else start Ray here; disconnected, or ended, behind the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Nothing is told to anyone else.
    try:
        import ray
    except ModuleNotFoundError as e:
        raise MissingExtra("ray", "ray") from e
    from edgevit.cache import Cache

    cluster = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if cluster else {"include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError) as e:
        where = f"at RAY_ADDRESS={cluster}" if cluster else "on this machine"
        raise UsageError(f"Ray did not start {where}: {str(e)[:400]}", hint="ray status") from e
    token = Cache().root / "engines" / uuid.uuid4().hex
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(token.name, encoding="utf-8")
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        count = min(jobs or max(1, cores // 2), cores)
        threads = max(1, cores // count) if not cluster else 1
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
        variables.update({name: os.environ[name] for name in KEPT if name in os.environ})
        variables["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *(p for p in sys.path if p)])
        settings: dict[str, Any] = {"num_cpus": threads, "max_retries": 0, "runtime_env": {"env_vars": variables}}
        shared = Shared(token, token.name, made_by())
        yield RayEngine(count, shared, ray, ray.remote(**settings)(work_on))
    finally:
        token.unlink(missing_ok=True)
        ray.shutdown()
