"""A file that a runtime is too old for: the refusal says which version the file needs and which there is."""

from __future__ import annotations

import re

import pytest

from device_agents.errors import Refused
from device_agents.runtimes import load_backend, onnx, refuse_load, tflite
from tests.support.agent_bundle import tiny_onnx

LOADING = "[ONNXRuntimeError] : 1 : FAIL : Failed to load model with error: /onnxruntime_src/onnxruntime/core/graph/"
GUARANTEE = (
    LOADING + "model_load_utils.h:46 void onnxruntime::model_load_utils::ValidateOpsetForDomain(const std::string&, int) "
    "ONNX Runtime only *guarantees* support for models stamped with official released onnx opset versions. Opset 26 is under "
    "development and support for this is limited. The operator schemas and or other functionality may change before next ONNX "
    "release and in this case ONNX Runtime will not guarantee backward compatibility. Current official support for domain "
    "ai.onnx is till opset {}.\n"
)
IR = (
    LOADING + "model.cc:180 onnxruntime::Model::Model(onnx::ModelProto&&) Unsupported model IR version: 14, "
    "max supported IR version: 10\n"
)
KERNEL = "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for ConvInteger(10) node with name ''"
UNKNOWN = "[ONNXRuntimeError] : 1 : FAIL : Fatal error: com.microsoft:MadeUp(-1) is not a registered function/op"
VERSION = (
    "Didn't find op for builtin opcode 'FULLY_CONNECTED' version '12'. An older version of this builtin might be supported. "
    "Are you using an old TFLite binary with a newer model?\nRegistration failed.\n"
)
RANGE = "Op builtin_code out of range: 9999. Are you using old TFLite binary with newer model?Registration failed.\n"
SCHEMA = "Model provided is schema version 4 not equal to supported version 3.\n"

# What each runtime really said, recorded from the version named.
RECORDED = [
    ("onnxruntime", "1.19.2", IR, "the file needs ONNX IR version 14, onnxruntime 1.19.2 reads at most 10"),
    ("onnxruntime", "1.19.2", GUARANTEE.format(21), "the file needs opset 26 of ai.onnx, onnxruntime 1.19.2 reads at most 21"),
    ("onnxruntime", "1.23.2", GUARANTEE.format(23), "the file needs opset 26 of ai.onnx, onnxruntime 1.23.2 reads at most 23"),
    ("onnxruntime", "1.19.2", KERNEL, "the file needs ConvInteger of opset 10, onnxruntime 1.19.2 has no kernel for it"),
    ("onnxruntime", "1.31.1", UNKNOWN, "the file needs the operator com.microsoft:MadeUp, onnxruntime 1.31.1 does not know it"),
    ("tflite-runtime", "2.14.0", VERSION, "the file needs FULLY_CONNECTED version 12, tflite-runtime 2.14.0 has an older one"),
    ("litert", "2.1.0", RANGE, "the file needs the built-in operator 9999, litert 2.1.0 does not know it"),
    ("litert", "2.3.0", SCHEMA, "the file has TFLite schema version 4, litert 2.3.0 reads version 3"),
]


@pytest.mark.parametrize(("runtime", "version", "said", "expected"), RECORDED)
def test_recorded_words_become_both_versions(runtime: str, version: str, said: str, expected: str) -> None:
    patterns = onnx.TOO_OLD if runtime == "onnxruntime" else tflite.TOO_OLD
    refused = refuse_load(runtime, version, said, patterns)
    assert (refused.code, str(refused)) == ("runtime-too-old", expected) and refused.hint


@pytest.mark.parametrize(
    "said",
    [
        "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Failed to load model because protobuf parsing failed.",
        'This is an invalid model. In Node, ("", Gelu, "", -1), Error No Op registered for Gelu with domain_version of 17',
        "The model is not a valid Flatbuffer buffer",
    ],
)
def test_a_broken_file_is_not_called_too_new(said: str) -> None:
    for patterns in (onnx.TOO_OLD, tflite.TOO_OLD):
        assert refuse_load("x", "1", said, patterns).code == "worker-failed"


def test_the_onnx_runtime_here_really_says_so() -> None:
    import onnx as package

    newer = package.load_model_from_string(tiny_onnx())
    newer.ir_version = 99
    with pytest.raises(Refused, match=r"the file needs ONNX IR version 99, onnxruntime \S+ reads at most \d+$") as caught:
        load_backend("onnxruntime")._open(newer.SerializeToString(), "CPUExecutionProvider", 1)
    assert caught.value.code == "runtime-too-old"


def test_litert_here_really_says_so() -> None:
    pytest.importorskip("ai_edge_litert")
    flatbuffers, schema = pytest.importorskip("flatbuffers"), pytest.importorskip("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(tflite.PROOF_MODEL, 0))
    model.operatorCodes[0].version = 99
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    with pytest.raises(Refused) as caught:
        load_backend("litert")._open(bytes(builder.Output()), "XNNPACK", 1)
    assert caught.value.code == "runtime-too-old"
    assert re.search(r"the file needs FULLY_CONNECTED version 99, litert \S+ has an older one", str(caught.value))
