"""The one door to torch and timm: every process that needs them comes through :func:`import_timm`.

A torchvision wheel built against another torch build cannot load its C++ operators and stops ``import timm`` with
``operator torchvision::nms does not exist``. Models and transforms use none of these operators, so declaring the schemas is
enough; it is done only where that very error occurs.
"""

from __future__ import annotations

import logging
import sys
import warnings
from types import ModuleType
from typing import Any

from edgevit.errors import MissingExtra

_MISSING_OPERATOR = "operator torchvision::"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept_alive: list[Any] = []
"""A torch.library.Library takes its operators away when it is collected."""


def import_torch() -> ModuleType:
    """torch itself; :class:`MissingExtra` where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise MissingExtra("torch", "build") from e
    module: ModuleType = torch
    return module


def import_timm() -> ModuleType:
    """timm, importable whatever the torchvision build, with fused attention off so that both exporters see plain products.

    Raises :class:`MissingExtra` where torch, torchvision or timm is not installed.
    """
    if "timm" in sys.modules and "timm.layers" in sys.modules:
        return sys.modules["timm"]
    torch = import_torch()
    _import_torchvision(torch)
    try:
        import timm
        import timm.layers
    except ModuleNotFoundError as e:
        if e.name not in ("timm", "huggingface_hub", "safetensors", "torchvision"):
            raise
        raise MissingExtra(e.name or "timm", "build") from e
    timm.layers.set_fused_attn(False)
    module: ModuleType = timm
    return module


def _import_torchvision(torch: ModuleType) -> None:
    try:
        import torchvision
    except ModuleNotFoundError as e:
        if e.name != "torchvision":
            raise
        raise MissingExtra("torchvision", "build") from e
    except RuntimeError as e:
        if _MISSING_OPERATOR not in str(e):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
        _kept_alive.append(library)
        import torchvision  # noqa: F401


def silence_exporters() -> None:
    """Exporters chatter about their own future on standard error; what matters is read back from the file instead."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx.*")
    for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "absl", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
