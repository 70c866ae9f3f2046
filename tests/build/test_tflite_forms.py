"""What litert-torch cannot convert as a model writes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from device_agents.wire import Preprocessing
from edgevit.export import tflite
from edgevit.export.parity import reference_outputs
from edgevit.export.readback_tflite import read_tflite
from edgevit.export.runtime import run_artifact
from edgevit.export.tflite_forms import avg_pool2d, convertible, fold
from edgevit.golden import synthetic_images
from edgevit.quantspec import QuantSpec

SHAPE = Preprocessing(16, 16, 16, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FLOAT = QuantSpec("fp32", ())


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "padding", "stride"),
    [
        ((14, 14), 3, 1, 1, 2),
        ((13, 15), 3, 1, 1, 2),
        ((10, 12), (2, 3), 1, 0, (2, 3)),
        ((11, 12), (3, 2), 2, (1, 0), 1),
        ((9, 9), 1, 1, 2, 1),
    ],
)
def test_fold_is_that_of_torch(size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, *size, generator=generator)
    columns = torch.nn.functional.unfold(image, kernel, dilation, padding, stride)
    columns = torch.randn(columns.shape, generator=generator)
    expected = torch.nn.functional.fold(columns, size, kernel, dilation, padding, stride)
    torch.testing.assert_close(fold(columns, size, kernel, dilation, padding, stride), expected)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((14, 14), 2, 2, 0),
        ((13, 15), 2, 2, 0),
        ((14, 14), 2, None, 0),
        ((14, 16), 3, 2, 1),
        ((13, 15), 3, 2, 1),
        ((12, 12), 3, 1, 1),
        ((9, 12), (4, 3), (1, 3), (2, 0)),
    ],
)
def test_average_pooling_is_that_of_torch(
    size: Any, kernel: Any, stride: Any, padding: Any, count_include_pad: bool, ceil_mode: bool
) -> None:
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    options = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    expected = torch.nn.functional.avg_pool2d(image, kernel, stride, padding, **options)
    torch.testing.assert_close(avg_pool2d(image, kernel, stride, padding, **options), expected)
    expected = torch.nn.functional.avg_pool2d(image, kernel, stride, padding, divisor_override=5, **options)
    torch.testing.assert_close(avg_pool2d(image, kernel, stride, padding, divisor_override=5, **options), expected)


class Outlooks(torch.nn.Module):
    """Overlapping windows that are weighed and laid back, as VOLO's outlook attention does, and MobileViT v2's product with an
    expanded context."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 9, 1)
        self.out = torch.nn.Conv2d(4, 4, 1)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.stem(x).split([1, 4, 4], dim=1)
        columns = torch.nn.functional.unfold(key, 3, padding=1, stride=2)
        key = torch.nn.functional.fold(columns * columns.sigmoid(), (16, 16), 3, padding=1, stride=2)
        key, value = (t.reshape(-1, 4, 4, 64) for t in (key, value))
        context = (key * query.reshape(-1, 1, 4, 64).softmax(-1)).sum(-1, keepdim=True)
        mixed = self.out(torch.relu(value) * context.expand_as(value))
        return self.head(mixed.mean((2, 3)))


class Pools(torch.nn.Module):
    """Averages as ViTamin and NextViT take them: without what is padded, and with a size rounded up that is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 1)
        self.padded = torch.nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
        self.same = torch.nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        self.up = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.same(torch.relu(self.padded(self.stem(x))))).amax((2, 3)))


@pytest.mark.parametrize("model_class", [Outlooks, Pools])
def test_forms_are_converted(model_class: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    module = model_class().eval().requires_grad_(False)
    model = tflite.export_float(module, SHAPE, 1)
    read = read_tflite(model, model, FLOAT, module)  # Which refuses a file with several subgraphs.
    pixels = synthetic_images(4, SHAPE)
    outputs = run_artifact("tflite", model, pixels, SHAPE, read.input)
    np.testing.assert_allclose(outputs, reference_outputs(module, pixels, SHAPE), rtol=1e-4, atol=1e-5)


def test_the_forms_change_no_value() -> None:
    torch.manual_seed(0)
    module, x = Outlooks().eval().requires_grad_(False), torch.randn(2, 3, 16, 16)
    expected = module(x)
    with convertible():
        torch.testing.assert_close(module(x), expected)
        narrow, wide = torch.randn(2, 1), torch.randn(2, 3)
        # Two expanded factors: one of them must keep the product's shape.
        assert (narrow.expand_as(wide) * narrow.expand_as(wide)).shape == wide.shape
