"""What prune and low_rank share: the parts of a network that can be narrower, what that costs, and carrying it out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgevit.compress.blocks import ResidualBlock, find_blocks, replace_submodule
from edgevit.compress.budget import Cut, Judge, interpolate
from edgevit.compress.factor import fill_pair
from edgevit.compress.ridge import Moments, eliminate, root_of
from edgevit.compress.sequential import Goal, goal_of, refit_in_order
from edgevit.compress.statistics import HeadMoments, Sensitivity, collect_moments, measure_sensitivity
from edgevit.compress.widths import narrow_attention, narrow_mlp
from edgevit.progress import Progress

if TYPE_CHECKING:
    import torch

CORRECTION = 1.0
"""Share of what is missing in the residual stream that a refit tries to make good."""

MOST_HIDDEN = 0.75
"""Share of an MLP's hidden units that may go."""


@dataclass(frozen=True)
class Survey:
    """All that calibration images said of a network's blocks."""

    blocks: tuple[ResidualBlock, ...]
    sensitivity: Mapping[str, Sensitivity]
    moments: Mapping[str, Moments]
    heads: Mapping[str, HeadMoments]
    orders: dict[str, torch.Tensor] = field(default_factory=dict)

    def positions(self, path: str) -> int:
        """Tokens the layer ``path`` runs on."""
        return len(self.sensitivity[path].tokens)


def survey_blocks(
    module: torch.nn.Module, images: Sequence[torch.Tensor], more: Sequence[str], on_progress: Progress
) -> Survey:
    """Sensitivities and moments of every block's layers, and of the layers ``more``."""
    blocks = tuple(find_blocks(module))
    attentions, mlps = [b.attention for b in blocks if b.attention], [b.mlp for b in blocks if b.mlp]
    readers = [f"{a}.qkv" for a in attentions] + [f"{m}.fc1" for m in mlps]
    writers = [f"{a}.proj" for a in attentions] + [f"{m}.fc2" for m in mlps]
    total, done = sum(len(b) for b in images), 0
    on_progress.start("survey", "surveying layers, twice", 2 * total, "images")

    def on_image(count: int) -> None:
        nonlocal done
        done += count
        on_progress.advance("survey", done)

    wanted = [*readers, *writers, *(p for p in more if p not in readers + writers)]
    sensitivity = measure_sensitivity(module, images, wanted, on_image)
    tokens = {p: s.tokens for p, s in sensitivity.items() if p in writers or p in more}
    queries = {a: sensitivity[f"{a}.proj"].tokens for a in attentions if f"{a}.proj" in sensitivity}
    moments, heads = collect_moments(module, images, tokens, queries, on_image)
    on_progress.finish("survey", f"{len(sensitivity)} layers surveyed on {total} images")
    ran = tuple(b for b in blocks if _ran(b, sensitivity))
    return Survey(ran, sensitivity, moments, heads)


def _ran(block: ResidualBlock, sensitivity: Mapping[str, Sensitivity]) -> bool:
    wanted = ([f"{block.attention}.proj"] if block.attention else []) + ([f"{block.mlp}.fc2"] if block.mlp else [])
    return all(w in sensitivity for w in wanted)


def output_root(sensitivity: Sensitivity) -> torch.Tensor:
    """The root of a layer's output sensitivity, scaled to mean 1."""
    return root_of(sensitivity.gram / sensitivity.gram.diagonal().mean().clamp_min(1e-30), 1e-4)[0]


def hidden_order(module: torch.nn.Module, mlp: str, survey: Survey, importance: str) -> torch.Tensor:
    """Hidden units (n,) of the MLP in the order they go."""
    import torch

    if mlp not in survey.orders:
        layer: Any = module.get_submodule(mlp)
        path = f"{mlp}.fc2"
        weight = layer.fc2.weight.double()
        if importance == "reconstruction":
            most, moments = int(len(weight[0]) * MOST_HIDDEN), survey.moments[path]
            went = eliminate(moments.covariance, output_root(survey.sensitivity[path]) @ weight, moments.ridge, most).order
            survey.orders[mlp] = torch.tensor([*went, *sorted(set(range(weight.shape[1])) - set(went))])
        else:
            survey.orders[mlp] = hidden_scores(layer, survey, path, importance).argsort()
    return survey.orders[mlp]


def hidden_scores(mlp: Any, survey: Survey, path: str, importance: str) -> torch.Tensor:
    """How much each hidden unit matters by itself, (n,)."""
    outgoing = mlp.fc2.weight.double().square().sum(0)
    if importance == "magnitude":
        return outgoing.sqrt() * mlp.fc1.weight.double().square().sum(1).sqrt()
    if importance == "taylor":
        return survey.sensitivity[path].taylor_in
    moments = survey.moments[path]
    return (moments.xx.diagonal()[:-1] / moments.weight) * outgoing


def make_mlp(module: torch.nn.Module, mlp: str, hidden: int, survey: Survey, importance: str) -> tuple[Any, torch.Tensor]:
    """(the narrower MLP, the units it keeps)."""
    order = hidden_order(module, mlp, survey, importance)
    keep = order[len(order) - hidden :].sort().values
    return narrow_mlp(module.get_submodule(mlp), keep, survey.moments[f"{mlp}.fc2"]), keep


def make_attention(
    module: torch.nn.Module, attention: str, heads: int, dim: int, survey: Survey, importance: str
) -> tuple[Any, torch.Tensor]:
    """(the narrower attention, what its qkv keeps of the old one's, (3·heads·dim, 3·old))."""
    old: Any = module.get_submodule(attention)
    order = head_scores(old, survey, attention, importance).argsort(descending=True)
    kept = sorted(int(h) for h in order[:heads])
    path = f"{attention}.proj"
    made = narrow_attention(old, kept, dim, survey.heads[attention], survey.moments[path], survey.sensitivity[path].gram)
    return made.module, made.project


def head_scores(attention: Any, survey: Survey, path: str, importance: str) -> torch.Tensor:
    """How much each head matters by itself, (heads,)."""
    import torch

    proj = f"{path}.proj"
    weight = attention.proj.weight.double()
    if importance == "magnitude":
        rows = attention.qkv.weight.double().square().sum(1).reshape(3, attention.num_heads, -1).sum((0, 2))
        return rows + weight.square().sum(0).reshape(attention.num_heads, -1).sum(1)
    if importance == "taylor":
        return survey.sensitivity[proj].taylor_in.reshape(attention.num_heads, -1).sum(1)
    behind = weight if importance == "activation" else output_root(survey.sensitivity[proj]) @ weight
    covariance, dim = survey.moments[proj].covariance, attention.head_dim
    parts = [slice(h * dim, (h + 1) * dim) for h in range(attention.num_heads)]
    return torch.stack([torch.trace(behind[:, p] @ covariance[p, p] @ behind[:, p].T) for p in parts])


def measured_losses(
    judge: Judge, path: str, whole: int, shares: Sequence[float], make: Callable[[int], torch.nn.Module], multiple: int
) -> dict[float, float]:
    """Share removed → loss, at sizes near ``shares`` of ``whole``."""
    sizes = {round_down(int(whole * (1 - s)), multiple) for s in shares}
    return {1 - n / whole: judge.loss(path, make(n)) for n in sorted(sizes) if 0 < n < whole}


def round_down(size: int, multiple: int) -> int:
    return max(size // multiple * multiple, 1 if size < multiple else multiple)


def attention_cuts(
    module: torch.nn.Module,
    path: str,
    survey: Survey,
    judge: Judge,
    shares: Sequence[float],
    multiple: int,
    importance: str,
    per_unit: int,
) -> list[Cut]:
    """All heads thinner, by steps of ``multiple``; ``per_unit`` is what one unit of width of one head saves."""
    part: Any = module.get_submodule(path)
    heads, dim = part.num_heads, part.head_dim
    losses = measured_losses(
        judge, path, dim, shares, lambda n: make_attention(module, path, heads, n, survey, importance)[0], multiple
    )
    if not losses:
        return []
    sizes = range(multiple, dim, multiple)
    return [Cut((heads, n), per_unit * heads * (dim - n), interpolate(losses, 1 - n / dim)) for n in sizes]


def head_cuts(
    module: torch.nn.Module,
    path: str,
    survey: Survey,
    judge: Judge,
    shares: Sequence[float],
    importance: str,
    per_unit: int,
) -> list[Cut]:
    """Fewer heads of the same width."""
    part: Any = module.get_submodule(path)
    heads, dim = part.num_heads, part.head_dim
    losses = measured_losses(
        judge, path, heads, shares, lambda n: make_attention(module, path, n, dim, survey, importance)[0], 1
    )
    if not losses:
        return []
    return [Cut((n, dim), per_unit * dim * (heads - n), interpolate(losses, 1 - n / heads)) for n in range(1, heads)]


def mlp_cuts(
    module: torch.nn.Module,
    path: str,
    survey: Survey,
    judge: Judge,
    shares: Sequence[float],
    multiple: int,
    importance: str,
    per_unit: int,
) -> list[Cut]:
    """Fewer hidden units, by steps of ``multiple``; ``per_unit`` is what one of them saves."""
    part: Any = module.get_submodule(path)
    hidden = part.fc1.out_features
    losses = measured_losses(judge, path, hidden, shares, lambda n: make_mlp(module, path, n, survey, importance)[0], multiple)
    if not losses:
        return []
    least = max(int(hidden * (1 - MOST_HIDDEN)), multiple)
    sizes = range(-(-least // multiple) * multiple, hidden, multiple)
    return [Cut((n,), per_unit * (hidden - n), interpolate(losses, 1 - n / hidden)) for n in sizes]


def narrowed(
    original: torch.nn.Module,
    sizes: Mapping[str, tuple[int, ...]],
    survey: Survey,
    importance: str,
) -> tuple[torch.nn.Module, dict[str, Goal]]:
    """A copy of ``original`` with attentions of (heads, width) and MLPs of (hidden,) as ``sizes`` says by path, each fitted by
    itself, and what every layer of the blocks should give."""
    import torch

    module, goals = copy.deepcopy(original), {}
    for path, size in sizes.items():
        if len(size) == 2:
            part, project = make_attention(original, path, size[0], size[1], survey, importance)
            names: tuple[tuple[str, torch.Tensor | None], ...] = (("qkv", project), ("proj", None))
        else:
            part, keep = make_mlp(original, path, size[0], survey, importance)
            units = original.get_submodule(f"{path}.fc1").weight.shape[0]
            names = (("fc1", torch.eye(units)[keep]), ("fc2", None))
        replace_submodule(module, path, part)
        for name, chosen in names:
            goals[f"{path}.{name}"] = goal_of(getattr(part, name), survey.sensitivity[f"{path}.{name}"].tokens, chosen)
    return module, goals


def nearer(judge: Judge, by_itself: torch.nn.Module, again: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The one whose answers are nearer, and in words how it and the other do."""
    first, second = judge.of(by_itself), judge.of(again)
    if second < first:
        return again, f"refitted in order ({first:.3g} → {second:.3g} nats)"
    return by_itself, f"fitted layer by layer ({first:.3g} nats; {second:.3g} when refitted in order)"


def refitted(
    original: torch.nn.Module,
    module: torch.nn.Module,
    goals: Mapping[str, Goal],
    survey: Survey,
    images: Sequence[torch.Tensor],
    on_progress: Progress,
    ranks: Mapping[str, int] | None = None,
    roots: Mapping[str, torch.Tensor] | None = None,
) -> torch.nn.Module:
    """A copy of ``module`` with the layers of ``goals`` refitted in order; those of ``ranks`` are pairs, truncated anew with
    ``roots`` of their output sensitivity."""
    changed = copy.deepcopy(module)

    def commit(path: str, weight: torch.Tensor, bias: torch.Tensor, moments: Moments) -> None:
        layer: Any = changed.get_submodule(path)
        if ranks and roots and path in ranks:
            fill_pair(layer, weight, bias if layer[1].bias is not None else None, moments, roots[path])
            return
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)

    refit_in_order(original, changed, survey.blocks, images, goals, CORRECTION, commit, on_progress)
    return changed
