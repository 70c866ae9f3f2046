"""The prune step: fewer or thinner attention heads, fewer hidden units, fewer blocks, under one budget of MACs.

Each cut is followed in closed form by what is left: kept hidden units take over what the removed ones carried, queries and keys
keep the best approximation of their product. No labels and no training. The target ``channels`` is another road to the same
end, for hybrids: :mod:`edgevit.compress.channel_cuts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from device_agents.wire import StepReport
from edgevit.compress import Compressed, Json, StepContext, step
from edgevit.compress.config import StepConfig
from edgevit.errors import BuildError

if TYPE_CHECKING:
    import torch

    from edgevit.compress.blocks import ResidualBlock
    from edgevit.compress.budget import Cut, Judge
    from edgevit.compress.narrowing import Survey

Target = Literal["heads", "head_width", "mlp", "blocks", "channels"]
Importance = Literal["reconstruction", "activation", "taylor", "magnitude"]

SHARES = (0.25, 0.5)
"""Shares of a part at which its cost is measured; between them it is interpolated."""


class PruneConfig(StepConfig):
    """``prune:`` of a recipe."""

    images: int = Field(default=128, ge=16, le=4096, description="calibration images for statistics, refits and judging")
    ratio: float = Field(gt=0, lt=1, description="share of the model's MACs to remove")
    targets: tuple[Target, ...] = Field(
        default=("head_width", "mlp"),
        min_length=1,
        description="what may go: whole heads, width of heads, hidden units, blocks; or, alone, channels: whatever widths "
        "Torch-Pruning can follow through the model, embeddings and convolutions among them (extra prune)",
    )
    importance: Importance = Field(
        default="reconstruction",
        description="which units go first: by the error left once the others took over (reconstruction), by the energy of "
        "their output, by its first-order effect on the answer (taylor), or by their weights alone",
    )
    refit: bool = Field(default=True, description="refit the remaining layers in order, where that brings the answers nearer")

    NOT_AFTER: ClassVar[Mapping[str, str]] = {
        "prune": "expected one prune step with the whole ratio",
        "low_rank": "expected it before: the factors of a layer have no units of their own",
        "merge_tokens": "expected it before: its costs are measured on all tokens",
    }

    @model_validator(mode="after")
    def _channels_alone(self) -> PruneConfig:
        if "channels" in self.targets and len(self.targets) > 1:
            others = ", ".join(t for t in self.targets if t != "channels")
            raise ValueError(
                f"prune: got the targets channels and {others}, expected channels alone: they run through the others"
            )
        return self

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def variety(self) -> str:
        return "channels" if "channels" in self.targets else ""


def applies_to(module: torch.nn.Module, variety: str = "") -> str:
    """Why ``module`` cannot be pruned, or nothing. Which widths can be pruned as ``channels`` shows only when it is traced."""
    from edgevit.compress.blocks import find_blocks

    if variety == "channels" or find_blocks(module):
        return ""
    return f"prune cuts timm attentions and MLPs of linear layers, and {type(module).__name__} has neither"


def restructure(module: torch.nn.Module, plan: Json) -> torch.nn.Module:
    """``plan`` = {"sizes": {path: [heads, width] | [hidden]}, "blocks": [path, …], "widths": {path: {side: size}}}:
    ``module`` in that shape."""
    import torch

    from edgevit.compress.blocks import replace_submodule
    from edgevit.compress.channels import cut
    from edgevit.compress.widths import attention_of_shape, mlp_of_shape

    for path, size in plan["sizes"].items():
        part = module.get_submodule(path)
        made = attention_of_shape(part, *size) if len(size) == 2 else mlp_of_shape(part, *size)
        replace_submodule(module, path, made)
    for path in plan["blocks"]:
        replace_submodule(module, path, torch.nn.Identity())
    return cut(module, {path: {s: list(range(n)) for s, n in sides.items()} for path, sides in plan["widths"].items()})


@step(PruneConfig, restructure=restructure)
def prune(state: Compressed, config: PruneConfig, context: StepContext) -> Compressed:
    """Remove ``config.ratio`` of the MACs. Raises :class:`BuildError` where the targets cannot give as much or there are
    none, :class:`DataError` without real images."""
    import copy

    import torch

    from edgevit.compress.blocks import replace_submodule
    from edgevit.compress.budget import Judge, split_judged
    from edgevit.compress.calibrate import normalise
    from edgevit.compress.narrowing import narrowed, nearer, refitted, survey_blocks
    from edgevit.macs import count_macs

    reason = applies_to(state.module, config.variety)
    if reason:
        raise BuildError(reason, hint="leave the prune step out, or prune channels: docs/recipes.md")
    if config.variety == "channels":
        from edgevit.compress.channel_cuts import prune_channels

        return prune_channels(state, config, context)
    images, judged = split_judged(normalise(context.real_images("prune")[: config.images], state.preprocessing))
    macs = count_macs(state.module, state.preprocessing)
    module = copy.deepcopy(state.module).eval().requires_grad_(False)
    survey = survey_blocks(module, images, [], context.on_progress)
    judge = Judge(module, survey.blocks, judged)
    chosen = _choose(module, survey, judge, config, round(macs * config.ratio), macs, context)
    gone = [p for p, cut in chosen.items() if not cut.size]
    sizes = {p: cut.size for p, cut in chosen.items() if cut.size}
    pruned, goals = narrowed(module, sizes, survey, config.importance)
    for path in gone:
        replace_submodule(pruned, path, torch.nn.Identity())
    fit = "fitted layer by layer"
    if config.refit and not gone:
        again = refitted(module, pruned, goals, survey, images, context.on_progress)
        pruned, fit = nearer(judge, pruned, again)
    plan = {"sizes": {p: list(s) for p, s in sizes.items()}, "blocks": gone, "widths": {}}
    details = {p: _describe(state.module.get_submodule(p), cut) for p, cut in chosen.items()}
    saved = sum(cut.saved for cut in chosen.values())
    summary = f"{len(chosen)} parts narrower by {config.importance}, {saved / macs:.1%} of the MACs removed, {fit}"
    return state.restructured(pruned.eval(), "prune", plan, StepReport("prune", len(chosen), summary, details))


def _choose(
    module: torch.nn.Module, survey: Survey, judge: Judge, config: PruneConfig, wanted: int, macs: int, context: StepContext
) -> dict[str, Cut]:
    import torch

    from edgevit.compress.budget import Cut, allocate, most_saved

    cuts: dict[str, list[Cut]] = {}
    context.on_progress.start("judge", "measuring what each cut costs", len(survey.blocks), "blocks")
    for i, block in enumerate(survey.blocks):
        if block.attention and {"heads", "head_width"} & set(config.targets):
            cuts[block.attention] = _attention_cuts(module, block.attention, survey, judge, config, context.multiple)
        if block.mlp and "mlp" in config.targets:
            cuts[block.mlp] = _mlp_cuts(module, block.mlp, survey, judge, config, context.multiple)
        if block.plain and "blocks" in config.targets:
            saved = _block_macs(module, block, survey)
            cuts[block.path] = [Cut((), saved, judge.loss(block.path, torch.nn.Identity()))]
        context.on_progress.advance("judge", i + 1)
    context.on_progress.finish("judge", f"the cost of {sum(map(len, cuts.values()))} cuts measured")
    whole = [b.path for b in survey.blocks if b.path in cuts]
    if whole:
        del cuts[max(whole, key=lambda p: cuts[p][0].loss)]  # Of blocks alone, one has to stay.
    possible = most_saved(cuts)
    if possible < wanted:
        raise BuildError(
            f"prune: ratio {config.ratio} asks for {wanted:,} of {macs:,} MACs, and {', '.join(config.targets)} "
            f"can give {possible:,} at most (ratio {possible / macs:.2f}) with something left of each",
            hint="lower ratio, or add targets",
        )
    return allocate(cuts, wanted)


def _block_macs(module: torch.nn.Module, block: ResidualBlock, survey: Survey) -> int:
    attention: Any = module.get_submodule(block.attention)
    mlp: Any = module.get_submodule(block.mlp)
    tokens = survey.positions(f"{block.attention}.qkv")
    linear = sum(layer.weight.numel() for layer in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2))
    return int(tokens * (linear + 2 * tokens * attention.attn_dim))


def _attention_cuts(
    module: torch.nn.Module, path: str, survey: Survey, judge: Judge, config: PruneConfig, multiple: int
) -> list[Cut]:
    from edgevit.compress.narrowing import attention_cuts, head_cuts

    part: Any = module.get_submodule(path)
    tokens = survey.positions(f"{path}.qkv")
    per_unit = tokens * (3 * part.qkv.in_features + part.proj.out_features + 2 * tokens)
    cuts = []
    if "head_width" in config.targets:
        cuts += attention_cuts(module, path, survey, judge, SHARES, multiple, config.importance, per_unit)
    if "heads" in config.targets:
        cuts += head_cuts(module, path, survey, judge, SHARES, config.importance, per_unit)
    return cuts


def _mlp_cuts(
    module: torch.nn.Module, path: str, survey: Survey, judge: Judge, config: PruneConfig, multiple: int
) -> list[Cut]:
    from edgevit.compress.narrowing import mlp_cuts

    part: Any = module.get_submodule(path)
    per_unit = survey.positions(f"{path}.fc1") * (part.fc1.in_features + part.fc2.out_features)
    return mlp_cuts(module, path, survey, judge, SHARES, multiple, config.importance, per_unit)


def _describe(part: Any, cut: Cut) -> str:
    loss = f"costs {cut.loss:.3g} nats alone"
    if not cut.size:
        return f"removed, {loss}"
    if len(cut.size) == 2:
        return f"{part.num_heads} heads of {part.head_dim} → {cut.size[0]} of {cut.size[1]}, {loss}"
    return f"{part.fc1.out_features} hidden units → {cut.size[0]}, {loss}"
