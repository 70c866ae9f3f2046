"""Refitting the linear layers of a compressed network, one after the other, to what the original gives.

Each layer is fitted on the inputs it really gets, from layers already compressed, so that a later layer takes back part of what
the earlier ones lost, as in Frantar & Alistarh, "Optimal Brain Compression" (2022). The layers that write to the residual
stream (attention's projection, the MLP's second) aim at the original stream itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgevit.compress.blocks import ResidualBlock, Streams, called_alone, follows, input_of, taps
from edgevit.compress.ridge import Moments, correct
from edgevit.compress.statistics import rows_of, weights_for
from edgevit.progress import Progress

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Goal:
    """What one layer of the compressed network should give: ``project`` · the original layer's output, where ``project`` is
    (outputs, original outputs), None for the identity. ``weight`` and ``bias`` are where the fit starts from and is held to."""

    weight: torch.Tensor
    bias: torch.Tensor
    tokens: torch.Tensor
    project: torch.Tensor | None = None


def goal_of(layer: Any, tokens: torch.Tensor, project: torch.Tensor | None = None) -> Goal:
    """A linear ``layer`` is to go on giving what it gives, or ``project`` · what the original gave."""
    import torch

    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    return Goal(layer.weight, bias, tokens, project)


Commit = Callable[[str, "torch.Tensor", "torch.Tensor", Moments], None]
"""Takes path, fitted (outputs, inputs), fitted (outputs,) and the moments they were fitted on, and writes the layer."""


def refit_in_order(
    original: torch.nn.Module,
    module: torch.nn.Module,
    blocks: Sequence[ResidualBlock],
    images: Sequence[torch.Tensor],
    goals: Mapping[str, Goal],
    correction: float,
    commit: Commit,
    on_progress: Progress,
) -> None:
    """Fit every layer of ``goals`` that lies in one of ``blocks``, in the order they run, changing ``module``. Blocks that need
    more than their input are passed over: what was fitted there stays as it is.

    ``correction`` is the share of what is missing in the residual stream that the layers writing to it try to make good.
    """
    alone = called_alone(original, blocks, images[0])
    blocks = [block for block, by_itself in zip(blocks, alone, strict=True) if by_itself]
    chained = follows(original, blocks, images[0])
    theirs, ours = Streams(original, blocks, chained, images), Streams(module, blocks, chained, images)
    on_progress.start("refit", "refitting in order", len(blocks), "blocks")
    for done, block in enumerate(blocks):
        theirs.advance()
        ours.advance()
        layers = [
            f"{p}.{n}" for p, names in ((block.attention, ("qkv", "proj")), (block.mlp, ("fc1", "fc2"))) if p for n in names
        ]
        inside = [layer.removeprefix(f"{block.path}.") for layer in layers]
        source, target = original.get_submodule(block.path), module.get_submodule(block.path)
        theirs_out = [_outputs(source, inside, x) for x in theirs.inputs]
        for layer, short in zip(layers, inside, strict=True):
            if layer not in goals:
                continue
            goal = goals[layer]
            share = correction if block.plain and short.endswith(("proj", "fc2")) else 0.0
            halves = tuple(Moments(goal.weight.shape[1], goal.weight.shape[0]) for _ in range(2))
            for i, (x, seen) in enumerate(zip(ours.inputs, theirs_out, strict=True)):
                given, stream = _input(target, short, x)
                wanted = seen[short] if goal.project is None else seen[short] @ goal.project.T
                if share:
                    wanted = wanted + share * (seen[_stream_of(short)] - stream)
                _add(halves, goal, given, wanted, len(images[i]))
            change = correct((halves[0], halves[1]))
            weight, bias = change if change is not None else (0.0 * goal.weight, 0.0 * goal.bias)
            commit(layer, goal.weight + weight.float(), goal.bias + bias.float(), halves[0] + halves[1])
        on_progress.advance("refit", done + 1)
    on_progress.finish("refit", f"{len(goals)} layers refitted on {sum(len(b) for b in images)} images")


def _stream_of(short: str) -> str:
    """The layer whose input is the residual stream that ``short`` adds to, in timm's ``Block``."""
    return "norm1" if short.endswith("proj") else "norm2"


def _outputs(block: torch.nn.Module, layers: Sequence[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of ``layers``, and the residual stream before each half of a block that has timm's norms."""
    import torch

    norms = [n for n in ("norm1", "norm2") if hasattr(block, n)]
    with taps(block, [*layers, *norms]) as seen, torch.no_grad():
        block(x)
    return {**{n: seen[n][1] for n in layers}, **{n: seen[n][0] for n in norms}}


def _input(block: torch.nn.Module, layer: str, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What ``layer`` is given, and the residual stream it adds to."""
    stream = _stream_of(layer)
    with taps(block, [stream] if hasattr(block, stream) else []) as seen:
        given = input_of(block, layer, x)
    return given, seen[stream][0] if seen else None


def _add(halves: Sequence[Moments], goal: Goal, given: torch.Tensor, wanted: torch.Tensor, images: int) -> None:
    """Every other image goes to the one half, the rest to the other."""
    rows, targets = rows_of(given, images), rows_of(wanted, images)
    for half, moments in enumerate(halves):
        x = rows[half::2]
        if len(x):
            flat = x.reshape(-1, x.shape[-1])
            error = targets[half::2].reshape(-1, targets.shape[-1]) - (flat @ goal.weight.T + goal.bias)
            moments.add(flat, weights_for(goal.tokens, x), error)
