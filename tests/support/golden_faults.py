"""Bundles whose model does not give the golden outputs that stand in them."""

from __future__ import annotations

from typing import Any

from tests.support.agent_bundle import tiny_onnx


def swap_channels(document: dict[str, Any]) -> None:
    p = document["preprocessing"]
    p["mean"], p["std"] = p["mean"][::-1], p["std"][::-1]


def change_mean(document: dict[str, Any]) -> None:
    document["preprocessing"]["mean"] = [0.485, 0.456, 0.406]


def change_std(document: dict[str, Any]) -> None:
    document["preprocessing"]["std"] = [0.5, 0.5, 0.5]


GOLDEN_FAULTS: dict[str, dict[str, Any]] = {
    "channels swapped": {"change": swap_channels},
    "wrong mean": {"change": change_mean},
    "wrong std": {"change": change_std},
    "a zeroed layer": {"onnx_model": tiny_onnx(zeroed=True)},
}
"""What is wrong, as :func:`tests.support.agent_bundle.make_bundle` takes it."""
