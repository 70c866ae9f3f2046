"""One budget over a whole network: what each cut costs at the network's output, measured, and which cuts are the cheapest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevit.compress.blocks import BATCH, ResidualBlock, entered, follows, input_of, replace_submodule

if TYPE_CHECKING:
    import torch

JUDGED = 32
"""Calibration images on which the cost of cuts is measured, at most."""

Size = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """One way to make one part smaller: what it saves and what it costs at the network's output."""

    size: Size
    saved: int
    loss: float


def interpolate(measured: Mapping[float, float], share: float) -> float:
    """Loss at ``share`` of a part removed, from losses measured at some shares: a power law between neighbours and beyond,
    at least linear between them and of the fourth power beyond, where nothing was measured and damage soon explodes."""
    points = sorted((math.log(s), math.log(max(loss, 1e-9))) for s, loss in measured.items())
    at = math.log(share)
    if len(points) == 1:
        return math.exp(points[0][1] + 2 * (at - points[0][0]))
    i = min(max(sum(at > x for x, _ in points), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    if at > x1:
        return math.exp(y1 + max((y1 - y0) / (x1 - x0), 4.0) * (at - x1))
    return math.exp(y1 + max((y1 - y0) / (x1 - x0), 1.0) * (at - x1))


def allocate(cuts: Mapping[str, Sequence[Cut]], wanted: int) -> dict[str, Cut]:
    """The cut of each part that together save ``wanted`` at the least summed loss: always the next that costs least for
    what it saves.

    Parts that stay whole are absent; a part that goes altogether (size ()) takes the parts inside it along. Where all cuts
    together save less than ``wanted`` the result does too.
    """
    chosen: dict[str, Cut] = {}
    saved = 0
    while saved < wanted:
        best, rate = None, math.inf
        for part, options in cuts.items():
            now = chosen.get(part, Cut((), 0, 0.0))
            for cut in options:
                more = min(cut.saved - now.saved, wanted - saved)
                if cut.saved > now.saved and max(cut.loss - now.loss, 0.0) / more < rate:
                    best, rate = (part, cut), max(cut.loss - now.loss, 0.0) / more
        if best is None:
            break
        part, cut = best
        for inside in [p for p in chosen if p == part or p.startswith(f"{part}.")]:
            saved -= chosen.pop(inside).saved
        if not cut.size:
            cuts = {p: options for p, options in cuts.items() if not p.startswith(f"{part}.")}
        saved += cut.saved
        chosen[part] = cut
    return chosen


def most_saved(cuts: Mapping[str, Sequence[Cut]]) -> int:
    """What all of ``cuts`` together can save, of a part and the parts inside it the larger."""
    most = {part: max((c.saved for c in options), default=0) for part, options in cuts.items()}
    outer = {p for p in most if not any(p.startswith(f"{other}.") for other in most)}
    return sum(max(most[o], sum(n for p, n in most.items() if p.startswith(f"{o}."))) for o in outer)


class Judge:
    """How far a network's answers move when one part of it is exchanged: mean Kullback–Leibler divergence, in nats an image.

    Networks whose blocks follow one another are run from the exchanged block on.
    """

    def __init__(self, module: torch.nn.Module, blocks: Sequence[ResidualBlock], images: Sequence[torch.Tensor]) -> None:
        import torch

        self.module, self.blocks, self.images = module, blocks, images
        chained = follows(module, blocks, images[0]) if blocks else []
        self.chained = bool(blocks) and all(chained[1:])
        self.at, self.inputs = -1, [torch.empty(0)]
        self.reference = [self._answers(None, i) for i in range(len(images))]

    def loss(self, path: str, part: torch.nn.Module) -> float:
        """With ``part`` at ``path`` in place of what is there."""
        index = next((i for i, b in enumerate(self.blocks) if path == b.path or path.startswith(f"{b.path}.")), None)
        whole = self.module.get_submodule(path)
        start = index if self.chained else None
        if start is not None and self.at != start:
            self.at, self.inputs = start, [input_of(self.module, self.blocks[start].path, x) for x in self.images]
        replace_submodule(self.module, path, part)
        try:
            return self._divergence([self._answers(start, i) for i in range(len(self.images))])
        finally:
            replace_submodule(self.module, path, whole)

    def of(self, other: torch.nn.Module) -> float:
        """Of another network as a whole."""
        import torch

        with torch.no_grad():
            return self._divergence([other(x).log_softmax(1) for x in self.images])

    def _answers(self, start: int | None, i: int) -> torch.Tensor:
        import torch

        inputs = None if start is None else self.inputs[i]
        with torch.no_grad(), entered(self.module, self.blocks, start or 0, inputs):
            answers: torch.Tensor = self.module(self.images[i]).log_softmax(1)
        return answers

    def _divergence(self, answers: Sequence[torch.Tensor]) -> float:
        total = sum(float((r.exp() * (r - a)).sum()) for r, a in zip(self.reference, answers, strict=True))
        return total / sum(len(r) for r in self.reference)


def batches_of(images: torch.Tensor) -> list[torch.Tensor]:
    """(N, 3, H, W) in batches."""
    return list(images.split(BATCH))


def split_judged(images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Batches to fit on and batches to judge by, the first three quarters and the rest (at most ``JUDGED`` images): on what it
    was fitted to, a layer of which only the class token matters looks free to cut. A single image serves both."""
    judged = min(JUDGED, len(images) // 4) or len(images)
    return batches_of(images[: len(images) - judged] if judged < len(images) else images), batches_of(images[-judged:])
