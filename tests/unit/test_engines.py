"""What a compiling provider is told, and that a cold load is not called a warm one.

No GPU is to be had here: ONNX Runtime is stood in for by a recorder that leaves an engine file behind, as its documentation
says TensorRT does. What it proves is what we ask for and what we record, not that TensorRT works.
"""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_agents.runtimes.engines import cache_state, provider_options
from device_agents.runtimes.onnx import OnnxBackend
from edgevit.report.table import json_rows
from edgevit.results.stats import summarize
from tests.support.agent_bundle import make_bundle, make_signer
from tests.support.judged import valid
from tests.support.runs import measurement, run


class Recorder:
    """Stands in for the module onnxruntime with a TensorRT provider."""

    __version__ = "0.0"

    class GraphOptimizationLevel:
        ORT_ENABLE_ALL = 99

    class SessionOptions:
        def add_session_config_entry(self, key: str, value: str) -> None:
            raise AssertionError("only a proof runs alone")

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.profile = ""

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model: bytes, options: Any, providers: list[Any]) -> Any:
        self.asked.append(providers)
        (name, settings), *_ = providers
        if settings.get("trt_engine_cache_enable") == "1":
            (Path(settings["trt_engine_cache_path"]) / "model.engine").write_bytes(b"compiled")
        names = types.SimpleNamespace
        return types.SimpleNamespace(
            get_inputs=lambda: [names(name="input")],
            get_outputs=lambda: [names(name="logits")],
            get_providers=lambda: [name, "CPUExecutionProvider"],
            disable_fallback=lambda: None,
            run=lambda wanted, fed: [None],
            end_profiling=lambda: self.profile,
        )


@pytest.fixture
def artifact(tmp_path: Path) -> Any:
    """With the names that the recorder's sessions have."""
    made = make_bundle(make_signer(tmp_path / "keys")).manifest.artifacts[0]
    return replace(made, input=replace(made.input, name="input"), output=replace(made.output, name="logits"))


def test_the_first_load_is_cold_and_the_next_warm(tmp_path: Path, artifact: Any) -> None:
    backend, recorder, engines = OnnxBackend(), Recorder(), tmp_path / "engines" / "abc"
    backend._ort = recorder
    loads = [backend.load(b"x", "TensorrtExecutionProvider", 1, artifact, engines) for _ in range(2)]
    assert [one.engine_cache for one in loads] == ["cold", "warm"]
    (name, settings), *companions = recorder.asked[0]
    assert name == "TensorrtExecutionProvider" and companions == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert settings["trt_engine_cache_path"] == settings["trt_timing_cache_path"] == str(engines)
    assert settings["trt_fp16_enable"] == settings["trt_int8_enable"] == "0", "a float32 file is computed in float32"


def test_what_is_profiled_is_what_is_measured(tmp_path: Path, artifact: Any) -> None:
    """The engine that was compiled, in the precision of the file: another one would take minutes, and tell of another model."""
    backend, recorder, engines = OnnxBackend(), Recorder(), tmp_path / "engines" / "abc"
    backend._ort, recorder.profile = recorder, str(tmp_path / "profile.json")
    Path(recorder.profile).write_text(json.dumps([{"cat": "Session", "name": "model_run", "ts": at} for at in range(9)]))
    half = replace(artifact, scheme="fp16")
    backend.load(b"x", "TensorrtExecutionProvider", 1, half, engines)
    backend.profile(b"x", "TensorrtExecutionProvider", 1, half, None, tmp_path, engines)
    loaded, profiled = recorder.asked
    assert profiled == loaded and profiled[0][1]["trt_fp16_enable"] == "1"


def test_a_provider_that_compiles_nothing_leaves_nothing_behind(tmp_path: Path, artifact: Any) -> None:
    backend, recorder, engines = OnnxBackend(), Recorder(), tmp_path / "engines" / "abc"
    backend._ort = recorder
    loaded = backend.load(b"x", "CUDAExecutionProvider", 1, artifact, engines)
    assert loaded.engine_cache == "" and not engines.exists()
    assert recorder.asked == [[("CUDAExecutionProvider", {}), "CPUExecutionProvider"]]


@pytest.mark.parametrize(
    ("scheme", "fp16", "int8"), [("fp32", "0", "0"), ("fp16", "1", "0"), ("int8-static", "0", "1"), ("int8-dynamic", "0", "0")]
)
def test_it_computes_in_the_precision_of_the_file(scheme: str, fp16: str, int8: str, tmp_path: Path) -> None:
    options = provider_options("TensorrtExecutionProvider", scheme, tmp_path)
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == (fp16, int8)
    assert provider_options("CPUExecutionProvider", scheme, tmp_path) == {}


def test_only_a_compiled_engine_makes_a_cache_warm(tmp_path: Path) -> None:
    assert cache_state("TensorrtExecutionProvider", tmp_path / "absent") == "cold"
    (tmp_path / "timing.timing").write_bytes(b"")
    assert cache_state("TensorrtExecutionProvider", tmp_path) == "cold"
    (tmp_path / "x.engine").write_bytes(b"")
    assert cache_state("TensorrtExecutionProvider", tmp_path) == "warm"
    assert cache_state("CPUExecutionProvider", tmp_path) == ""


def test_cold_and_warm_loads_are_two_figures() -> None:
    """Three fresh processes, the first of which compiled for 40 s: the load that users meet daily is not their median."""
    m = measurement("fp16", "onnx")
    times = zip(m.series, (40_000_000_000, 900_000_000, 1_100_000_000), ("cold", "warm", "warm"), strict=True)
    made = tuple(replace(s, init_time_ns=ns, engine_cache=state) for s, ns, state in times)
    (summary,) = summarize(run(measurements=(replace(m, series=made),)), valid)
    assert (summary.init_ms, summary.init_cold_ms) == (1000.0, 40_000.0)
    (row,) = json_rows([summary])
    assert row["init_ms"] == 1000.0 and row["init_cold_ms"] == 40_000.0
