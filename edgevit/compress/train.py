"""Training a module from a teacher: to a stated number of steps or a stated time, and on from where it was interrupted.

Everything random in a step is drawn from its number and the seed, so a run that was killed and resumed ends, bit for bit, where
an undisturbed one of the same number of steps ends.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing
from edgevit.compress.augment import Augmentation, Batch, draw_batch
from edgevit.compress.checkpoint import Position, load_checkpoint, save_checkpoint, writing
from edgevit.compress.hardware import Hardware
from edgevit.compress.match import (
    SparseLogits,
    Taps,
    comparable,
    feature_loss,
    mixed_label_loss,
    soft_loss,
    sparsify,
    trunk_parts,
)
from edgevit.errors import BuildError
from edgevit.progress import Progress, Quiet

if TYPE_CHECKING:
    import torch

SAVE_EVERY_S = 60.0
BETAS = (0.9, 0.99)
"""AdamW's; the usual 0.999 remembers longer than a run of a few hundred steps."""


@dataclass(frozen=True)
class Settings:
    """How to train. Either ``steps`` or ``seconds`` ends it; the learning rate rises over the share ``warmup`` of it and falls
    to nothing along a cosine at its end."""

    steps: int | None
    seconds: float | None
    batch: int
    learning_rate: float
    warmup: float
    augmentation: Augmentation
    seed: int
    logits: float = 1.0
    features: float = 0.0
    labels: float = 0.0
    hard: bool = False
    temperature: float = 1.0
    passes: int | None = None
    top: int = 100


@dataclass(frozen=True)
class Lesson:
    """Who learns what from whom: ``pairs`` of block outputs to agree on, ``weights`` how often each image (N,) is drawn, None
    for every image once a pass."""

    student: torch.nn.Module
    teacher: torch.nn.Module | None
    pixels: torch.Tensor
    labels: torch.Tensor | None
    preprocessing: Preprocessing
    pairs: tuple[tuple[int, int], ...] = ()
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """What training came to: steps and images seen, mean loss of its first and last twentieth, seconds over all runs."""

    steps: int
    images: int
    first_loss: float
    last_loss: float
    seconds: float
    resumed_at: int


@dataclass
class _Run:
    """The moving parts of one training."""

    lesson: Lesson
    settings: Settings
    hardware: Hardware
    scratch: Path
    module: Any = None
    optimizer: Any = None
    teacher: Any = None
    taps: tuple[Taps, Taps] | None = None
    step: int = 0
    elapsed: float = 0.0
    losses: list[float] = field(default_factory=list)
    order: tuple[int, torch.Tensor] | None = None


def train(lesson: Lesson, settings: Settings, hardware: Hardware, scratch: Path, on_progress: Progress) -> Trained:
    """Train ``lesson.student`` in place, leaving it on the CPU in evaluation mode.

    A checkpoint in ``scratch`` from an interrupted run of the same lesson is taken up. SIGINT finishes the step, saves and
    raises KeyboardInterrupt. Raises :class:`BuildError` where the loss is no longer a number.
    """
    if hardware.rank:
        on_progress = Quiet()
    run = _start(lesson, settings, hardware, scratch, on_progress)
    resumed_at = run.step
    total = settings.steps if settings.seconds is None else settings.seconds
    unit = "steps" if settings.seconds is None else "seconds"
    on_progress.start("distil", f"training on {len(lesson.pixels):,} images, {hardware.describe()}", total, unit)
    began, earlier = time.monotonic(), run.elapsed
    saved = earlier
    try:
        with _deferred_interrupt() as interrupted:
            while _progress(run) < 1:
                loss = _one_step(run)
                if not math.isfinite(loss):
                    raise BuildError(
                        f"distil: the loss was {loss} at step {run.step}",
                        hint=f"lower learning_rate ({settings.learning_rate:g})",
                    )
                run.losses.append(loss)
                run.elapsed = hardware.agreed(earlier + time.monotonic() - began)
                _tell(run, on_progress, resumed_at, run.elapsed - earlier)
                stop = bool(hardware.agreed(interrupted.is_set()))
                if stop or run.elapsed - saved > SAVE_EVERY_S or _progress(run) >= 1:
                    _save(run)
                    saved = run.elapsed
                if stop:
                    raise KeyboardInterrupt
    finally:
        if run.taps:
            for taps in run.taps:
                taps.remove()
    lesson.student.to("cpu").eval()
    trained = summed_up(settings, Position(run.step, run.elapsed), run.losses, resumed_at)
    told = f"loss {trained.first_loss:.3f} → {trained.last_loss:.3f}"
    on_progress.finish("distil", f"{run.step} steps in {run.elapsed / 60:.1f} min, {told}")
    return trained


def summed_up(settings: Settings, position: Position, losses: list[float], resumed_at: int) -> Trained:
    """What a training came to that ended at ``position`` with ``losses``, one a step."""
    edge = max(1, len(losses) // 20)
    first, last = (sum(part) / max(len(part), 1) for part in (losses[:edge], losses[-edge:]))
    return Trained(position.step, position.step * settings.batch, first, last, position.elapsed, resumed_at)


def part_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin with ``prefix``, which is taken off."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _start(lesson: Lesson, settings: Settings, hardware: Hardware, scratch: Path, on_progress: Progress) -> _Run:
    import torch

    run = _Run(lesson, settings, hardware, scratch)
    student = lesson.student.train()
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, betas=BETAS, weight_decay=0.0)
    found = load_checkpoint(scratch, on_progress)
    if found is not None:
        tensors, position = found
        _take_up(student, optimizer, tensors)
        run.step, run.elapsed = position.step, position.elapsed
        run.losses = tensors["losses"].tolist()
        on_progress.start("resumed", f"resuming at step {run.step}")
        on_progress.finish("resumed", f"goes on from step {run.step}, {run.elapsed / 60:.1f} min into training")
    run.module, run.optimizer = hardware.prepare(student, optimizer)
    if lesson.teacher is not None:
        run.teacher = lesson.teacher
        if hardware.device.type != "cpu":
            import copy

            run.teacher = copy.deepcopy(lesson.teacher).to(hardware.device)
        run.teacher.eval()
        if lesson.pairs:
            own, theirs = trunk_parts(student), trunk_parts(run.teacher)
            run.taps = (Taps([own[i][1] for i, _ in lesson.pairs]), Taps([theirs[j][1] for _, j in lesson.pairs]))
    return run


def _progress(run: _Run) -> float:
    if run.settings.seconds is not None:
        return run.elapsed / run.settings.seconds
    return run.step / (run.settings.steps or 1)


def scheduled_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear rise over the share ``warmup``, then half a cosine to zero (Loshchilov & Hutter, 2017)."""
    if progress < warmup:
        return peak * max(progress, 0.1 * warmup) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))


def _one_step(run: _Run) -> float:
    import torch

    settings = run.settings
    rate = scheduled_rate(_progress(run), settings.learning_rate, settings.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    batch, place = _batch(run)
    with torch.random.fork_rng(devices=[run.hardware.device] if run.hardware.device.type == "cuda" else []):
        # Dropout and stochastic depth draw from torch's own generator.
        torch.manual_seed(_seed(settings.seed, run.step, run.hardware.rank))
        with run.hardware.autocast():
            loss = _loss(run, batch, place)
        run.hardware.backward(loss)
    run.hardware.clip(run.module)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return float(loss.detach())


def _batch(run: _Run) -> tuple[Batch, tuple[int, int]]:
    """The batch of this step, and (pass, place in it), which repeat every ``settings.passes`` passes."""
    import torch

    lesson, settings = run.lesson, run.settings
    count = len(lesson.pixels)
    size = min(settings.batch, count)
    in_pass = count // size
    turn, place = divmod(run.step, in_pass)
    if settings.passes is not None:
        turn %= settings.passes
    if run.order is None or run.order[0] != turn:
        generator = torch.Generator().manual_seed(_seed(settings.seed, turn, -1))
        if lesson.weights is None:
            order = torch.randperm(count, generator=generator)
        else:
            order = torch.multinomial(lesson.weights, count, replacement=True, generator=generator)
        run.order = (turn, order)
    rows = run.order[1][place * size : (place + 1) * size][run.hardware.rank :: run.hardware.processes]
    generator = torch.Generator().manual_seed(_seed(settings.seed, turn * in_pass + place, run.hardware.rank))
    batch = draw_batch(lesson.pixels, rows, lesson.preprocessing, settings.augmentation, generator, run.hardware.device)
    return batch, (turn, place)


def _seed(seed: int, number: int, rank: int) -> int:
    return (seed * 1_000_003 + number) * 1_031 + rank + 1


def _loss(run: _Run, batch: Batch, place: tuple[int, int]) -> torch.Tensor:
    import torch

    settings, lesson = run.settings, run.lesson
    outputs = run.module(batch.images)
    # A distilled DeiT in training gives two: its class token learns from labels, its distillation token from the teacher.
    own, token = outputs if isinstance(outputs, tuple) else (outputs, None)
    terms = []
    if run.teacher is not None:
        target = _teacher_says(run, batch, place, own.shape[1])
        learners = [own] if token is None else [token] if settings.labels else [own, token]
        for learner in learners if settings.logits else []:
            if settings.hard:
                terms.append(settings.logits * torch.nn.functional.cross_entropy(learner.float(), target.argmax(1)))
            else:
                terms.append(settings.logits * soft_loss(learner, target, settings.temperature))
        if run.taps is not None:
            prefix = int(getattr(lesson.student, "num_prefix_tokens", 0))
            pairs = [comparable(a, b, prefix) for a, b in zip(run.taps[0].seen, run.taps[1].seen, strict=True)]
            told = [p for p in pairs if p is not None]
            terms.append(settings.features * feature_loss([a for a, _ in told], [b for _, b in told]))
    if settings.labels and lesson.labels is not None:
        labels = lesson.labels
        first, second = (labels[r].to(run.hardware.device) for r in (batch.rows, batch.others))
        terms.append(settings.labels * mixed_label_loss(own, first, second, batch.shares.to(run.hardware.device)))
    return torch.stack(terms).sum()


def _teacher_says(run: _Run, batch: Batch, place: tuple[int, int], classes: int) -> torch.Tensor:
    """Log-probabilities (B, classes) of the teacher: asked, or read back where an earlier pass had this very batch."""
    import torch

    settings = run.settings
    kept = None
    if settings.passes is not None:
        kept = run.scratch / "teacher" / f"{place[0]}-{place[1]}-{run.hardware.rank}.safetensors"
        if kept.exists():
            from safetensors.torch import load_file

            found = load_file(str(kept))
            sparse = SparseLogits(found["values"], found["indices"], found["rest"])
            return sparse.log_probabilities(classes).to(run.hardware.device)
    with torch.no_grad():
        logits = run.teacher(batch.images).float()
    if kept is None:
        return (logits / settings.temperature).log_softmax(1)
    sparse = sparsify(logits.cpu(), settings.top, settings.temperature)
    _keep(kept, sparse)
    return sparse.log_probabilities(classes).to(run.hardware.device)


def _keep(path: Path, sparse: SparseLogits) -> None:
    from safetensors.torch import save

    data = save({"values": sparse.values, "indices": sparse.indices, "rest": sparse.rest})
    with writing(path, len(data)) as part:
        part.write_bytes(data)
        part.replace(path)


def _save(run: _Run) -> None:
    import torch

    run.hardware.wait()
    if run.hardware.rank:
        return
    tensors = {f"model.{k}": v for k, v in run.lesson.student.state_dict().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()})
    tensors["losses"] = torch.tensor(run.losses, dtype=torch.float64)
    save_checkpoint(run.scratch, tensors, Position(run.step, run.elapsed))


def _take_up(student: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    student.load_state_dict(part_of(tensors, "model."))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in part_of(tensors, "optimizer.").items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _tell(run: _Run, on_progress: Progress, resumed_at: int, seconds: float) -> None:
    recent = run.losses[-20:]
    rate = (run.step - resumed_at) / max(seconds, 1e-9)
    left = (run.settings.seconds or 0) - run.elapsed if run.settings.seconds else ((run.settings.steps or 0) - run.step) / rate
    text = f"loss {sum(recent) / len(recent):.3f}, {rate * run.settings.batch:.0f} images/s, {max(left, 0) / 60:.1f} min left"
    done = run.step if run.settings.seconds is None else min(run.elapsed, run.settings.seconds)
    on_progress.advance("distil", done, text)


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """SIGINT sets the event, so that a step is never left half done; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def remember(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
