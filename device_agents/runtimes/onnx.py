"""ONNX Runtime."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from device_agents import wire
from device_agents.errors import Refused, printable
from device_agents.runtimes import Session, refuse_load
from device_agents.runtimes.engines import cache_state, provider_options

# Relu over (1, 4) float32, "x" → "y", IR 7 and opset 13, made once with onnx 1.23.2:
#   helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "proof", [x], [y]),
#                     opset_imports=[helper.make_opsetid("", 13)], ir_version=7, producer_name="edgevit")
PROOF_MODEL = base64.b64decode(
    "CAcSB2VkZ2V2aXQ6PwoMCgF4EgF5IgRSZWx1EgVwcm9vZloTCgF4Eg4KDAgBEggKAggBCgIIBGITCgF5Eg4KDAgBEggKAggBCgIIBEIECgAQDQ=="
)

TOO_OLD = (
    (
        r"Unsupported model IR version: (\d+), max supported IR version: (\d+)",
        "the file needs ONNX IR version {0}, {runtime} reads at most {1}",
    ),
    (
        r"Opset (\d+) is under development.*official support for domain (\S+) is till opset (\d+)",
        "the file needs opset {0} of {1}, {runtime} reads at most {2}",
    ),
    (r"Could not find an implementation for (\w+)\((\d+)\)", "the file needs {0} of opset {1}, {runtime} has no kernel for it"),
    (
        r"ORT format model version \[(\d+)\] is not supported",
        "the file has version {0} of the ORT format, {runtime} does not read it",
    ),
    (r"(\S+)\(-?\d+\) is not a registered function", "the file needs the operator {0}, {runtime} does not know it"),
)
"""What onnxruntime 1.19 to 1.31 say of a file that is too new for them, and the same with what it needs and what there is."""

ORT_FORMAT = b"ORTM"
"""Bytes 4 to 8 of a file in ONNX Runtime's own format."""

PROFILE_WARMUP, PROFILE_RUNS, PROFILE_SECONDS = 3, 50, 10.0
MAX_OPERATORS = 1000

COMPANIONS = {
    "TensorrtExecutionProvider": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "CUDAExecutionProvider": ["CPUExecutionProvider"],
}
"""Providers that ONNX Runtime needs beside the one asked for, for the shape arithmetic of every graph."""


class OnnxBackend:
    """Raises ``no-runtime`` on construction where onnxruntime cannot be imported."""

    def __init__(self) -> None:
        # From 1.29 on its Linux wheels report models and devices to their maker unless told not to, from a thread of their own.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except Exception as e:
            raise Refused("no-runtime", "onnxruntime cannot be imported: {}: {}".format(type(e).__name__, e)) from e
        self._ort: Any = onnxruntime

    def version(self) -> str:
        return str(self._ort.__version__)

    def providers(self) -> Tuple[str, ...]:
        """What this build was compiled with; says nothing about what works here."""
        return tuple(self._ort.get_available_providers())

    def prove(self, provider: str) -> None:
        """One real inference through ``provider``. Raises :class:`Refused`."""
        import numpy as np

        session = self._open(PROOF_MODEL, provider, 1, alone=True)
        (got,) = session.run(["y"], {"x": np.array([[-1, 0, 2, 3]], np.float32)})
        if got.tolist() != [[0.0, 0.0, 2.0, 3.0]]:
            raise Refused("provider-mismatch", "{} computes Relu(-1, 0, 2, 3) as {}".format(provider, got.tolist()))

    def check(self, model: bytes) -> None:
        """Refuse a file that points to other files; one in the ORT format, loaded from memory, has no folder to look in."""
        if model[4:8] != ORT_FORMAT:
            refuse_external_data(model)

    def load(self, model: bytes, provider: str, threads: int, artifact: wire.Artifact, engines: Path) -> Session:
        """Load from bytes; what a provider compiles is kept in ``engines``. Raises ``worker-failed``, ``provider-missing`` or
        ``provider-mismatch``."""
        state = cache_state(provider, engines)
        if state:
            engines.mkdir(parents=True, exist_ok=True)
        session = self._open(model, provider, threads, options=provider_options(provider, artifact.scheme, engines))
        names, outputs = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
        if names != [artifact.input.name] or artifact.output.name not in outputs:
            raise Refused(
                "worker-failed",
                "the file has inputs {} and outputs {}, the manifest says {!r} and {!r}".format(
                    names, outputs, artifact.input.name, artifact.output.name
                ),
            )
        wanted, fed = [artifact.output.name], artifact.input.name
        return Session(session.get_providers()[0], lambda x: session.run(wanted, {fed: x})[0], state)

    def profile(
        self, model: bytes, provider: str, threads: int, artifact: wire.Artifact, x: Any, folder: Path, engines: Path
    ) -> wire.OperatorProfile:
        """Times of each operator by ONNX Runtime's own profiler, in whole µs a call; its file lies in ``folder`` meanwhile.
        What is timed is what :meth:`load` loads, with ``engines`` as there.

        Raises as :meth:`load`.
        """
        if cache_state(provider, engines):
            engines.mkdir(parents=True, exist_ok=True)
        options = provider_options(provider, artifact.scheme, engines)
        session = self._open(model, provider, threads, profile_prefix=str(folder / "profile"), options=options)
        start, runs = time.monotonic(), 0
        while runs < PROFILE_WARMUP + PROFILE_RUNS and (runs <= PROFILE_WARMUP or time.monotonic() - start < PROFILE_SECONDS):
            session.run([artifact.output.name], {artifact.input.name: x})
            runs += 1
        with open(session.end_profiling(), "rb") as f:
            events = json.load(f)
        return parse_profile(events, "ONNX Runtime {}".format(self.version()), PROFILE_WARMUP)

    def _open(
        self,
        model: bytes,
        provider: str,
        threads: int,
        alone: bool = False,
        profile_prefix: str = "",
        options: Optional[Dict[str, str]] = None,
    ) -> Any:
        if provider not in self.providers():
            raise Refused(
                "provider-missing",
                "onnxruntime {} has {}, not {}".format(self.version(), ", ".join(self.providers()), provider),
            )
        settings = self._ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 3
        if profile_prefix:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile_prefix
        companions = [] if alone else COMPANIONS.get(provider, [])
        if alone and provider != "CPUExecutionProvider":
            # Else a provider that takes no operator "works": everything runs on the CPU behind its name.
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = self._ort.InferenceSession(model, settings, providers=[(provider, options or {}), *companions])
        except Exception as e:
            raise refuse_load("onnxruntime", self.version(), str(e), TOO_OLD) from e
        session.disable_fallback()
        if session.get_providers()[0] != provider:
            raise Refused(
                "provider-mismatch", "asked for {}, onnxruntime gave {}".format(provider, ", ".join(session.get_providers()))
            )
        return session


def parse_profile(events: Any, profiler: str, warmup: int) -> wire.OperatorProfile:
    """ONNX Runtime's profile (trace events; times in µs) → operators by falling time, the first ``warmup`` runs left out.

    Raises ``worker-failed`` where it holds no run of the model.
    """
    found = [e for e in events if isinstance(e, dict)] if isinstance(events, list) else []
    runs = sorted(int(e["ts"]) for e in found if e.get("cat") == "Session" and e.get("name") == "model_run")
    if len(runs) <= warmup:
        raise Refused(
            "worker-failed", "{}: its profile holds {} runs, more than {} were made".format(profiler, len(runs), warmup)
        )
    totals: Dict[Tuple[str, str, str], List[int]] = {}
    for event in found:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and int(event["ts"]) >= runs[warmup]:
            told = event.get("args") or {}
            key = (name[: -len("_kernel_time")], str(told.get("op_name", "")), str(told.get("provider", "")))
            total = totals.setdefault(key, [0, 0])
            total[0] += 1
            total[1] += int(event["dur"]) * 1000
    ordered = sorted(totals.items(), key=lambda item: (-item[1][1], item[0]))
    kept, rest = ordered[:MAX_OPERATORS], ordered[MAX_OPERATORS:]
    return wire.OperatorProfile(
        profiler=printable(profiler)[:200],
        inferences=len(runs) - warmup,
        operators=tuple(
            wire.OperatorTime(printable(name)[:400], printable(kind)[:200], printable(provider)[:120], calls, ns)
            for (name, kind, provider), (calls, ns) in kept
        ),
        left_out=len(rest),
        left_out_ns=sum(total[1] for _, total in rest),
    )


# Field numbers of onnx.proto3 along which a TensorProto can lie: message → field → message.
_TREE = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14


def refuse_external_data(model: bytes) -> None:
    """Raises ``worker-failed`` where any tensor of an ONNX file lies in another file (CVE-2022-25882 and its kin).

    Reads the protobuf itself: the onnx package is not on devices, and a runtime would open the other file by its name.
    """
    stack: List[Tuple[str, memoryview]] = [("model", memoryview(model))]
    while stack:
        kind, data = stack.pop()
        for number, value in _fields(data):
            if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value == 1)):
                raise Refused(
                    "worker-failed", "the ONNX file keeps tensors in another file, which is refused", "build it again"
                )
            inner = _TREE[kind].get(number)
            if inner and isinstance(value, memoryview):
                stack.append((inner, value))


def _fields(data: memoryview) -> Iterator[Tuple[int, Any]]:
    """(field number, value) of one protobuf message: bytes as a view, varints as int, the rest as None."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: Any = None
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise Refused("worker-failed", "the ONNX file is not a protobuf message")
        if at > len(data):
            raise Refused("worker-failed", "the ONNX file is cut short")
        yield key >> 3, value


def _varint(data: memoryview, at: int) -> Tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise Refused("worker-failed", "the ONNX file is cut short")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
