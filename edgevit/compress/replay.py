"""Running a module many times with something changed in one layer: what ends before that layer begins is computed once.

The outputs of all blocks (members of a ``ModuleList`` or ``Sequential``) are recorded. A run that changes one layer lets every
block that had ended by then give its recorded output. Modules that hand on anything beside their outputs are found out, since
they answer otherwise after a run on other images, and are run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Replay:
    """Runs of ``module`` on ``x`` for changes in one of ``layers`` (paths) at a time. ``exact``: its outputs without any."""

    def __init__(self, module: torch.nn.Module, x: torch.Tensor, layers: Sequence[str]) -> None:
        import torch

        self.module, self._x = module, x
        self._outputs: dict[str, list[torch.Tensor | None]] = {}
        self._ended: dict[str, tuple[str, ...]] = {}
        self.exact = self._record(layers)
        once = {name for name, calls in self._outputs.items() if len(calls) == 1 and calls[0] is not None}
        self._ended = {layer: tuple(n for n in ended if n in once) for layer, ended in self._ended.items()}
        with torch.no_grad():
            module(x.flip(-1))
        # The most first: whatever a block left behind in that run of mirrored images is still there when it is left out.
        by_count = sorted(set(self._ended.values()), key=len, reverse=True)
        holds = {ended: bool(torch.equal(self._run(ended), self.exact)) for ended in by_count}
        self._ended = {layer: ended for layer, ended in self._ended.items() if holds[ended]}

    def run(self, layer: str) -> torch.Tensor:
        """The module's outputs, computed from the block on that ``layer`` lies in."""
        return self._run(self._ended.get(layer, ()))

    def _run(self, ended: Sequence[str]) -> torch.Tensor:
        import torch

        with torch.no_grad(), _giving([(self.module.get_submodule(n), self._outputs[n][0]) for n in ended]):
            outputs: torch.Tensor = self.module(self._x)
        return outputs

    def _record(self, layers: Sequence[str]) -> torch.Tensor:
        hooks = [self.module.get_submodule(n).register_forward_hook(self._end(n)) for n in _blocks(self.module)]
        hooks += [self.module.get_submodule(n).register_forward_pre_hook(self._begin(n)) for n in layers]
        try:
            return self._run(())
        finally:
            for hook in hooks:
                hook.remove()

    def _end(self, block: str) -> Callable[..., None]:
        import torch

        def end(_: Any, args: Any, output: Any) -> None:
            self._outputs.setdefault(block, []).append(output.clone() if isinstance(output, torch.Tensor) else None)

        return end

    def _begin(self, layer: str) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            self._ended.setdefault(layer, tuple(self._outputs))

        return begin


def _blocks(module: torch.nn.Module) -> list[str]:
    import torch

    return [
        f"{path}.{name}" if path else name
        for path, holder in module.named_modules()
        if isinstance(holder, (torch.nn.ModuleList, torch.nn.Sequential))
        for name, _ in holder.named_children()
    ]


@contextmanager
def _giving(outputs: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Let each of these modules give a copy of this output, which its reader may change in place, and compute nothing."""
    try:
        for module, output in outputs:
            module.forward = lambda *_, output=output, **__: output.clone()
        yield
    finally:
        for module, _ in outputs:
            vars(module).pop("forward", None)
