"""The low_rank step: products of matrices replaced by thinner products, under one budget of parameters.

A transformer already multiplies matrices in pairs: query by key, value by projection, first by second layer of the MLP. Making
the inside of such a pair thinner saves from the first rank on, while splitting one layer into two saves only below
``r < m·n/(m+n)``. Pairs and single layers alike are truncated in the metric of what really flows in and of what the answer is
sensitive to, not in that of the weights. No labels and no training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from device_agents.wire import StepReport
from edgevit.compress import Compressed, Json, StepContext, step
from edgevit.compress.config import StepConfig
from edgevit.errors import BuildError

if TYPE_CHECKING:
    import torch

    from edgevit.compress.budget import Cut, Judge
    from edgevit.compress.narrowing import Survey

Form = Literal["attention", "mlp", "layers"]

SHARES = (0.25, 0.5)
"""Shares of a pair's width, and of a layer's worthwhile ranks, at which the cost of truncation is measured."""


class LowRankConfig(StepConfig):
    """``low_rank:`` of a recipe."""

    images: int = Field(default=128, ge=16, le=4096, description="calibration images for statistics, refits and judging")
    ratio: float = Field(gt=0, lt=1, description="share of the parameters of linear layers and 1×1 convolutions to save")
    forms: tuple[Form, ...] = Field(
        default=("attention", "mlp", "layers"),
        min_length=1,
        description="what is truncated: query·key and value·projection of attentions, the inside of MLPs (a Nyström "
        "approximation on a part of the hidden units), and single layers, split in two (those of no pair named here)",
    )
    refit: bool = Field(default=True, description="refit the layers in order, where that brings the answers nearer")

    NOT_AFTER: ClassVar[Mapping[str, str]] = {
        "low_rank": "expected one low_rank step with the whole ratio",
        "merge_tokens": "expected it before: its costs are measured on all tokens",
    }

    @property
    def needs_images(self) -> bool:
        return True


def applies_to(module: torch.nn.Module) -> str:
    """Why no rank of ``module`` can be lowered, or nothing."""
    from edgevit.compress.blocks import find_blocks
    from edgevit.compress.factor import factorable

    if find_blocks(module) or any(True for _ in factorable(module)):
        return ""
    return f"low_rank truncates linear layers and 1×1 convolutions, and {type(module).__name__} has none"


def restructure(module: torch.nn.Module, plan: Json) -> torch.nn.Module:
    """``plan`` = {"sizes": {path: [heads, width] | [hidden]}, "ranks": {path: rank}}: ``module`` in that shape."""
    from edgevit.compress.blocks import replace_submodule
    from edgevit.compress.factor import pair_of_shape
    from edgevit.compress.widths import attention_of_shape, mlp_of_shape

    for path, size in plan["sizes"].items():
        part = module.get_submodule(path)
        made = attention_of_shape(part, *size) if len(size) == 2 else mlp_of_shape(part, *size)
        replace_submodule(module, path, made)
    for path, rank in plan["ranks"].items():
        replace_submodule(module, path, pair_of_shape(module.get_submodule(path), rank))
    return module


@step(LowRankConfig, restructure=restructure)
def low_rank(state: Compressed, config: LowRankConfig, context: StepContext) -> Compressed:
    """Save ``config.ratio`` of the parameters. Raises :class:`BuildError` where the forms cannot give as much or there are
    none, :class:`DataError` without real images."""
    import copy

    from edgevit.compress.budget import Judge, split_judged
    from edgevit.compress.calibrate import normalise
    from edgevit.compress.factor import factorable
    from edgevit.compress.narrowing import survey_blocks

    reason = applies_to(state.module)
    if reason:
        raise BuildError(reason, hint="leave the low_rank step out")
    images, judged = split_judged(normalise(context.real_images("low_rank")[: config.images], state.preprocessing))
    module = copy.deepcopy(state.module).eval().requires_grad_(False)
    singles = list(_singles(module, config.forms))
    survey = survey_blocks(module, images, singles, context.on_progress)
    judge = Judge(module, survey.blocks, judged)
    total = sum(module.get_submodule(p).weight.numel() for p in factorable(module))
    chosen = _choose(module, survey, judge, config, singles, total, context)
    sizes = {p: cut.size for p, cut in chosen.items() if p not in singles}
    ranks = {p: cut.size[0] for p, cut in chosen.items() if p in singles}
    thinner, fit = _carried_out(module, sizes, ranks, survey, judge, images, config, context)
    plan = {"sizes": {p: list(s) for p, s in sizes.items()}, "ranks": ranks}
    details = {p: _describe(state.module.get_submodule(p), cut, p in ranks) for p, cut in chosen.items()}
    saved = sum(cut.saved for cut in chosen.values())
    summary = (
        f"{len(sizes)} pairs of layers thinner, {len(ranks)} layers split in two, "
        f"{saved / total:.1%} of the linear parameters saved, {fit}"
    )
    report = StepReport("low_rank", len(chosen), summary, details)
    return state.restructured(thinner.eval(), "low_rank", plan, report)


def _singles(module: torch.nn.Module, forms: Sequence[Form]) -> Iterator[str]:
    """Layers to split by themselves: all but those of pairs that are made thinner as pairs."""
    from edgevit.compress.blocks import find_blocks
    from edgevit.compress.factor import factorable

    pairs = [b.attention for b in find_blocks(module) if b.attention and "attention" in forms]
    pairs += [b.mlp for b in find_blocks(module) if b.mlp and "mlp" in forms]
    for path in factorable(module):
        if "layers" in forms and not any(path.startswith(f"{p}.") for p in pairs):
            yield path


def _choose(
    module: torch.nn.Module,
    survey: Survey,
    judge: Judge,
    config: LowRankConfig,
    singles: Sequence[str],
    total: int,
    context: StepContext,
) -> dict[str, Cut]:
    from edgevit.compress.budget import allocate

    cuts: dict[str, list[Cut]] = {}
    context.on_progress.start("judge", "measuring what each truncation costs", len(survey.blocks) + len(singles), "parts")
    for i, block in enumerate(survey.blocks):
        if block.attention and "attention" in config.forms:
            cuts[block.attention] = _attention_cuts(module, block.attention, survey, judge, context.multiple)
        if block.mlp and "mlp" in config.forms:
            cuts[block.mlp] = _mlp_cuts(module, block.mlp, survey, judge, context.multiple)
        context.on_progress.advance("judge", i + 1)
    for i, path in enumerate(singles):
        if path in survey.sensitivity:
            cuts[path] = _layer_cuts(module, path, survey, judge, context.multiple)
        context.on_progress.advance("judge", len(survey.blocks) + i + 1)
    context.on_progress.finish("judge", f"the cost of {sum(map(len, cuts.values()))} truncations estimated")
    possible = sum(max(c.saved for c in options) for options in cuts.values() if options)
    wanted = round(total * config.ratio)
    if possible < wanted:
        raise BuildError(
            f"low_rank: ratio {config.ratio} asks for {wanted:,} of {total:,} linear parameters, and {', '.join(config.forms)} "
            f"can give {possible:,} at most (ratio {possible / max(total, 1):.2f}) with something left of each",
            hint="lower ratio, or add forms",
        )
    return allocate(cuts, wanted)


def _attention_cuts(module: torch.nn.Module, path: str, survey: Survey, judge: Judge, multiple: int) -> list[Cut]:
    from edgevit.compress.narrowing import attention_cuts

    part: Any = module.get_submodule(path)
    return attention_cuts(
        module, path, survey, judge, SHARES, multiple, "reconstruction", 3 * part.qkv.in_features + part.proj.out_features
    )


def _mlp_cuts(module: torch.nn.Module, path: str, survey: Survey, judge: Judge, multiple: int) -> list[Cut]:
    from edgevit.compress.narrowing import mlp_cuts

    part: Any = module.get_submodule(path)
    return mlp_cuts(
        module, path, survey, judge, SHARES, multiple, "reconstruction", part.fc1.in_features + part.fc2.out_features
    )


def _layer_cuts(module: torch.nn.Module, path: str, survey: Survey, judge: Judge, multiple: int) -> list[Cut]:
    """Ranks of one layer that save anything."""
    from edgevit.compress.budget import Cut, interpolate
    from edgevit.compress.factor import break_even, factored
    from edgevit.compress.narrowing import output_root, round_down

    layer: Any = module.get_submodule(path)
    outputs, inputs = layer.weight.flatten(1).shape
    ranks = range(multiple, break_even(outputs, inputs), multiple)
    if not ranks:
        return []
    root, moments = output_root(survey.sensitivity[path]), survey.moments[path]
    whole = min(outputs, inputs)
    losses = {}
    for rank in sorted({round_down(int(len(ranks) * (1 - s)), 1) * multiple for s in SHARES}):
        losses[1 - rank / whole] = judge.loss(path, factored(layer, rank, moments, root))
    return [
        Cut((r,), outputs * inputs - r * (outputs + inputs), interpolate(losses, 1 - r / whole)) for r in ranks if r < whole
    ]


def _carried_out(
    module: torch.nn.Module,
    sizes: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
    survey: Survey,
    judge: Judge,
    images: Sequence[torch.Tensor],
    config: LowRankConfig,
    context: StepContext,
) -> tuple[torch.nn.Module, str]:
    from edgevit.compress.blocks import replace_submodule
    from edgevit.compress.factor import factored
    from edgevit.compress.narrowing import narrowed, nearer, output_root, refitted
    from edgevit.compress.sequential import Goal, goal_of

    thinner, goals = narrowed(module, sizes, survey, "reconstruction")
    roots = {p: output_root(survey.sensitivity[p]) for p in ranks}
    for path, rank in ranks.items():
        layer: Any = module.get_submodule(path)
        replace_submodule(thinner, path, factored(layer, rank, survey.moments[path], roots[path]))
        if layer.weight.ndim == 2:
            goals[path] = goal_of(layer, survey.sensitivity[path].tokens)
    inside: dict[str, Goal] = {p: g for p, g in goals.items() if any(p.startswith(f"{b.path}.") for b in survey.blocks)}
    if not config.refit or not inside:
        return thinner, "fitted layer by layer"
    again = refitted(module, thinner, inside, survey, images, context.on_progress, ranks, roots)
    return nearer(judge, thinner, again)


def _describe(part: Any, cut: Cut, split: bool) -> str:
    loss = f"costs {cut.loss:.3g} nats alone"
    if split:
        outputs, inputs = part.weight.flatten(1).shape
        return f"{inputs} → {outputs} by way of {cut.size[0]}, {loss}"
    if len(cut.size) == 2:
        return f"query·key and value·projection of rank {part.head_dim} → {cut.size[1]} in each of {cut.size[0]} heads, {loss}"
    return f"{part.fc1.out_features} hidden units → {cut.size[0]}, {loss}"
