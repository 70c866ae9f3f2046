"""The merge_tokens step: tokens that look alike become one on the way through a Vision Transformer, with no training.

Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023): tokens are split in two by turns, each of the first finds the
one of the second whose attention keys are most alike, and the most alike pairs merge; attention counts a merged token by the
patches it stands for, and so does a mean over tokens. Here, beyond the paper, what the answer looks at is spared: the
attention that the class token pays to a token holds it back from merging, and weighs it in what it merges into. Both come
with the block's own attention, so no image is needed beforehand.

Every shape is static and the choice is carried out by products with one-hot matrices, so that both exporters write it with
plain kernels: no scatter, no sort of indices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from device_agents.wire import StepReport
from edgevit.compress import Compressed, Json, StepContext, step
from edgevit.compress.attend import attend
from edgevit.compress.config import StepConfig
from edgevit.compress.merge_choices import settle
from edgevit.errors import BuildError
from edgevit.macs import count_macs

if TYPE_CHECKING:
    import torch

AT = (0.27, 0.45, 0.64)
"""Where ``ratio`` merges, as shares of the depth: rarely, since every merge interrupts a runtime's fast path, and not before
tokens know their surroundings. Among the least damaging of 31 schedules of a third fewer MACs of DeiT-Tiny, by KL on training
images."""


PATCH = 0.2
"""A token weighs as much as it is looked at, × the mean, and so much more for each patch it stands for. A pair costs what its
keys differ by × the root of the weight of the one that goes, and merges into its weighted mean. Chosen by KL on training images
of DeiT-Tiny; docs/study.md has what else was tried."""


class MergeTokensConfig(StepConfig):
    """``merge_tokens:`` of a recipe."""

    merge: dict[int, int] | None = Field(
        default=None, description="block, counted from 0 → how many tokens are merged away in it, between attention and MLP"
    )
    r: int | None = Field(default=None, ge=1, description="so many tokens in every block")
    ratio: float | None = Field(default=None, gt=0, lt=1, description="share of the MACs to save, in few merges")

    @model_validator(mode="after")
    def _exactly_one(self) -> MergeTokensConfig:
        given = [name for name in ("merge", "r", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"merge_tokens: got {' and '.join(given) or 'nothing'}, expected one of merge, r, ratio")
        if self.merge is not None and (not self.merge or min(self.merge.values()) < 1 or min(self.merge) < 0):
            raise ValueError(f"merge_tokens: merge is {self.merge}, expected blocks from 0, each with 1 token or more")
        return self

    def out_of_place(self, before: Sequence[str]) -> str:
        if "merge_tokens" in before:
            return "and merge_tokens stands before it already: one step says all merges"
        return ""


def applies_to(module: torch.nn.Module) -> str:
    """Why tokens of ``module`` cannot be merged, or nothing: it must be timm's plain Vision Transformer, whose blocks see all
    tokens at once and whose shape nothing else depends on."""
    import torch

    from edgevit.torchsetup import import_timm

    import_timm()
    from timm.models.vision_transformer import Block, VisionTransformer

    name = type(module).__name__
    if not isinstance(module, VisionTransformer):
        return f"tokens of {name} lie on a grid that its windows or convolutions need; only plain Vision Transformers merge"
    if not isinstance(module.blocks, torch.nn.Sequential):
        return f"the blocks of this {name} are not a plain sequence"
    for i, block in enumerate(module.blocks):
        if not isinstance(block, Block):
            return f"block {i} of this {name} is a {type(block).__name__}, expected timm's plain Block"
        missing = [part for part in ("qkv", "proj", "num_heads", "head_dim", "scale") if not hasattr(block.attn, part)]
        if missing:
            return f"the attention of block {i} is a {type(block.attn).__name__} without {', '.join(missing)}"
        if getattr(block.attn, "gate", None) is not None:
            return f"the attention of block {i} is gated"
    if getattr(module, "attn_pool", None) is not None:
        return f"this {name} ends in attention pooling, which would count merged tokens once"
    if module.global_pool not in ("", "token", "avg"):
        return f"this {name} pools its tokens by {module.global_pool!r}, which would count merged tokens once"
    return ""


def is_merging(block: Any) -> bool:
    """Whether ``block`` is one of those that :func:`restructure` made: called with tokens, sizes, count and layout."""
    return isinstance(block, _classes()[1])


def tokens_read(module: Any) -> int:
    """How many of its first tokens a Vision Transformer's answer is read from; 0 for all of its tokens."""
    if module.global_pool != "token":
        return 0
    # The distilled models read their first two tokens; behind any others nothing is read but the first.
    return int(module.num_prefix_tokens) if hasattr(module, "head_dist") else 1


def restructure(module: Any, plan: Json) -> torch.nn.Module:
    """``module`` with blocks that merge as ``plan["merge"]``, pairs of block and tokens, says; the weights keep their names."""
    blocks_class, block_class, attention_class, mean_class = _classes()
    sizes, schedule = _Sizes(), dict(plan["merge"])
    for block in list(module.blocks)[min(schedule) :]:
        # Their own classes, called as modules: exporters name a layer by the modules it was called through.
        block.__class__, block.attn.__class__ = block_class, attention_class
    layout = _Layout(module.num_prefix_tokens, tokens_read(module))
    module.blocks = blocks_class(list(module.blocks), schedule, layout, sizes)
    if module.global_pool == "avg":
        # timm calls what stands here with the tokens that it would have averaged.
        module.attn_pool = mean_class(sizes, 0 if module.pool_include_prefix else module.num_prefix_tokens)
    result: torch.nn.Module = module
    return result


@step(MergeTokensConfig, restructure=restructure)
def merge_tokens(state: Compressed, config: MergeTokensConfig, context: StepContext) -> Compressed:
    """Merge tokens as ``config`` says. Raises :class:`BuildError` where the model has no tokens to merge, for a block there is
    none of, and for more tokens than can be paired."""
    reason = applies_to(state.module)
    if reason:
        raise BuildError(
            f"merge_tokens cannot apply: {reason}",
            hint="leave the step out; `edgevit recipes` lists the recipes that have none",
        )
    module: Any = copy.deepcopy(state.module)
    prefix, tokens = int(module.num_prefix_tokens), count_tokens(module, state)
    schedule = _schedule(config, module, state, tokens, prefix)
    counts = token_counts(schedule, len(module.blocks), tokens, prefix)
    plan = {"merge": sorted(schedule.items())}
    merged = restructure(module, plan)
    details = {f"blocks.{i}": f"{before} → {after} tokens" for i, (before, after) in enumerate(counts) if before != after}
    summary = f"{tokens} → {counts[-1][1]} tokens, in {len(schedule)} of {len(counts)} blocks"
    return state.restructured(merged, "merge_tokens", plan, StepReport("merge_tokens", len(schedule), summary, details))


def count_tokens(module: Any, state: Compressed) -> int:
    """Tokens that enter the first block, class and register tokens among them."""
    import torch

    seen: list[int] = []
    handle = module.blocks[0].register_forward_pre_hook(lambda layer, args: seen.append(int(args[0].shape[1])))
    try:
        with torch.no_grad():
            module(torch.zeros(1, 3, state.preprocessing.height, state.preprocessing.width))
    finally:
        handle.remove()
    return seen[0]


def _schedule(config: MergeTokensConfig, module: Any, state: Compressed, tokens: int, prefix: int) -> dict[int, int]:
    depth = len(module.blocks)
    if config.merge is not None:
        return dict(config.merge)
    if config.r is not None:
        return _every_block(config.r, depth, tokens, prefix)
    saving = round((config.ratio or 0.0) * count_macs(module, state.preprocessing))
    return fit_schedule(saving, block_costs(module), tokens, prefix)


def _every_block(r: int, depth: int, tokens: int, prefix: int) -> dict[int, int]:
    """``r`` tokens in each block, as in the paper: fewer where fewer than half of the tokens are left to go."""
    schedule, left = {}, tokens - prefix
    for i in range(depth):
        merged = min(r, left // 2)
        if merged:
            schedule[i] = merged
        left -= merged
    return schedule


def token_counts(schedule: Mapping[int, int], depth: int, tokens: int, prefix: int) -> list[tuple[int, int]]:
    """(tokens into, tokens out of) each block. Raises :class:`BuildError` for a block there is none of, and where more than
    half of the tokens would go at once: each pairs with one of the other half."""
    beyond = [i for i in schedule if i >= depth]
    if beyond:
        raise BuildError(f"merge_tokens: block {beyond[0]}, expected 0 … {depth - 1}: the model has {depth} blocks")
    counts = []
    for i in range(depth):
        merged = schedule.get(i, 0)
        most = (tokens - prefix) // 2
        if merged > most:
            raise BuildError(
                f"merge_tokens: {merged} tokens in block {i}, expected at most {most}: half of the {tokens - prefix} there"
            )
        counts.append((tokens, tokens - merged))
        tokens -= merged
    return counts


@dataclass(frozen=True)
class BlockCost:
    """MACs of one block: ``attention`` and ``mlp`` a token, ``pair`` a pair of tokens; merging works on tokens ``width`` wide
    by keys ``key`` wide."""

    attention: int
    pair: int
    mlp: int
    width: int
    key: int

    def macs(self, before: int, after: int, prefix: int) -> int:
        """With ``before`` tokens in and ``after`` tokens out, ``prefix`` of which never merge."""
        plain = self.attention * before + self.pair * before * before + self.mlp * after
        if before == after:
            return plain
        count, second = before - after, (before - prefix) // 2
        first = before - prefix - second
        choice = first * second * (self.key + count)
        return plain + choice + (first * first + second * count) * (self.width + 2)


def block_costs(module: Any) -> list[BlockCost]:
    """What each block of a Vision Transformer costs."""
    import torch

    def linear(part: Any) -> int:
        return sum(m.weight.numel() for m in part.modules() if isinstance(m, torch.nn.Linear))

    return [
        BlockCost(linear(b.attn), 2 * width, linear(b.mlp), module.embed_dim, width)
        for b, width in ((b, b.attn.num_heads * b.attn.head_dim) for b in module.blocks)
    ]


def block_macs(costs: Sequence[BlockCost], counts: Sequence[tuple[int, int]], prefix: int) -> int:
    """MACs of all blocks with these token counts into and out of them."""
    return sum(cost.macs(before, after, prefix) for cost, (before, after) in zip(costs, counts, strict=True))


def fit_schedule(saving: int, costs: Sequence[BlockCost], tokens: int, prefix: int) -> dict[int, int]:
    """The fewest tokens merged in equal shares at :data:`AT` that save so many MACs. Raises :class:`BuildError` where merging
    half of the tokens each time does not save as much."""
    depth = len(costs)
    places = sorted({min(depth - 1, round(share * (depth - 1))) for share in AT})
    whole = block_macs(costs, token_counts({}, depth, tokens, prefix), prefix)
    for each in range(1, (tokens - prefix) // 2 + 1):
        schedule, left = {}, tokens - prefix
        for place in places:
            schedule[place] = min(each, left // 2)
            left -= schedule[place]
        if whole - block_macs(costs, token_counts(schedule, depth, tokens, prefix), prefix) >= saving:
            return schedule
    raise BuildError(
        f"merge_tokens: merges in blocks {', '.join(map(str, places))} cannot save as much as the ratio asks for",
        hint="a smaller ratio, or r: N for merges in every block",
    )


def merge(
    x: torch.Tensor, metric: torch.Tensor, attention: torch.Tensor, sizes: torch.Tensor | None, count: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N, C) tokens and their sizes (B, N, 1) → (B, N − count, C) and (B, N − count, 1), by bipartite soft matching.

    ``metric`` (B, N, D) says which tokens are alike, ``attention`` (B, N, 1) how much each is looked at; ``sizes`` None counts
    every token once. The first ``prefix`` tokens are left alone. Token order changes: positions were added long before.
    """
    import torch

    if sizes is None:
        sizes = torch.ones_like(x[:, :, :1])
    patches, attention = sizes[:, prefix:], attention[:, prefix:]
    weights = attention / attention.mean(1, keepdim=True) + PATCH * patches
    width = x.shape[-1]
    # Side by side, so that the choice is carried out once for all of them.
    first, second = _alternate(torch.cat([x[:, prefix:] * weights, weights, patches], -1))
    ours, theirs = _alternate(torch.nn.functional.normalize(metric[:, prefix:], dim=-1))
    best, partner = (ours @ theirs.transpose(1, 2)).max(-1)
    gain = (best - 1) * first[:, :, width].sqrt()
    half, other = ours.shape[1], theirs.shape[1]
    ranked, partner = settle(gain, gain.topk(half, dim=1).indices, partner)
    order = _one_hot(ranked, half, x.dtype)
    going, staying = order[:, :count], order[:, count:]
    target = (going @ _one_hot(partner, other, x.dtype)).transpose(1, 2)
    merged = torch.cat([staying @ first, second + target @ (going @ first)], 1)
    tokens, counted = merged[:, :, :width] / merged[:, :, width : width + 1], merged[:, :, width + 1 :]
    return torch.cat([x[:, :prefix], tokens], 1), torch.cat([sizes[:, :prefix], counted], 1)


def attention_paid(shares: torch.Tensor, read: int, batch: int) -> torch.Tensor:
    """(B, N, 1): how much each token is looked at by the first ``read`` tokens (0: by all), the mean over them and the heads.
    ``shares`` as of :func:`~edgevit.compress.attend.attend`."""
    rows = shares[..., :read, :] if read else shares
    return rows.flatten(-3, -2).mean(-2).reshape(batch, -1, 1)


def _alternate(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N, D) → every other token (B, ⌈N/2⌉, D) and the others (B, ⌊N/2⌋, D). Two tokens are laid side by side and cut apart:
    a slice with a stride is what XNNPACK does not take, and TFLite's own is many times slower."""
    import torch

    batch, count, width = tokens.shape
    second = count // 2
    pairs = tokens[:, : 2 * second].reshape(batch, second, 2 * width)
    first = pairs[:, :, :width]
    if count % 2:
        first = torch.cat([first, tokens[:, 2 * second :]], 1)
    return first, pairs[:, :, width:]


def _one_hot(indices: torch.Tensor, classes: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    return (indices.unsqueeze(-1) == torch.arange(classes, device=indices.device)).to(dtype)


@dataclass(frozen=True)
class _Layout:
    """``prefix`` tokens stand before those that may merge; the answer is read from the first ``read``, 0 for all."""

    prefix: int
    read: int


@dataclass
class _Sizes:
    """The sizes (B, N, 1) of the tokens that left the blocks last: a mean over tokens needs them behind the final norm."""

    last: torch.Tensor | None = None


def __getattr__(name: str) -> Any:
    """The module classes of this step by name: pickle finds them here when a module is sent to another process."""
    if name in ("MergingBlocks", "MergingBlock", "MergingAttention", "SizedMean"):
        return next(c for c in _classes() if c.__name__ == name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@lru_cache(maxsize=1)
def _classes() -> tuple[Any, Any, Any, Any]:
    """The module classes of this step, made when torch is first needed."""
    import torch

    from edgevit.torchsetup import import_timm

    import_timm()
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    class MergingBlocks(torch.nn.Sequential):  # type: ignore[misc]
        """timm Blocks of which some merge tokens between attention and MLP; sizes of tokens go along."""

        def __init__(self, blocks: Sequence[Any], schedule: Mapping[int, int], layout: _Layout, sizes: _Sizes) -> None:
            super().__init__(*blocks)
            self.schedule, self.layout, self.sizes = dict(schedule), layout, sizes

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes: torch.Tensor | None = None
            for i, block in enumerate(self):
                if i < min(self.schedule):
                    x = block(x)
                else:
                    x, sizes = block(x, sizes, self.schedule.get(i, 0), self.layout)
            self.sizes.last = sizes
            return x

    class MergingBlock(Block):  # type: ignore[misc]
        """timm's Block on tokens with sizes, of which ``count`` merge between attention and MLP."""

        def forward(self, x: torch.Tensor, sizes: torch.Tensor | None, count: int, layout: _Layout) -> Any:
            mixed, keys, shares = self.attn(self.norm1(x), sizes)
            x = x + self.drop_path1(self.ls1(mixed))
            if count:
                paid = attention_paid(shares, layout.read, len(x))
                x, sizes = merge(x, keys, paid, sizes, count, layout.prefix)
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), sizes

    class MergingAttention(Attention):  # type: ignore[misc]
        """timm's Attention on tokens with sizes; gives keys and shares as well."""

        def forward(self, x: torch.Tensor, sizes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return attend(self, x, sizes)

    class SizedMean(torch.nn.Module):  # type: ignore[misc]
        """The mean over (B, N, C) tokens behind ``skip`` others, each counted as often as it was merged: (B, C)."""

        def __init__(self, sizes: _Sizes, skip: int) -> None:
            super().__init__()
            self.sizes, self.skip = sizes, skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.sizes.last is None:
                return x.mean(1)
            sizes = self.sizes.last[:, self.skip :]
            return (x * sizes).sum(1) / sizes.sum(1)

    made = (MergingBlocks, MergingBlock, MergingAttention, SizedMean)
    for one in made:
        one.__qualname__ = one.__name__
    return made
