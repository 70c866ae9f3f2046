"""Pruning along the widths of a dependency graph: which units go, what a cut costs, and what the readers do without them.

The layers that read a width take over in closed form what the units that went carried, from second moments of what they read:
exactly for linear layers and 1×1 convolutions, and as if every tap of a larger kernel saw the same images (true but for the
border). What is normalised over the width, and everything behind it, shifts none the less: recovery should follow.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from device_agents.wire import Preprocessing, StepReport
from edgevit.compress.budget import Cut, Judge, allocate, interpolate, split_judged
from edgevit.compress.channels import Width, cut, find_widths, kept_where, why_unproven
from edgevit.compress.narrowing import MOST_HIDDEN, output_root, round_down
from edgevit.compress.ridge import Moments, eliminate_together
from edgevit.compress.statistics import Sensitivity, collect_moments, measure_sensitivity
from edgevit.errors import BuildError
from edgevit.macs import count_macs
from edgevit.progress import Progress

if TYPE_CHECKING:
    import torch

    from edgevit.compress import Compressed, StepContext
    from edgevit.compress.prune import PruneConfig

SHARES = (0.25, 0.5)
"""Shares of a width at which its cost is measured."""

TRIES = 12
"""Allocations at most until the MACs come down as far as wanted: two widths of one layer save less together than each alone."""


@dataclass(frozen=True)
class Graph:
    """The proven widths of ``module``, why others must stay whole, by name, and what calibration images said of the readers."""

    module: torch.nn.Module
    widths: tuple[Width, ...]
    unproven: Mapping[str, str]
    sensitivity: Mapping[str, Sensitivity]
    moments: Mapping[str, Moments]


def prune_channels(state: Compressed, config: PruneConfig, context: StepContext) -> Compressed:
    """``state`` with ``config.ratio`` of the MACs less, cut along the widths of Torch-Pruning's graph that are proven.

    Raises :class:`BuildError` where none is, or all together cannot give as much; :class:`DataError` without real images.
    """
    from edgevit.compress.calibrate import normalise

    images, judged = split_judged(normalise(context.real_images("prune")[: config.images], state.preprocessing))
    module = copy.deepcopy(state.module).eval().requires_grad_(False)
    graph = survey_widths(module, images, context.multiple, context.on_progress)
    scores = {w.name: unit_scores(graph, w, config.importance) for w in graph.widths}
    judge = Judge(module, (), judged)
    cuts = _costs(graph, scores, judge, context, state.preprocessing)
    chosen = _allocated(graph, scores, cuts, config.ratio, state.preprocessing)
    pruned = narrow(graph, scores, chosen)
    fit = "readers refitted one by one"
    if config.refit:
        pruned, fit = _with_statistics(judge, pruned, images)
    sizes = {path: {s: len(i) for s, i in sides.items()} for path, sides in _kept(graph, scores, chosen).items()}
    whole, left = (count_macs(m, state.preprocessing) for m in (module, pruned))
    details = {w.name: _describe(w, chosen[w.name]) for w in graph.widths if w.name in chosen}
    details |= {name: f"left whole: {reason}" for name, reason in graph.unproven.items()}
    summary = (
        f"{len(chosen)} of {len(graph.widths) + len(graph.unproven)} widths narrower by {config.importance}, "
        f"{1 - left / whole:.1%} of the MACs removed, {fit}"
    )
    plan: dict[str, Any] = {"sizes": {}, "blocks": [], "widths": sizes}
    return state.restructured(pruned.eval(), "prune", plan, StepReport("prune", len(chosen), summary, details))


def _describe(width: Width, chosen: Cut) -> str:
    return f"{width.size} units in {len(width.places)} places → {chosen.size[0]}, costs {chosen.loss:.3g} nats alone"


def survey_widths(module: torch.nn.Module, images: Sequence[torch.Tensor], multiple: int, on_progress: Progress) -> Graph:
    """The widths of ``module`` with more than ``multiple`` units, proven, and statistics of every layer that reads one."""
    found = [w for w in find_widths(module, images[0][:1]) if w.size > multiple]
    on_progress.start("prove", "proving what may be narrower", len(found), "widths")
    unproven = {}
    for i, width in enumerate(found):
        reason = why_unproven(module, width, images[0][:1])
        if reason:
            unproven[width.name] = reason
        on_progress.advance("prove", i + 1)
    widths = tuple(w for w in found if w.name not in unproven)
    on_progress.finish("prove", f"{len(widths)} of {len(found)} widths proven")
    if not widths:
        why = "".join(f"; {n}: {r}" for n, r in list(unproven.items())[:3])
        raise BuildError(
            f"prune: {type(module).__name__} has no width of more than {multiple} units that may be cut{why}",
            hint="prune other targets than channels, or leave the step out",
        )
    readers = sorted({p.path for w in widths for p in w.readers})
    total, done = sum(len(b) for b in images), 0
    on_progress.start("survey", "surveying layers, twice", 2 * total, "images")

    def on_image(count: int) -> None:
        nonlocal done
        done += count
        on_progress.advance("survey", done)

    sensitivity = measure_sensitivity(module, images, readers, on_image)
    moments, _ = collect_moments(module, images, {p: s.tokens for p, s in sensitivity.items()}, {}, on_image)
    on_progress.finish("survey", f"{len(sensitivity)} layers surveyed on {total} images")
    ran = tuple(w for w in widths if all(p.path in sensitivity for p in w.readers))
    return Graph(module, ran, unproven, sensitivity, moments)


def unit_scores(graph: Graph, width: Width, importance: str) -> torch.Tensor:
    """How much each unit of ``width`` matters, (size,), summed over the layers that read it.

    ``reconstruction`` is the order in which units go when all readers take over again after each
    (:func:`edgevit.compress.ridge.eliminate_together`).
    """
    import torch

    total = torch.zeros(width.size, dtype=torch.float64)
    if importance == "reconstruction":
        readers = []
        for place in width.readers:
            moments, seen = graph.moments[place.path], torch.tensor([index for _, index in sorted(place.units)])
            readers.append((moments.covariance[seen][:, seen], _felt(graph, place.path)[:, seen], moments.ridge))
        went = eliminate_together(readers, int(width.size * MOST_HIDDEN)).order
        total += len(went)
        total[list(went)] = torch.arange(len(went), dtype=torch.float64)
        return total
    for place in width.readers:
        scores = _reader_scores(graph, place.path, importance)
        for unit, index in place.units:
            total[unit] += scores[index]
    return total


def _reader_scores(graph: Graph, path: str, importance: str) -> torch.Tensor:
    """How much each input of one reader matters, (inputs,)."""
    if importance == "taylor":
        return graph.sensitivity[path].taylor_in
    moments, weight = graph.moments[path], _weight(graph.module.get_submodule(path))
    if importance == "magnitude":
        energy = weight.square().sum((0, 2))
        return energy / energy.mean().clamp_min(1e-30)
    return (moments.xx.diagonal()[:-1] / moments.weight) * weight.square().sum((0, 2))


def _weight(layer: Any) -> torch.Tensor:
    """(outputs, inputs, taps) of a linear layer or convolution, float64."""
    weight: torch.Tensor = layer.weight.double()
    return weight[..., None] if weight.ndim == 2 else weight.flatten(2)


def _felt(graph: Graph, path: str) -> torch.Tensor:
    """The reader's weights (outputs · taps, inputs), weighted by how much its outputs matter to the answer."""
    import torch

    sensitivity, weight = graph.sensitivity[path], _weight(graph.module.get_submodule(path))
    matters = output_root(sensitivity) * sensitivity.gram.diagonal().mean().sqrt()
    return torch.einsum("po,oit->pti", matters, weight).flatten(0, 1)


def _regular(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    import torch

    energy = covariance.diagonal().mean().clamp_min(1e-12)
    return covariance + ridge * energy * torch.eye(len(covariance), dtype=torch.float64)


def narrow(graph: Graph, scores: Mapping[str, torch.Tensor], chosen: Mapping[str, Cut]) -> torch.nn.Module:
    """A copy of the module with each width of ``chosen`` at its size, every reader refitted to do without what went."""
    kept = _kept(graph, scores, chosen)
    module = copy.deepcopy(graph.module)
    for path, sides in kept.items():
        if "in" in sides:
            _take_over(module.get_submodule(path), sides["in"], graph.moments[path])
    return cut(module, kept)


def _kept(graph: Graph, scores: Mapping[str, torch.Tensor], chosen: Mapping[str, Cut]) -> Any:
    stays = {name: scores[name].argsort(descending=True)[: way.size[0]].tolist() for name, way in chosen.items()}
    return kept_where(graph.module, graph.widths, stays)


def _take_over(layer: Any, left: Sequence[int], moments: Moments) -> None:
    """The inputs ``left`` of ``layer`` give what the others gave as far as they can tell it; the others' weights are void."""
    import torch

    keep = torch.tensor(left)
    out = torch.ones(len(moments.xx) - 1, dtype=torch.bool)
    out[keep] = False
    # Without a bias to hold the means, they are part of what has to be explained.
    seen = moments.covariance if layer.bias is not None else moments.xx[:-1, :-1] / moments.weight
    takes = torch.linalg.solve(_regular(seen[keep][:, keep], moments.ridge), seen[keep][:, out]).T
    old = _weight(layer)
    new = old.clone()
    new[:, keep] += torch.einsum("ogt,gk->okt", old[:, out], takes)
    if layer.bias is not None:
        mean = moments.mean
        layer.bias = _parameter(layer.bias + old[:, out].sum(2) @ (mean[out] - takes @ mean[keep]))
    layer.weight = _parameter(new.reshape(layer.weight.shape))


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    import torch

    return torch.nn.Parameter(tensor.float(), requires_grad=False)


def _costs(
    graph: Graph, scores: Mapping[str, torch.Tensor], judge: Judge, context: StepContext, shape: Preprocessing
) -> dict[str, list[Cut]]:
    """What each width can be cut to, what that alone saves, and what it costs at the output."""
    macs, cuts = count_macs(graph.module, shape), {}
    context.on_progress.start("judge", "measuring what each cut costs", len(graph.widths), "widths")
    for i, width in enumerate(graph.widths):
        sizes = sorted({round_down(int(width.size * (1 - share)), context.multiple) for share in SHARES})
        losses, saved = {}, 0.0
        for size in (n for n in sizes if 0 < n < width.size):
            narrower = narrow(graph, scores, {width.name: Cut((size,), 0, 0.0)})
            losses[1 - size / width.size] = judge.of(narrower)
            saved = (macs - count_macs(narrower, shape)) / (width.size - size)
        if losses and saved > 0:
            least = max(int(width.size * (1 - MOST_HIDDEN)), context.multiple)
            ways = range(-(-least // context.multiple) * context.multiple, width.size, context.multiple)
            cuts[width.name] = [
                Cut((n,), round(saved * (width.size - n)), interpolate(losses, 1 - n / width.size)) for n in ways
            ]
        context.on_progress.advance("judge", i + 1)
    context.on_progress.finish("judge", f"the cost of {sum(map(len, cuts.values()))} cuts measured")
    return cuts


def _allocated(
    graph: Graph, scores: Mapping[str, torch.Tensor], cuts: Mapping[str, Sequence[Cut]], ratio: float, shape: Preprocessing
) -> dict[str, Cut]:
    """The cheapest cuts that together really save ``ratio`` of the MACs."""
    macs = count_macs(graph.module, shape)
    wanted, asked = round(macs * ratio), float(round(macs * ratio))
    saved, chosen = 0, dict[str, Cut]()
    for _ in range(TRIES):
        before, chosen = chosen, allocate(cuts, round(asked))
        if chosen != before:
            saved = macs - count_macs(cut(copy.deepcopy(graph.module), _kept(graph, scores, chosen)), shape)
        if saved >= wanted:
            return chosen
        asked += max(wanted - saved, macs * 0.005)
    raise BuildError(
        f"prune: ratio {ratio} asks for {wanted:,} of {macs:,} MACs, and channels of {len(cuts)} widths "
        f"can give {saved:,} at most (ratio {saved / macs:.2f}) with something left of each",
        hint="lower ratio",
    )


def _with_statistics(judge: Judge, pruned: torch.nn.Module, images: Sequence[torch.Tensor]) -> tuple[torch.nn.Module, str]:
    """``pruned`` with the statistics of its BatchNorms taken anew where that brings the answers nearer, and what was done."""
    import torch

    norms = [n for n, m in pruned.named_modules() if _estimates(m)]
    if not norms:
        return pruned, "readers refitted one by one"
    again = copy.deepcopy(pruned)
    for name in norms:
        norm: Any = again.get_submodule(name)
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for batch in images:
            again(batch)
    for name in norms:
        norm, before = again.get_submodule(name), pruned.get_submodule(name)
        norm.eval()
        norm.momentum = before.momentum
    first, second = judge.of(pruned), judge.of(again)
    if second < first:
        return again, f"readers refitted, statistics of {len(norms)} BatchNorms taken anew ({first:.3g} → {second:.3g} nats)"
    return pruned, f"readers refitted one by one ({first:.3g} nats; {second:.3g} with new statistics of BatchNorms)"


def _estimates(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and bool(module.track_running_stats)
