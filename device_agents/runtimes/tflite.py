"""LiteRT (``ai-edge-litert``) and its predecessor ``tflite-runtime``: one ``Interpreter`` API, two packages."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any, Tuple

from device_agents import wire
from device_agents.errors import Refused
from device_agents.runtimes import Session, refuse_load

PROVIDER = "XNNPACK"
"""Both packages apply the XNNPACK delegate by themselves; where it takes no operator at all that is a mismatch."""

TOO_OLD = (
    (
        r"Didn't find op for builtin opcode '(\w+)' version '(\d+)'",
        "the file needs {0} version {1}, {runtime} has an older one",
    ),
    (r"Op builtin_code out of range: (\d+)", "the file needs the built-in operator {0}, {runtime} does not know it"),
    (
        r"schema version (\d+) not equal to supported version (\d+)",
        "the file has TFLite schema version {0}, {runtime} reads version {1}",
    ),
)
"""What tflite-runtime 2.14 and LiteRT 2.1 to 2.3 say of a file that is too new for them, and the same in plain words."""

# relu(x · W) over (1, 4) float32 with W = ((1, 0, 0, 0), (0, 1, 1, 0)), made once with litert-torch 0.10.0 from
# torch.nn.Linear(4, 2, bias=False), exported, zlib-compressed.
PROOF_MODEL = zlib.decompress(
    base64.b64decode(
        "eNptU01P20AQHQcXNhClkRoFDlGaIwdkUMuhEpU4gFCQgoSqnnpZGbIFF2cd2WvO/Kgee+DIL+DETwHMm/UkRYKVnmb27XyP3Sein0fjr10aUk"
        "iKWtShLrgN6nu5BHwHdoBRQHgn+iv3ZeAUBmPgX4PoEFLB5g58wH5BLR9EdojPKmQLmUJodbw+MAQ+AoXJrxN7oSfmd1ymzvt1Jd4moMRXQUdK"
        "aOT1rHSz0mkui+6fqiqU+uL8omCWbUdif1dVFft8ANaBK2NmunDxWWou00yfZxYX62jwXMdhuLw0nJszK8nJ/Cdgmlidl9YlU6OvTV4kmaVf4s"
        "s9f4l2Il+YHO7zZHz8Y3iQWdg7M4nAtDHz/xtog/kGbMlsupKPMY0TSzKTXZENkSQ7m+Fyy9IzberJ7FYQvV2bqU2Z/XwvCq88tVV/D4J53CWJ"
        "y3eMruIK1/zuQr+/Zv3c5HkO8M6mu+KnpMbPb3er5zsTZdEDyxbi/JFYh8Ip2SHPRGuegtbRybbL8vPLyNpomk3K1BRRmlgT59HYC53ukfg3Fj"
        "Nc9pJ7Vf5W80PP3ezTm8PcnO9hT8p3X/8pfFb8fLnWLelBSZ29d/p+/U0Gkvux4u8l9PoLmI1+3A=="
    )
)


class TfliteBackend:
    """Raises ``no-runtime`` on construction where the package cannot be imported, with the reason."""

    def __init__(self, runtime: str, numpy_version: str) -> None:
        self._runtime = runtime
        if runtime == "tflite-runtime" and int(numpy_version.split(".")[0]) >= 2:
            # Its metadata does not say so; importing it beside numpy 2 ends in a crash of the C API or an ImportError.
            raise Refused(
                "no-runtime",
                "tflite-runtime was built for numpy 1, numpy {} is installed".format(numpy_version),
                "install 'numpy<2' there, or ai-edge-litert",
            )
        try:
            if runtime == "litert":
                from ai_edge_litert import interpreter
            else:
                from tflite_runtime import interpreter
        except Exception as e:
            raise Refused("no-runtime", "{} cannot be imported: {}: {}".format(runtime, type(e).__name__, e)) from e
        self._interpreter: Any = interpreter.Interpreter

    def version(self) -> str:
        from importlib import metadata

        names = ("ai-edge-litert", "ai-edge-litert-nightly") if self._runtime == "litert" else ("tflite-runtime",)
        for name in names:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        raise Refused("no-runtime", "{} has no package metadata, so its version is unknown".format(self._runtime))

    def providers(self) -> Tuple[str, ...]:
        return (PROVIDER,)

    def prove(self, provider: str) -> None:
        """One real inference through ``provider``. Raises :class:`Refused`."""
        import numpy as np

        interpreter = self._open(PROOF_MODEL, provider, 1)
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.array([[-1, 2, 3, 4]], np.float32))
        interpreter.invoke()
        got = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        if got.tolist() != [[0.0, 5.0]]:
            raise Refused("provider-mismatch", "{} computes (0, 5) as {}".format(provider, got.tolist()))

    def check(self, model: bytes) -> None:
        """Raises ``worker-failed`` where this is no TFLite file at all: the interpreter's own words for it say little."""
        if model[4:8] != b"TFL3":
            raise Refused("worker-failed", "the file is not a TFLite model: it has no TFL3 mark")

    def load(self, model: bytes, provider: str, threads: int, artifact: wire.Artifact, engines: Path) -> Session:
        """Load from bytes; nothing is compiled, ``engines`` stays as it is.

        Raises ``worker-failed``, ``provider-missing`` or ``provider-mismatch``.
        """
        interpreter = self._open(model, provider, threads)
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        shape = tuple(int(n) for n in inputs[0]["shape"])
        if len(inputs) != 1 or len(outputs) != 1 or shape != artifact.input.shape:
            raise Refused(
                "worker-failed",
                "the file has {} inputs, the first of shape {}, and {} outputs; the manifest says one of {} and one".format(
                    len(inputs), shape, len(outputs), artifact.input.shape
                ),
            )
        fed, wanted = inputs[0]["index"], outputs[0]["index"]
        set_tensor, invoke, get_tensor = interpreter.set_tensor, interpreter.invoke, interpreter.get_tensor

        def run(x: Any) -> Any:
            set_tensor(fed, x)
            invoke()
            return get_tensor(wanted)

        return Session(PROVIDER, run)

    def _open(self, model: bytes, provider: str, threads: int) -> Any:
        if provider != PROVIDER:
            raise Refused("provider-missing", "{} has {}, not {}".format(self._runtime, PROVIDER, provider))
        try:
            interpreter = self._interpreter(model_content=model, num_threads=threads)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as e:
            raise refuse_load(self._runtime, self.version(), str(e), TOO_OLD) from e
        # The delegate shows as an operator of its own. The list is not public API: where it is gone, the proof is the log.
        operators = getattr(interpreter, "_get_ops_details", None)
        if operators is not None and not any(d.get("op_name") == "DELEGATE" for d in operators()):
            raise Refused("provider-mismatch", "asked for {}, but it took no operator of this model".format(provider))
        return interpreter
