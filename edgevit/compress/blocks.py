"""Residual blocks of a transformer, and running two versions of a network side by side, one block at a time.

A refit that goes through the network in order needs, at each block, what the original sees there and what the compressed
network sees there. Where a block's input is the block before's output (every plain Vision Transformer) that costs one block's
forward pass; elsewhere the network is run up to the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BATCH = 16


@dataclass(frozen=True)
class ResidualBlock:
    """A module that adds attention and an MLP to its input. ``attention`` and ``mlp`` are paths, empty where it has none that
    can be changed; ``plain`` says that its output is exactly input + attention + MLP, with nothing between."""

    path: str
    attention: str
    mlp: str
    plain: bool


def find_blocks(module: torch.nn.Module) -> list[ResidualBlock]:
    """Blocks with timm's own ``Attention`` or ``Mlp`` inside, in the module's order."""
    parts: dict[str, dict[str, str]] = {}
    for name, part in module.named_modules():
        kind = "attention" if is_attention(part) else "mlp" if is_mlp(part) else ""
        if kind and "." in name:
            parts.setdefault(name.rpartition(".")[0], {}).setdefault(kind, name)
    found = []
    for path, inside in parts.items():
        block = module.get_submodule(path)
        found.append(ResidualBlock(path, inside.get("attention", ""), inside.get("mlp", ""), _is_plain(block)))
    return found


def is_attention(module: torch.nn.Module) -> bool:
    """Whether it is timm's plain multi-head attention, as it came or laid out leanly: one qkv linear, no norms inside, no
    gate."""
    import torch

    from edgevit.torchsetup import import_timm

    import_timm()
    from timm.layers.attention import Attention

    from edgevit.compress.attend import lean_attention

    if type(module) not in (Attention, lean_attention()) or getattr(module, "gate", None) is not None:
        return False
    if not isinstance(module.qkv, torch.nn.Linear) or not isinstance(module.proj, torch.nn.Linear):
        return False
    return all(isinstance(n, torch.nn.Identity) for n in (module.q_norm, module.k_norm, module.norm))


def is_mlp(module: torch.nn.Module) -> bool:
    """Whether hidden units are free to go: fc1 and fc2 linear and nothing that mixes units between them."""
    import torch

    fc1, fc2 = getattr(module, "fc1", None), getattr(module, "fc2", None)
    if not isinstance(fc1, torch.nn.Linear) or not isinstance(fc2, torch.nn.Linear):
        return False
    own_norm = getattr(module, "norm", None)
    # A depthwise convolution between the two (PVTv2) has weights of the hidden width, too.
    known = {id(p) for part in (fc1, fc2, own_norm) if isinstance(part, torch.nn.Module) for p in part.parameters()}
    if any(id(p) not in known for p in module.parameters()):
        return False
    before = type(module).__name__ == "NormMlp"
    return fc1.out_features == fc2.in_features and (before or own_norm is None or isinstance(own_norm, torch.nn.Identity))


def _is_plain(block: torch.nn.Module) -> bool:
    import torch
    from timm.models.vision_transformer import Block

    return type(block) is Block and isinstance(block.ls1, torch.nn.Identity) and isinstance(block.ls2, torch.nn.Identity)


class _Reached(Exception):
    """The forward pass has come to where it was wanted."""


@contextmanager
def taps(root: torch.nn.Module, paths: Iterable[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """While open, holds path → (input, output) of the last call of each layer below ``root``."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...], output: Any) -> None:
            seen[path] = (args[0], output)

        return hook

    hooks = [root.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def input_of(module: torch.nn.Module, path: str, images: torch.Tensor) -> torch.Tensor:
    """What the submodule ``path`` is given when ``module`` runs ``images``; nothing behind it runs."""
    import torch

    seen: list[torch.Tensor] = []

    def stop(_: Any, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    hook = module.get_submodule(path).register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            module(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


def called_alone(module: torch.nn.Module, blocks: Sequence[ResidualBlock], images: torch.Tensor) -> list[bool]:
    """For each block: whether it is called with its input and nothing else, so that it can be run by itself. Others are given
    sizes (XCiT), a class token (CaiT) or rotations (EVA) as well."""
    import torch

    seen: dict[str, bool] = {}

    def note(path: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[path] = len(args) == 1 and not kwargs

        return hook

    hooks = [module.get_submodule(b.path).register_forward_pre_hook(note(b.path), with_kwargs=True) for b in blocks]
    try:
        with torch.no_grad():
            module(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return [seen.get(b.path, False) for b in blocks]


def follows(module: torch.nn.Module, blocks: Sequence[ResidualBlock], images: torch.Tensor) -> list[bool]:
    """For each block: whether its input is the very output of the block before it, and both are called with nothing else."""
    import torch

    alone = called_alone(module, blocks, images)
    with taps(module, [b.path for b in blocks]) as seen, torch.no_grad():
        module(images[:1])
    pairs = [seen[b.path] for b in blocks]
    return [False, *(pairs[i][0] is pairs[i - 1][1] and alone[i - 1] and alone[i] for i in range(1, len(pairs)))]


@dataclass
class Streams:
    """The inputs of one block after the other, of a network that may change meanwhile at and before the block.

    ``images`` are batches of normalised images (N, 3, H, W); ``inputs`` the same batches as the block sees them.
    """

    module: torch.nn.Module
    blocks: Sequence[ResidualBlock]
    chained: Sequence[bool]
    images: Sequence[torch.Tensor]
    index: int = -1
    inputs: Sequence[torch.Tensor] = ()

    def advance(self) -> None:
        """Go to the next block."""
        import torch

        self.index += 1
        path = self.blocks[self.index].path
        if self.chained[self.index]:
            previous = self.module.get_submodule(self.blocks[self.index - 1].path)
            with torch.no_grad():
                self.inputs = [previous(x) for x in self.inputs]
        else:
            self.inputs = [input_of(self.module, path, x) for x in self.images]


@contextmanager
def entered(
    module: torch.nn.Module, blocks: Sequence[ResidualBlock], index: int, inputs: torch.Tensor | None
) -> Iterator[None]:
    """While open, the blocks before ``index`` do nothing and the block there is given ``inputs`` (None: all runs as ever)."""
    if inputs is None or index == 0:
        yield
        return

    def give(_: Any, args: tuple[Any, ...]) -> Any:
        return (inputs, *args[1:])

    kept = {b.path: module.get_submodule(b.path) for b in blocks[:index]}
    hook = module.get_submodule(blocks[index].path).register_forward_pre_hook(give)
    try:
        for path in kept:
            replace_submodule(module, path, _pass())
        yield
    finally:
        hook.remove()
        for path, block in kept.items():
            replace_submodule(module, path, block)


def _pass() -> torch.nn.Module:
    import torch

    return torch.nn.Identity()


def replace_submodule(root: torch.nn.Module, path: str, new: torch.nn.Module) -> None:
    """Put ``new`` at ``path`` below ``root``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
