"""Widths of a network that Torch-Pruning's dependency graph can follow through it (Fang et al., "DepGraph", CVPR 2023):
channels of convolutions, widths of embeddings, hidden units, each with every layer that has to become narrower along.

The graph is traced, not known: a reshape that it misreads leaves a module that runs and answers nonsense. So nothing is cut
along a width before it is proven on this very model: the narrowed module gives what the whole one gives when the layers that
read the width ignore what went.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgevit.errors import BuildError, MissingExtra

if TYPE_CHECKING:
    import torch

Kept = dict[str, dict[str, list[int]]]
"""Path of a layer or parameter → side of it → indices that stay. Sides are ``in`` and ``out`` of linear layers and
convolutions, ``both`` of norms and depthwise convolutions, and ``0``, ``1`` … for that dimension of a parameter."""

TOLERANCE = 1e-6
"""Of the largest output in float64: further apart, a narrowed module does something else."""


@dataclass(frozen=True)
class Place:
    """One side of one layer that a width runs through: ``units`` are (unit of the width, index there)."""

    path: str
    side: str
    units: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Width:
    """``size`` units that one layer gives, after which it is named, and all places they run through."""

    name: str
    size: int
    places: tuple[Place, ...]

    @property
    def readers(self) -> tuple[Place, ...]:
        """Where linear layers and convolutions read it."""
        return tuple(p for p in self.places if p.side == "in")


def import_torch_pruning() -> Any:
    """The package, or :class:`MissingExtra`."""
    try:
        import torch_pruning
    except ModuleNotFoundError as e:
        if e.name != "torch_pruning":
            raise
        raise MissingExtra("torch-pruning (pruning channels)", "prune") from e
    return torch_pruning


def find_widths(module: torch.nn.Module, image: torch.Tensor) -> list[Width]:
    """Every width of ``module`` that its dependency graph names, traced on ``image`` (1, 3, H, W), proven or not.

    Raises :class:`BuildError` where Torch-Pruning cannot trace the module, :class:`MissingExtra` without it.
    """
    import torch

    pruning = import_torch_pruning()
    traced = copy.deepcopy(module).eval().requires_grad_(True)
    try:
        with torch.enable_grad():
            graph = pruning.DependencyGraph().build_dependency(traced, image.clone().requires_grad_(True), verbose=False)
            groups = list(graph.get_all_groups())
    except Exception as e:  # a tracer of arbitrary modules raises arbitrary exceptions
        raise BuildError(
            f"Torch-Pruning cannot follow the widths of {type(module).__name__}: {type(e).__name__}: {_first_line(e)}",
            hint="prune other targets than channels, or leave the step out",
        ) from e
    layers: dict[int, str] = {id(m): path for path, m in traced.named_modules()}
    parameters = {id(p): path for path, p in traced.named_parameters()}
    return [w for w in (_width_of(graph, group, layers, parameters) for group in groups) if w is not None]


def _width_of(graph: Any, group: Any, layers: Mapping[int, str], parameters: Mapping[int, str]) -> Width | None:
    import torch

    places = []
    for i in range(len(group)):
        item = group[i]
        target, units = item.dep.target.module, tuple(zip(item.root_idxs, item.idxs, strict=True))
        if isinstance(target, torch.nn.Parameter):
            places.append(Place(parameters[id(target)], str(item.dep.target.pruning_dim % target.ndim), units))
        elif id(target) in layers and _is_layer(target):
            side = "both" if _passes(target) else "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            places.append(Place(layers[id(target)], side, units))
    root = group[0]
    width = Width(layers[id(root.dep.target.module)], len(root.idxs), tuple(places))
    return width if width.readers else None  # the answer itself is read by no layer


def _is_layer(module: Any) -> bool:
    import torch

    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._BatchNorm)
    return isinstance(module, (*kinds, torch.nn.LayerNorm, torch.nn.GroupNorm)) or any(
        True for _ in module.parameters(recurse=False)
    )


def _passes(layer: Any) -> bool:
    """Whether ``layer`` keeps channels apart, so that they go on both sides at once."""
    import torch

    if isinstance(layer, torch.nn.modules.conv._ConvNd):
        return bool(layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels)
    return not isinstance(layer, torch.nn.Linear)


def kept_where(module: torch.nn.Module, widths: Sequence[Width], stays: Mapping[str, Sequence[int]]) -> Kept:
    """What stays where once of each width named in ``stays`` those units alone are left."""
    gone: dict[tuple[str, str], set[int]] = {}
    for width in widths:
        if width.name in stays:
            left = set(stays[width.name])
            for place in width.places:
                there = {index for unit, index in place.units if unit not in left}
                gone.setdefault((place.path, place.side), set()).update(there)
    kept: Kept = {}
    for (path, side), removed in gone.items():
        size = _size(module, path, side)
        kept.setdefault(path, {})[side] = [i for i in range(size) if i not in removed]
    return kept


def _size(module: torch.nn.Module, path: str, side: str) -> int:
    import torch

    if side.isdigit():
        return int(module.get_parameter(path).shape[int(side)])
    layer: Any = module.get_submodule(path)
    if isinstance(layer, torch.nn.LayerNorm):
        return int(layer.normalized_shape[-1])
    names = {"in": ("in_features", "in_channels"), "out": ("out_features", "out_channels")}
    for name in names.get(side, ("num_features", "num_channels", "out_channels")):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    raise BuildError(f"{path} is a {type(layer).__name__}, which has no width that can be cut")


def cut(module: torch.nn.Module, kept: Kept) -> torch.nn.Module:
    """``module`` (which is changed) with what is ``kept`` alone. Raises :class:`BuildError` for what cannot be narrowed."""
    import torch

    for path, sides in kept.items():
        for side, left in sides.items():
            if not left:
                raise BuildError(f"nothing would be left of {path}")
            indices = torch.tensor(left)
            if side.isdigit():
                parent, _, name = path.rpartition(".")
                whole = module.get_parameter(path)
                setattr(module.get_submodule(parent), name, _frozen(whole.index_select(int(side), indices)))
            else:
                _cut_layer(path, module.get_submodule(path), side, indices)
    return module


def _cut_layer(path: str, layer: Any, side: str, left: torch.Tensor) -> None:
    import torch

    if isinstance(layer, torch.nn.Linear):
        name = {"in": "in_features", "out": "out_features"}[side]
    elif isinstance(layer, torch.nn.Conv2d) and (layer.groups == 1 or side == "both"):
        name = {"in": "in_channels", "out": "out_channels", "both": "groups"}[side]
    elif isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
        name = "num_features"
        for statistic in ("running_mean", "running_var"):
            if getattr(layer, statistic) is not None:
                setattr(layer, statistic, getattr(layer, statistic)[left].clone())
    elif isinstance(layer, torch.nn.GroupNorm) and layer.num_groups == 1:
        name = "num_channels"
    elif isinstance(layer, torch.nn.LayerNorm) and len(layer.normalized_shape) == 1:
        name = "normalized_shape"
    else:
        groups = getattr(layer, "groups", getattr(layer, "num_groups", 1))
        raise BuildError(f"{path} is a {type(layer).__name__}{f' of {groups} groups' if groups > 1 else ''}")
    dimension = 1 if side == "in" else 0
    if layer.weight is not None:
        layer.weight = _frozen(layer.weight.index_select(dimension, left))
    if layer.bias is not None and side != "in":
        layer.bias = _frozen(layer.bias[left])
    setattr(layer, name, (len(left),) if name == "normalized_shape" else len(left))
    if side == "both" and isinstance(layer, torch.nn.Conv2d):
        layer.in_channels = layer.out_channels = len(left)


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    import torch

    return torch.nn.Parameter(tensor.detach().clone(), requires_grad=False)


def why_unproven(module: torch.nn.Module, width: Width, image: torch.Tensor) -> str:
    """Why ``width`` must not be cut, or nothing where it is proven, by half of its units drawn at random, in float64.

    The one side is ``module`` with the readers' weights for those units set to zero, the other ``module`` without the units.
    What normalises over the width itself has to take its mean and deviation from the first, where all units are.
    """
    import torch

    for place in width.readers:
        if sorted(unit for unit, _ in place.units) != list(range(width.size)):
            return f"{place.path} reads it otherwise than unit by unit"
    generator = torch.Generator().manual_seed(0)
    stays = sorted(torch.randperm(width.size, generator=generator)[: width.size // 2].tolist())
    deaf, narrow = copy.deepcopy(module).double(), copy.deepcopy(module).double()
    image = image.double()
    norms = [p.path for p in width.places if p.side == "both" and _normalises(module.get_submodule(p.path))]
    try:
        _silence(deaf, width, set(stays))
        cut(narrow, kept_where(module, [width], {width.name: stays}))
        with torch.no_grad(), _recorded(deaf, norms) as seen:
            expected = deaf(image)
        with torch.no_grad(), _replayed(narrow, seen):
            given = narrow(image)
    except BuildError as e:
        return str(e)
    except Exception as e:  # noqa: BLE001 -- whatever code a model has runs on shapes it was not written for
        return f"narrowed, the module fails: {type(e).__name__}: {_first_line(e)}"
    if given.shape != expected.shape:
        return "it is as wide as the answer"
    apart = float((given - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return "" if apart <= TOLERANCE else f"narrowed, the module computes something else (apart by {apart:.1g})"


def _silence(module: torch.nn.Module, width: Width, stays: set[int]) -> None:
    """Readers of ``width`` in ``module`` hear the units ``stays`` alone."""
    for place in width.readers:
        reader: Any = module.get_submodule(place.path)
        if getattr(reader, "groups", 1) > 1:
            raise BuildError(f"{place.path} reads it as a {type(reader).__name__} of {reader.groups} groups")
        reader.weight = _frozen(reader.weight)
        reader.weight[:, [index for unit, index in place.units if unit not in stays]] = 0


def _normalises(layer: Any) -> bool:
    import torch

    return isinstance(layer, (torch.nn.LayerNorm, torch.nn.GroupNorm))


Statistics = dict[str, list[tuple["torch.Tensor", "torch.Tensor"]]]


@contextlib.contextmanager
def _recorded(module: torch.nn.Module, norms: Sequence[str]) -> Iterator[Statistics]:
    """Mean and reciprocal deviation of every call of the ``norms``, while the context lasts."""
    seen: Statistics = {path: [] for path in norms}

    def keep(path: str) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            for axes in ((-1,), (1,), tuple(range(1, args[0].ndim))):
                mean = args[0].mean(axes, keepdim=True)
                scale = (args[0].var(axes, keepdim=True, unbiased=False) + layer.eps).rsqrt()
                if _affine(layer, (args[0] - mean) * scale).sub(output).abs().max() <= 1e-9 * output.abs().max():
                    seen[path].append((mean, scale))
                    return
            raise BuildError(f"{path} ({type(layer).__name__}) does more than normalise")

        return hook

    handles = [module.get_submodule(path).register_forward_hook(keep(path)) for path in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _replayed(module: torch.nn.Module, seen: Statistics) -> Iterator[None]:
    """The norms of ``seen`` normalise by what was recorded, call by call."""

    def replace(path: str) -> Any:
        calls = iter(seen[path])

        def hook(layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            mean, scale = next(calls)
            return _affine(layer, (args[0] - mean) * scale)

        return hook

    handles = [module.get_submodule(path).register_forward_hook(replace(path)) for path in seen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _affine(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Weight and bias of a norm applied to ``x``, whose channels are last, or second where only that fits."""
    if layer.weight is None:
        return x
    channels = layer.weight.shape[0]
    last = x.shape[-1] == channels and not (x.ndim == 4 and x.shape[1] == channels and _channels_second(layer))
    shape = [1] * x.ndim
    shape[-1 if last else 1] = channels
    scaled = x * layer.weight.reshape(shape)
    return scaled if layer.bias is None else scaled + layer.bias.reshape(shape)


def _channels_second(layer: Any) -> bool:
    import torch

    return isinstance(layer, torch.nn.GroupNorm) or type(layer).__name__.endswith("2d")


def _first_line(e: BaseException) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), "no message")[:200]
