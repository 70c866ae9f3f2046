"""How far a student is from its teacher: logits, outputs of blocks, and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TRUNKS = ("blocks", "stages", "layers")
"""What timm calls the sequence of equal parts that a model is made of."""


@dataclass(frozen=True)
class SparseLogits:
    """The ``k`` largest logits of each image: ``values`` (B, k) and their classes (B, k), out of ``classes``, with the share
    of probability left for all others, ``rest`` (B,). TinyViT (Wu et al., ECCV 2022) stores teachers so."""

    values: torch.Tensor
    indices: torch.Tensor
    rest: torch.Tensor

    def log_probabilities(self, classes: int) -> torch.Tensor:
        """(B, classes): what was kept, the rest spread evenly."""
        others = max(classes - self.values.shape[1], 1)
        full = (self.rest.float().clamp_min(1e-8) / others).log()[:, None].expand(-1, classes).clone()
        return full.scatter(1, self.indices.long(), self.values.float())


def sparsify(logits: torch.Tensor, k: int, temperature: float) -> SparseLogits:
    """Log-probabilities of the ``k`` likeliest classes of (B, classes) ``logits`` at ``temperature``."""
    import torch

    values, indices = (logits.float() / temperature).log_softmax(1).topk(min(k, logits.shape[1]), dim=1)
    rest = (1 - values.exp().sum(1)).clamp_min(0)
    return SparseLogits(values.half(), indices.to(torch.int32), rest.half())


def soft_loss(student: torch.Tensor, teacher_log_probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback–Leibler divergence of softened outputs, times the square of the temperature (Hinton et al., 2015)."""
    import torch

    own = (student.float() / temperature).log_softmax(1)
    return torch.nn.functional.kl_div(own, teacher_log_probabilities, reduction="batchmean", log_target=True) * temperature**2


def mixed_label_loss(student: torch.Tensor, first: torch.Tensor, second: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with two labels (B,) an image, the first of weight ``share``."""
    import torch

    log = student.float().log_softmax(1)
    own = torch.nn.functional.nll_loss(log, first, reduction="none")
    other = torch.nn.functional.nll_loss(log, second, reduction="none")
    return (own * share + other * (1 - share)).mean()


def feature_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over pairs of the squared difference, as a share of the teacher's variance."""
    import torch

    losses = []
    for own, target in zip(student, teacher, strict=True):
        target = target.float()
        spread = (target - target.mean(tuple(range(target.ndim - 1)), keepdim=True)).pow(2).mean()
        losses.append((own.float() - target).pow(2).mean() / spread.clamp_min(1e-12))
    return torch.stack(losses).mean()


def trunk_parts(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """(path, part) of the blocks or stages of a timm-like model; empty where it has none."""
    for name in TRUNKS:
        trunk: Any = getattr(module, name, None)
        if trunk is not None and hasattr(trunk, "__len__") and len(trunk):
            return [(f"{name}.{i}", part) for i, part in enumerate(trunk)]
    return []


def pair_parts(student: int, teacher: int, kept: Sequence[int] | None) -> list[tuple[int, int]]:
    """(student part, teacher part) whose outputs should agree. ``kept`` are the teacher's blocks that a shallower student began
    from: each answers for those dropped behind it. Models of unequal depth are compared at the end alone."""
    if kept is not None:
        ends = [*(start - 1 for start in kept[1:]), teacher - 1]
        return list(enumerate(ends))
    if student == teacher:
        return [(i, i) for i in range(student)]
    return [(student - 1, teacher - 1)] if student and teacher else []


class Taps:
    """Outputs of chosen parts of a module, as of its last call; of a part that gives several the first, as blocks that merge
    give tokens and their sizes."""

    def __init__(self, parts: Sequence[torch.nn.Module]) -> None:
        self.seen: list[Any] = [None] * len(parts)
        self._handles = [part.register_forward_hook(self._keeper(i)) for i, part in enumerate(parts)]

    def _keeper(self, place: int) -> Callable[[Any, Any, Any], None]:
        def keep(layer: Any, args: Any, output: Any) -> None:
            self.seen[place] = output[0] if isinstance(output, tuple) else output

        return keep

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def comparable(student: Any, teacher: Any, prefix: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both outputs where they can be subtracted: as they are, or by their ``prefix`` tokens (by the mean of all where there are
    none) where tokens were merged. None for other shapes."""
    import torch

    if not isinstance(student, torch.Tensor) or not isinstance(teacher, torch.Tensor):
        return None
    if student.shape == teacher.shape:
        return student, teacher
    if student.ndim == teacher.ndim == 3 and student.shape[::2] == teacher.shape[::2]:
        if prefix:
            return student[:, :prefix], teacher[:, :prefix]
        return student.mean(1), teacher.mean(1)
    return None
