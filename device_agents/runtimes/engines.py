"""Providers that compile a model for the GPU before they run it, and where what they compiled is kept.

Compiling takes minutes on a small board; a compiled engine loads in seconds. So the first load of an artifact (cold) and every
later one (warm) are two figures. Source: onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html. No run on a
GPU stands behind this file yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict

COMPILING = ("TensorrtExecutionProvider",)


def cache_state(provider: str, folder: Path) -> str:
    """``cold`` or ``warm``: whether something compiled lies in ``folder``; empty for a provider that compiles nothing."""
    if provider not in COMPILING:
        return ""
    return "warm" if any(folder.glob("*.engine")) else "cold"


def provider_options(provider: str, scheme: str, folder: Path) -> Dict[str, str]:
    """Options for ``provider``: engines and timings of kernels are kept in ``folder``; TensorRT may compute in the precision of
    the file and in no other, since that is what its accuracy was measured with."""
    if provider not in COMPILING:
        return {}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1" if scheme == "fp16" else "0",
        "trt_int8_enable": "1" if scheme == "int8-static" else "0",
    }
