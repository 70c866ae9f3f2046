"""Inference runtimes behind one small seam: load a model from bytes, run one array through it, say who really ran it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, Sequence, Tuple

from device_agents.errors import Refused, printable

KNOWN_WRONG: Dict[Tuple[str, str], str] = {
    (
        "tflite-runtime",
        "int8-dynamic",
    ): "tflite-runtime 2.14 runs dynamic-range int8 models without an error and returns garbage",
    ("tflite-runtime", "int4-weights"): "tflite-runtime 2.14 crashes on int4 weights",
}
"""(runtime, scheme) → what is known to go wrong there, measured (docs/measuring.md)."""


@dataclass(frozen=True)
class Session:
    """A loaded model. ``run`` takes the prepared input array and returns the output array, so what a GPU needs to be given and
    to give back is part of it; ``provider`` really runs it. ``engine_cache``: ``cold`` where it was compiled first."""

    provider: str
    run: Callable[[Any], Any]
    engine_cache: str = ""


def infer(run: Callable[[Any], Any], x: Any) -> Any:
    """One inference through :attr:`Session.run`; whatever the runtime raises becomes ``worker-failed``."""
    try:
        return run(x)
    except Exception as e:
        raise Refused("worker-failed", "the runtime failed: {}: {}".format(type(e).__name__, printable(str(e))[:4000])) from e


def check_scheme(runtime: str, scheme: str) -> None:
    """Raises ``scheme-refused`` where this runtime is known to get this scheme wrong."""
    known = KNOWN_WRONG.get((runtime, scheme))
    if known:
        raise Refused("scheme-refused", known, "use the runtime litert, or another scheme")


def refuse_load(runtime: str, version: str, said: str, too_old: Sequence[Tuple[str, str]]) -> Refused:
    """What the runtime ``said`` of a file it would not load, as a refusal: ``runtime-too-old``, with what the file needs and
    what the runtime has, where a pattern of ``too_old`` tells; else ``worker-failed``."""
    there = "{} {}".format(runtime, version)
    for pattern, words in too_old:
        found = re.search(pattern, said, re.DOTALL)
        if found:
            return Refused(
                "runtime-too-old", words.format(*found.groups(), runtime=there), "build for this board, or update its runtime"
            )
    return Refused("worker-failed", "{} cannot load the model: {}".format(there, printable(said)))


def load_backend(runtime: str) -> Any:
    """The module that speaks to ``runtime``: ``version()``, ``providers()``, ``prove(provider)``, ``load(…)``.

    Raises ``no-runtime`` or ``no-numpy`` with the reason when it cannot be imported here.
    """
    try:
        import numpy
    except ImportError as e:
        raise Refused("no-numpy", "numpy cannot be imported: {}".format(e), "edgevit target provision") from e
    if runtime == "onnxruntime":
        from device_agents.runtimes.onnx import OnnxBackend

        return OnnxBackend()
    if runtime in ("litert", "tflite-runtime"):
        from device_agents.runtimes.tflite import TfliteBackend

        return TfliteBackend(runtime, str(numpy.__version__))
    raise Refused("no-runtime", "{!r} is not a runtime this agent knows".format(runtime))
