"""Training on whatever a machine has: its CPU, its GPU, or its GPUs with a process for each."""

from __future__ import annotations

import os
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path

from edgevit.compress.checkpoint import load_checkpoint
from edgevit.compress.hardware import Accelerated, find_hardware, gpu_count, import_accelerate
from edgevit.compress.train import Lesson, Settings, Trained, part_of, summed_up, train
from edgevit.errors import BuildError
from edgevit.progress import Progress, Quiet

GOES_ON = "run it again: it goes on from its last checkpoint"


def train_anywhere(lesson: Lesson, settings: Settings, scratch: Path, on_progress: Progress) -> Trained:
    """:func:`train` on this machine's GPUs, one process for each where there are several, else on its CPU."""
    count = gpu_count()
    if count > 1:
        import_accelerate()
        try:
            work = pickle.dumps((lesson, settings, scratch))
        except (pickle.PicklingError, AttributeError, TypeError) as e:
            on_progress.start("gpus", f"{count} GPUs")
            on_progress.finish("gpus", f"{count} GPUs, one is used: the model cannot be sent to other processes ({e})")
        else:
            train_in_processes(work, count, on_progress)
            return collect(lesson, settings, scratch)
    return train(lesson, settings, find_hardware(), scratch, on_progress)


@dataclass(frozen=True)
class Share:
    """One process's part: which of ``count`` it is, the local port where they meet, and (lesson, settings, scratch), pickled.
    ``cpu``: without GPUs."""

    rank: int
    count: int
    port: int
    work: bytes
    cpu: bool


def train_in_processes(work: bytes, count: int, on_progress: Progress, cpu: bool = False) -> None:
    """:func:`train` in ``count`` processes, each on its GPU; what they learned stays in the checkpoint.

    They are started afresh, since one forked from a process that used several OpenMP threads waits for them for ever; when one
    fails, or this one is interrupted, all end. Raises :class:`BuildError` with what the first one to fail said.
    """
    from edgevit.workers import Task, run_tasks

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waiting = [Task(f"process {i + 1} of {count}", train_share, Share(i, count, port, work, cpu)) for i in range(count)]
    for outcome in run_tasks(lambda: waiting.pop(0) if waiting else None, count, on_progress):
        if outcome.failure is not None:
            raise BuildError(f"{outcome.task.name}: {outcome.failure.message}", hint=outcome.failure.hint or GOES_ON)


def train_share(share: Share, on_progress: Progress) -> None:
    """:func:`train` as one of several processes, which ``accelerate`` finds by the environment."""
    from edgevit.torchsetup import import_timm

    import_timm()
    rank, count = str(share.rank), str(share.count)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(share.port))
    lesson, settings, scratch = pickle.loads(share.work)
    train(lesson, settings, Accelerated(share.cpu), scratch, on_progress)


def collect(lesson: Lesson, settings: Settings, scratch: Path) -> Trained:
    """Give ``lesson.student`` what other processes trained and left in ``scratch``."""
    found = load_checkpoint(scratch, Quiet())
    if found is None:
        raise BuildError("distil: the training processes ended without a result", hint=GOES_ON)
    tensors, position = found
    lesson.student.load_state_dict(part_of(tensors, "model."))
    lesson.student.eval()
    return summed_up(settings, position, tensors["losses"].tolist(), 0)
