"""Running a module again with a change in one layer: what it gives, and what is not computed again."""

from __future__ import annotations

from typing import Any

import torch

from edgevit.compress.replay import Replay


class Counted(torch.nn.Module):
    """A residual block that counts its runs and changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = torch.nn.Linear(6, 6), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return x.add_(self.linear(x))


class Chain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Counted() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0
        for block in self.blocks:
            x = block(x)
        return x


def changed(module: torch.nn.Module, layer: str, run: Any) -> torch.Tensor:
    """What ``run`` gives while the output of ``layer`` is rounded."""
    hook = module.get_submodule(layer).register_forward_hook(lambda m, a, output: (8 * output).round() / 8)
    try:
        with torch.no_grad():
            out: torch.Tensor = run()
        return out
    finally:
        hook.remove()


LAYERS = [f"blocks.{i}.linear" for i in range(4)]


def test_a_run_gives_what_the_module_gives_and_computes_only_what_comes_after() -> None:
    module, x = Chain().eval(), torch.randn(3, 5, 6)
    replay = Replay(module, x, LAYERS)
    for i, layer in reversed(list(enumerate(LAYERS))):
        expected = changed(module, layer, lambda: module(x))
        before = [block.runs for block in module.blocks]
        assert torch.equal(changed(module, layer, lambda name=layer: replay.run(name)), expected), layer
        assert [b.runs - n for b, n in zip(module.blocks, before, strict=True)] == [int(k >= i) for k in range(4)], layer
    assert torch.equal(replay.exact, module(x)) and "forward" not in vars(module.blocks[0])


class Memory(torch.nn.Module):
    """The second half reads what the first left in its module, not what it gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Sequential(Writer(self)), torch.nn.Sequential(torch.nn.Linear(6, 6))
        self.left: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.left.mean(1, keepdim=True)


class Writer(torch.nn.Module):
    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)
        self.memory = [memory]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.memory[0].left = x.cumsum(-1)
        return self.linear(x)


def test_a_module_that_hands_on_more_than_outputs_is_run_whole() -> None:
    module, x = Memory().eval(), torch.randn(3, 5, 6)
    replay = Replay(module, x, ["first.0.linear", "second.0"])
    with torch.no_grad():
        module(torch.randn(3, 5, 6))
    expected = changed(module, "second.0", lambda: module(x))
    with torch.no_grad():
        module(torch.randn(3, 5, 6))
    assert torch.equal(changed(module, "second.0", lambda: replay.run("second.0")), expected)
