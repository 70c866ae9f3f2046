"""Operations that litert-torch converts wrongly or not at all, put in other words while it looks at a module. All are exact."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def convertible() -> Any:
    """A context in which a module that is traced uses forms that litert-torch 0.10 takes.

    ``fold`` becomes a convolution: its own lowering scatters, in a subgraph for every sum. A tensor that is expanded
    and then multiplied is multiplied as it was: broadcasting does the rest, and the layout pass does not follow an ``expand``
    (MobileViT v2: "operands don't have broadcast-compatible shapes"). An average that leaves out what is padded, or that rounds
    a size up that has nothing to round, becomes one that the runtime has a kernel for: as written it is lowered to two general
    sums in subgraphs of their own.
    """
    return _forms()()


@functools.cache
def _forms() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    multiplications = (torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul)

    class Forms(TorchFunctionMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.narrow: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            """Identity of an expanded tensor → itself, which keeps the identity its own, and what it was expanded from."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.nn.functional.fold:
                return fold(*args, **kwargs)
            if func is torch.nn.functional.avg_pool2d:
                return avg_pool2d(*args, **kwargs)
            if func is torch.Tensor.expand_as:
                expanded = func(*args, **kwargs)
                if args[0].ndim == expanded.ndim:
                    self.narrow[id(expanded)] = (expanded, args[0])
                return expanded
            if func in multiplications and not kwargs and len(args) == 2:
                args = self._narrowed(*args)
            return func(*args, **kwargs)

        def _narrowed(self, first: Any, second: Any) -> tuple[Any, Any]:
            """The factors as they were before they were expanded, where the other gives the product its shape."""
            if id(second) in self.narrow and getattr(first, "shape", None) == second.shape:
                return first, self.narrow[id(second)][1]
            if id(first) in self.narrow and getattr(second, "shape", None) == first.shape:
                return self.narrow[id(first)][1], second
            return first, second

    return Forms


def fold(
    input: torch.Tensor,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> torch.Tensor:
    """:func:`torch.nn.functional.fold` of (N, C · kh · kw, L) columns → (N, C, H, W): windows set ``stride`` apart with zeros
    between, and one convolution that moves each place of a window to where it belongs and sums what meets there."""
    import torch
    from torch.nn.modules.utils import _pair

    size, kernel, dilated, pad, step = (_pair(v) for v in (output_size, kernel_size, dilation, padding, stride))
    places = kernel[0] * kernel[1]
    down, across = ((size[i] + 2 * pad[i] - dilated[i] * (kernel[i] - 1) - 1) // step[i] + 1 for i in range(2))
    count = input.shape[0] * (input.shape[1] // places)
    apart = torch.nn.functional.pad(input.reshape(-1, down, 1, across, 1), (0, step[1] - 1, 0, 0, 0, step[0] - 1))
    apart = apart.reshape(count, places, down * step[0], across * step[1])
    before = [dilated[i] * (kernel[i] - 1) - pad[i] for i in range(2)]
    after = [size[i] - apart.shape[2 + i] + pad[i] for i in range(2)]
    apart = torch.nn.functional.pad(apart, (before[1], after[1], before[0], after[0]))
    # From numbers and not by torch.eye, which would be traced and become an operator that the runtime lacks.
    turned = [[float(places - 1 - at == place) for at in range(places)] for place in range(places)]
    move = torch.tensor(turned, dtype=input.dtype).reshape(1, places, *kernel)
    made = torch.nn.functional.conv2d(apart, move, None, 1, 0, dilated)
    return made.reshape(input.shape[0], input.shape[1] // places, *size)


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """:func:`torch.nn.functional.avg_pool2d` of (N, C, H, W). Where windows reach over the border and only what is inside
    counts, an average over the whole window, times the constant share of it that lies inside, inverted."""
    import torch
    from torch.nn.modules.utils import _pair

    kernel, pad = _pair(kernel_size), _pair(padding)
    step = _pair(kernel_size if stride is None or stride == [] else stride)
    sides = [int(side) for side in input.shape[-2:]]
    left = [(sides[i] + 2 * pad[i] - kernel[i]) % step[i] for i in range(2)]
    if (ceil_mode and any(left)) or divisor_override is not None:
        return torch._C._nn.avg_pool2d(input, kernel, step, pad, ceil_mode, count_include_pad, divisor_override)
    if count_include_pad or not any(pad):
        return torch._C._nn.avg_pool2d(input, kernel, step, pad)
    if all(2 * pad[i] == ((sides[i] - 1) // step[i]) * step[i] + kernel[i] - sides[i] for i in range(2)):
        # TensorFlow's padding SAME, which the kernel does by itself. litert-torch sees it at a stride of 1, and beyond only
        # where the size is rounded up, which changes nothing here.
        return torch._C._nn.avg_pool2d(input, kernel, step, pad, max(step) > 1, False)
    pooled = torch._C._nn.avg_pool2d(input, kernel, step, pad)
    inside = [
        [
            kernel[i] / (min(at + kernel[i], sides[i]) - max(at, 0))
            for at in range(-pad[i], sides[i] + pad[i] - kernel[i] + 1, step[i])
        ]
        for i in range(2)
    ]
    return pooled * torch.tensor([[down * across for across in inside[1]] for down in inside[0]], dtype=input.dtype)
