"""A tiny signed bundle and a real agent process to feed it to, without torch: for tests of the agent and its hosts."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_agents import wire
from edgevit.agentpack import BOOTSTRAP, LAUNCHER, agent_pyz
from edgevit.chunks import make_index

CASES = Path(__file__).parent.parent / "cases" / "agent"
SIDE = 16
CLASSES = 10
GOLDEN = 16
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
FAST_PLAN = wire.RunPlan("quick", 1, 1, 0.0, 8, 0.0, 5.0, True)


# ---- keys -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signer:
    """A throw-away SSH key."""

    key: Path

    @property
    def public(self) -> str:
        return Path(str(self.key) + ".pub").read_text().strip()

    def line(self, principal: str = "tester") -> str:
        """Its line in an allowed_signers file."""
        return f"{principal} " + " ".join(self.public.split()[:2])

    def sign(self, data: bytes, namespace: str = wire.SIGNATURE_NAMESPACE) -> bytes:
        command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(self.key), "-n", namespace]
        return subprocess.run(command, input=data, capture_output=True, check=True, timeout=30).stdout


def make_signer(folder: Path, name: str = "key", kind: str = "ed25519") -> Signer:
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", name, "-f", str(key)], check=True, timeout=60)
    return Signer(key)


# ---- model and bundle -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyBundle:
    """What a host ships: the signed manifest and every blob by digest."""

    manifest: wire.Manifest
    manifest_bytes: bytes
    signature: bytes
    blobs: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.manifest_bytes).hexdigest()

    def variant(self, artifact: str = "tiny-onnx-fp32", runtime: str = "onnxruntime", provider: str = "") -> wire.Variant:
        provider = provider or ("CPUExecutionProvider" if runtime == "onnxruntime" else "XNNPACK")
        return wire.Variant(self.digest, artifact, runtime, provider, 1)

    def write(self, folder: Path) -> Path:
        """As a bundle on disk: manifest.json, manifest.json.sig, blobs/<sha256>."""
        (folder / "blobs").mkdir(parents=True)
        (folder / "manifest.json").write_bytes(self.manifest_bytes)
        (folder / "manifest.json.sig").write_bytes(self.signature)
        for sha256, data in self.blobs.items():
            (folder / "blobs" / sha256).write_bytes(data)
        return folder


def blob_of(data: bytes) -> wire.Blob:
    return wire.Blob(hashlib.sha256(data).hexdigest(), len(data))


def npy(array: Any) -> bytes:
    import numpy as np

    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


@functools.cache
def tiny_onnx(seed: int = 0, zeroed: bool = False) -> bytes:
    """Conv → Relu → GlobalAveragePool → Flatten → Gemm, IR 7 and opset 13: what the oldest runtimes read."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = {
        "w": rng.normal(0, 0.4, (8, 3, 3, 3)),
        "b": rng.normal(0, 0.2, 8),
        "fc": rng.normal(0, 1.5, (CLASSES, 8)) * (0.0 if zeroed else 1.0),
        "fb": rng.normal(0, 0.5, CLASSES),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "fc", "fb"], ["y"], transB=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CLASSES])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7, producer_name="edgevit")
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@functools.cache
def tiny_images(count: int = GOLDEN, seed: int = 1) -> Any:
    """uint8 (count, 16, 16, 3): smooth coloured patches, each its own."""
    import numpy as np

    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.repeat(np.repeat(base, SIDE // 4, 1), SIDE // 4, 2)


def normalised(images: Any) -> Any:
    """The reference preparation: uint8 NHWC → float32 NCHW."""
    import numpy as np

    scaled = (images.astype(np.float32) / np.float32(255) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def outputs_onnx(model: bytes, images: Any) -> Any:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": x[None]})[0] for x in normalised(images)])


def outputs_tflite(model: bytes, images: Any) -> Any:
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    found = []
    for x in normalised(images):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
    return np.stack(found)


def make_bundle(
    signer: Signer,
    *,
    version: int = 1,
    name: str = "tiny",
    tflite: bool = False,
    evaluation: bool = True,
    onnx_model: bytes | None = None,
    extra_blob: bytes | None = None,
    more: Mapping[str, tuple[str, bytes]] | None = None,
    chunk_index: Callable[[bytes], bytes] | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> TinyBundle:
    """A bundle of the tiny models with real golden outputs, and labels that are the fp32 model's own answers, 3 of 32 wrong.

    ``onnx_model`` replaces the shipped ONNX file while the golden outputs stay those of :func:`tiny_onnx`; ``change`` edits the
    manifest's JSON before it is signed; ``extra_blob`` becomes the class names' blob, to give a bundle weight. ``more``: names
    of further ONNX artifacts with scheme and file, each with its own golden outputs. ``chunk_index``: with an index of chunks,
    as this makes it of the right one.
    """
    import numpy as np

    blobs: dict[str, bytes] = {}

    def keep(data: bytes) -> wire.Blob:
        blob = blob_of(data)
        blobs[blob.sha256] = data
        return blob

    images = tiny_images()
    onnx_outputs = outputs_onnx(tiny_onnx(), images)
    artifacts = [_artifact("tiny-onnx-fp32", "onnx", keep(onnx_model or tiny_onnx()), keep(npy(onnx_outputs)), "x", "y")]
    if tflite:
        model = (CASES / "tiny.tflite").read_bytes()
        artifacts.append(
            _artifact("tiny-tflite-fp32", "tflite", keep(model), keep(npy(outputs_tflite(model, images))), "args_0", "output_0")
        )
    for title, (scheme, model) in (more or {}).items():
        made = _artifact(title, "onnx", keep(model), keep(npy(outputs_onnx(model, images))), "x", "y")
        artifacts.append(dataclasses.replace(made, scheme=scheme))
    eval_set = None
    if evaluation:
        eval_images = tiny_images(32, 2)
        labels = outputs_onnx(tiny_onnx(), eval_images).argmax(1).astype(np.int64)
        labels[:3] = (labels[:3] + 1) % CLASSES
        eval_set = wire.EvaluationSet(keep(npy(eval_images)), keep(npy(labels)), 32, "tiny-32")
    names = extra_blob or json.dumps([f"class {i}" for i in range(CLASSES)]).encode()
    manifest = wire.Manifest(
        schema=wire.BUNDLE_SCHEMA,
        name=name,
        version=version,
        minimum_agent=1,
        made_by="tests",
        model=wire.ModelInfo("tiny", hashlib.sha256(b"tiny").hexdigest(), "random", CLASSES, 300, None, {}),
        recipe=wire.RecipeInfo("fp32", hashlib.sha256(b"fp32").hexdigest()),
        steps=(),
        preprocessing=wire.Preprocessing(SIDE, SIDE, SIDE, "bilinear", "center", MEAN, STD),
        labels=keep(names),
        golden=wire.GoldenInputs(keep(npy(images)), GOLDEN, "synthetic"),
        evaluation=eval_set,
        evaluation_absent="" if eval_set else "no labelled images were given",
        artifacts=tuple(artifacts),
        tools={},
    )
    if chunk_index:
        manifest = dataclasses.replace(manifest, chunks=keep(chunk_index(make_index(blobs))))
    document = wire.encode(manifest)
    if change:
        change(document)
    data = (json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n").encode()
    return TinyBundle(manifest, data, signer.sign(data), blobs)


def _artifact(name: str, fmt: str, blob: wire.Blob, golden: wire.Blob, input_name: str, output_name: str) -> wire.Artifact:
    return wire.Artifact(
        name=name,
        format=fmt,
        scheme="fp32",
        blob=blob,
        input=wire.TensorSpec(input_name, "float32", (1, 3, SIDE, SIDE), "NCHW"),
        output=wire.TensorSpec(output_name, "float32", (1, CLASSES)),
        batch=1,
        opset=13 if fmt == "onnx" else None,
        ir_version=7 if fmt == "onnx" else None,
        operators={"Conv": 1},
        fits=("generic-x86-64",),
        golden=wire.GoldenOutputs(golden, "onnxruntime" if fmt == "onnx" else "litert", "1", wire.Tolerance(1e-3, 0.999, 1e-3)),
        parity=wire.Parity(16, 0.0, 0.0, 1.0, 1.0),
        checked=(),
    )


def make_job(
    bundle: TinyBundle, run_id: str, *variants: wire.Variant, plan: wire.RunPlan = FAST_PLAN, timeout: float = 120.0
) -> wire.Job:
    return wire.Job(
        schema=wire.JOB_SCHEMA,
        run_id=run_id,
        batch_id="batch-1",
        target="local",
        submitted_at="2026-01-01T00:00:00Z",
        submitted_by="tests",
        plan=plan,
        variants=variants or (bundle.variant(),),
        timeout_seconds=timeout,
    )


# ---- the agent ------------------------------------------------------------------------------------------------------


class AgentRefused(Exception):
    """A ``refusal`` line of the agent."""

    def __init__(self, refusal: wire.Refusal) -> None:
        super().__init__(f"{refusal.code}: {refusal.message}")
        self.code = refusal.code
        self.message = refusal.message


@dataclass(frozen=True)
class AgentProcess:
    """One root, worked by real agent processes of ``python``."""

    root: Path
    python: str = sys.executable
    env: Mapping[str, str] | None = None

    def upload(self) -> AgentProcess:
        """Send the agent itself, as a host's first contact does."""
        pack = agent_pyz()
        command = [self.python, "-c", BOOTSTRAP, pack.sha256, str(len(pack.data)), str(self.root)]
        subprocess.run(command, input=pack.data, check=True, capture_output=True, timeout=60)
        return self

    def argv(self, *command: str) -> list[str]:
        return [self.python, "-c", LAUNCHER, agent_pyz().sha256, str(self.root), *command]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """A running agent with pipes on its three streams."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.argv(*command), stdin=pipe, stdout=pipe, stderr=pipe, env=self._env())

    def messages(self, *command: str, stdin: bytes = b"", timeout: float = 120.0) -> list[dict[str, Any]]:
        """Every line a command writes; its exit status must agree with the last."""
        done = subprocess.run(self.argv(*command), input=stdin, capture_output=True, timeout=timeout, env=self._env())
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        wanted = {0: "result", 10: "refusal"}.get(done.returncode)
        if not lines or wanted is None or lines[-1]["type"] != wanted:
            raise RuntimeError(
                f"{command}: exit {done.returncode}, last line {lines[-1:]}, stderr {done.stderr.decode()[-4000:]}"
            )
        return lines

    def call(self, *command: str, stdin: bytes | Any = b"", timeout: float = 120.0) -> Any:
        """A command's result; raises :class:`AgentRefused`."""
        data = stdin if isinstance(stdin, bytes) else json.dumps(stdin).encode() + b"\n"
        return result_of(self.messages(*command, stdin=data, timeout=timeout))

    def allow(self, *signers: Signer) -> None:
        self.call("allow", stdin={"lines": [s.line() for s in signers], "replace": False})

    def install(self, bundle: TinyBundle, allow_older: bool = False, blobs: Mapping[str, bytes] | None = None) -> Any:
        """The host's side of ``install``, as plain as it can be."""
        process = self.start("install")
        assert process.stdin and process.stdout
        try:
            process.stdin.write(install_request(bundle, allow_older))
            process.stdin.flush()
            lines: list[dict[str, Any]] = []
            for raw in process.stdout:
                lines.append(json.loads(raw))
                if lines[-1]["type"] == "need":
                    try:
                        for data in needed_bytes(lines[-1], blobs or bundle.blobs):
                            process.stdin.write(data)
                        process.stdin.close() if lines[-1]["last"] else process.stdin.flush()
                    except BrokenPipeError:
                        pass  # it refused in the middle: its last line says why
            process.wait(60)
            return result_of(lines)
        finally:
            process.kill()
            process.communicate() if not process.stdin.closed else process.wait()

    def follow(self, run_id: str, timeout: float = 120.0) -> wire.Run:
        return wire.decode(wire.Run, self.call("follow", run_id, timeout=timeout), "run")

    def _env(self) -> dict[str, str]:
        return {**os.environ, **(self.env or {})}


def needed_bytes(need: Mapping[str, Any], blobs: Mapping[str, bytes]) -> Iterator[bytes]:
    """What a ``need`` of the agent asks for, in its order."""
    for entry in need["blobs"]:
        data = blobs[entry["sha256"]]
        for offset, length in entry.get("ranges", [[entry.get("offset"), len(data)]]):
            yield data[offset : offset + length]


def install_request(bundle: TinyBundle, allow_older: bool = False) -> bytes:
    texts = [base64.b64encode(b).decode() for b in (bundle.manifest_bytes, bundle.signature)]
    return json.dumps({"manifest": texts[0], "signature": texts[1], "allow_older": allow_older}).encode() + b"\n"


def result_of(lines: Sequence[Mapping[str, Any]]) -> Any:
    if not lines:
        raise RuntimeError("the agent said nothing")
    last = lines[-1]
    if last["type"] == "refusal":
        raise AgentRefused(wire.decode(wire.Refusal, last["refusal"], "refusal"))
    if last["type"] != "result":
        raise RuntimeError(f"the agent's last line is {last}")
    return last["value"]


def replace_signature(bundle: TinyBundle, signature: bytes) -> TinyBundle:
    return dataclasses.replace(bundle, signature=signature)
