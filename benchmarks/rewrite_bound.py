"""How fast a file of DeiT-Tiny could be in LiteRT if everything but its matrix products cost nothing.

    python benchmarks/rewrite_bound.py [--rounds 60]

Chains of the two operators that the model spends its arithmetic in, alone and in its own shapes, give the rate this machine
reaches: int8-dynamic linear layers (197 tokens, 192 → 768 → 192) and float attention products (3 heads of 197 × 64). They are
timed beside the plain int8-dynamic conversion, interleaved, on one thread; medians. The bound is the arithmetic that the
class-token cut leaves, at those rates.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rewrites import interleaved, plain, session

from edgevit.model import ModelSource, load_model
from edgevit.torchsetup import import_timm, import_torch

TOKENS, WIDTH, HIDDEN, HEADS, DEPTH = 197, 192, 768, 3, 12
PAIRS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    import_torch().set_num_threads(1)
    import_timm()
    model = load_model(ModelSource("deit_tiny_patch16_224", random_weights=True))
    with tempfile.TemporaryDirectory(prefix="edgevit-bench-") as scratch:
        whole = plain(model, "tflite", Path(scratch))
        linear, products = linear_chain(Path(scratch)), product_chain(Path(scratch))
    image = np.zeros((1, model.preprocessing.height, model.preprocessing.width, 3), np.uint8)
    calls = [functools.partial(whole.call, whole.feed(image)), linear, products]
    whole_ms, linear_ms, products_ms = interleaved(calls, rounds)
    linear_rate = 2 * PAIRS * TOKENS * WIDTH * HIDDEN / linear_ms / 1e6
    products_rate = 2 * PAIRS * HEADS * TOKENS * TOKENS * (WIDTH // HEADS) / products_ms / 1e6
    linear_macs, product_macs = arithmetic_left()
    bound = linear_macs / linear_rate / 1e6 + product_macs / products_rate / 1e6
    print(f"int8 linear layers        {linear_rate:7.1f} billion MACs/s")
    print(f"float attention products  {products_rate:7.1f} billion MACs/s")
    print(f"left after the cut        {linear_macs / 1e9:.2f} and {product_macs / 1e9:.2f} billion MACs")
    print(f"plain conversion          {whole_ms:7.2f} ms")
    print(f"those MACs alone          {bound:7.2f} ms, so at most {whole_ms / bound:.2f} × plain")


def arithmetic_left() -> tuple[float, float]:
    """(MACs in linear layers, MACs in attention products) of one image where the last block computes one query alone."""
    patches = (TOKENS - 1) * 3 * 16 * 16 * WIDTH
    one = WIDTH * WIDTH
    block = TOKENS * (4 * one + 2 * WIDTH * HIDDEN)
    last = TOKENS * 2 * one + 2 * one + 2 * WIDTH * HIDDEN
    products = 2 * TOKENS * TOKENS * WIDTH * (DEPTH - 1) + 2 * TOKENS * WIDTH
    return float(patches + (DEPTH - 1) * block + last + WIDTH * 1000), float(products)


def linear_chain(scratch: Path) -> Any:
    """int8-dynamic layers after one another, ready to run."""
    from ai_edge_quantizer import quantizer, recipe

    torch = import_torch()
    layers = [torch.nn.Linear(*shape) for _ in range(PAIRS) for shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    example = torch.randn(TOKENS, WIDTH)
    path = convert(torch.nn.Sequential(*layers), (example,), scratch / "linear.tflite")
    tool = quantizer.Quantizer(str(path))
    tool.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    return functools.partial(session("tflite", bytes(tool.quantize().quantized_model)), example.numpy())


def product_chain(scratch: Path) -> Any:
    """The two float products of attention after one another, ready to run."""
    torch = import_torch()

    class Products(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            q = x
            for _ in range(PAIRS):
                q = (q @ x.transpose(-1, -2)) @ x
            return q

    example = torch.randn(HEADS, TOKENS, WIDTH // HEADS) * 0.01
    path = convert(Products(), (example,), scratch / "products.tflite")
    return functools.partial(session("tflite", path.read_bytes()), example.numpy())


def convert(module: Any, example: Any, path: Path) -> Path:
    import litert_torch

    litert_torch.convert(module.eval(), example).export(str(path))
    return path


if __name__ == "__main__":
    main()
